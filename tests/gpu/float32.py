"""What the tests of the float32 class share: models against transformers, by one way of running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import test_tiny_models as on_cpu
from parity import tiny
from parity.compare import compare
from transformers import PreTrainedModel

from nanoengine import RequestOutput

from .support import ON_GPU, assert_graphs, need

Pair = tuple[Path, PreTrainedModel]

# 40 requests over eight slots, so that they end and begin at different steps: few prefill rows beside decode rows.
CHURN: tuple[dict[str, Any], list[list[int]], on_cpu.Happened] = (
    {"max_num_batched_tokens": 256, "max_num_seqs": 8},
    tiny.prompts(40, shortest=5, longest=40),
    lambda s: s.mixed_steps > 10,
)
WAYS = {**on_cpu.WAYS, "churn": CHURN}
RICHEST = ["preempted, chunked, cached", "churn"]  # the ways that have the most in them


@pytest.fixture(autouse=True)
def true_float32() -> Iterator[None]:
    """PyTorch's default, said aloud. Each module of this class imports it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def pairs(write: Callable[[str, Path], Path], factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """kind -> folder of the checkpoint, and transformers' model of it on the CPU, made once."""

    @cache
    def make(kind: str) -> Pair:
        folder = write(kind, factory.mktemp("tiny"))
        return folder, tiny.reference(folder)

    return make


def greedy(pair: Pair, way: str, mode: str, **options: Any) -> list[RequestOutput]:
    """Asserts that greedy outputs are those of transformers, and that they came about in this way and mode."""
    folder, model = pair
    more, asked, happened = WAYS[way]
    lens = [on_cpu.COUNT - i % 7 if way == "churn" else on_cpu.COUNT for i in range(len(asked))]
    params = [on_cpu.GREEDY.replace(max_tokens=n) for n in lens]
    given = {**ON_GPU, **need(mode), **options, **more, "dtype": "float32"}
    outputs, stats = on_cpu.run(folder, given, asked, params)
    report = compare(model, outputs, params)
    assert happened(stats), stats
    assert stats.free_blocks == stats.num_blocks
    assert report.positions == sum(lens)
    assert report.decided >= 0.97 * report.positions, report
    assert_graphs(stats, mode)
    assert (stats.mixed_graph_steps > 0) >= (mode == "triton" and way == "churn"), stats
    return outputs
