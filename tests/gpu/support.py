"""What the tests on a GPU share: ways to run an engine there, checkpoints with heads that every backend takes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nanoengine import LLM
from nanoengine.api.stats import EngineStats
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.testing.checkpoints import tiny_llama, tiny_qwen3

# Few graphs, so that an engine starts quickly; 128 prefill tokens behind 16 decode rows still have one.
ON_GPU: Mapping[str, Any] = {"device": "cuda", "max_num_batched_tokens": 512}

# name -> how attention, layers and sampling run
MODES: Mapping[str, Mapping[str, Any]] = {
    "torch": {"attention": "torch", "fuse_kernels": False, "fuse_sampling": False},
    "triton eager": {"attention": "triton", "enforce_eager": True},
    "triton": {"attention": "triton"},
    "flash_attn eager": {"attention": "flash_attn", "enforce_eager": True},
    "flash_attn": {"attention": "flash_attn"},
}


def need(mode: str) -> Mapping[str, Any]:
    """The mode's options; ends the test as skipped where its package is not installed."""
    package = {"torch": "torch", "triton": "triton", "flash_attn": "flash_attn"}[mode.split()[0]]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return MODES[mode]


def assert_graphs(stats: EngineStats, mode: str) -> None:
    """Decode steps were replayed where the mode has graphs, and none anywhere else."""
    if mode in ("triton", "flash_attn"):
        assert stats.graph_steps > 0, stats
    else:
        assert stats.graph_steps == stats.mixed_graph_steps == stats.graph_tails == 0, stats


_WIDE: Mapping[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "std": 0.07,
}


def write_wide(kind: str, folder: Path) -> Path:
    """A tiny checkpoint with heads of 64 ("llama") or 128 ("qwen3"), and positions for several blocks of 256."""
    if kind == "llama":
        return tiny_llama(folder, seed=3, head_dim=64, **_WIDE)
    return tiny_qwen3(folder, seed=4, head_dim=128, vocab_size=131, **_WIDE)


def runner_of(llm: LLM) -> ModelRunner:
    runner: ModelRunner = llm.engine._executor.runner  # type: ignore[attr-defined]
    return runner
