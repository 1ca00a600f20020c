"""Engines of two ranks over the mock model, with the faulty one of `faulty.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import chain_plugin

from nanoengine import LLM, SamplingParams
from nanoengine.testing import mock_model
from tensor_parallel import faulty

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SMALL = {"max_num_seqs": 8, "block_size": 4, "num_gpu_blocks_override": 256, "load_format": "dummy"}


def faulty_llm(folder: Path, fault: str = "", **options: Any) -> LLM:
    """`fault`: of the start; see `faulty.py` for those of steps."""
    path = faulty.write_faulty(folder, fault)
    plugins = [mock_model, faulty.__file__, chain_plugin.__file__]
    return LLM(path, attention="mock", plugins=plugins, **{**SMALL, "tensor_parallel_size": 2, **options})


def pids(llm: LLM) -> list[int]:
    executor: Any = llm._built.executor
    return [rank.process.pid for rank in executor._ranks]


def generate(llm: LLM, prompts: Sequence[Sequence[int]], params: Any = PARAMS) -> list[tuple[int, ...]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.outputs[0].token_ids for output in outputs]
