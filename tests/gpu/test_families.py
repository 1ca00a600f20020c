"""The model families beside Llama and Qwen3 on a GPU: windows, two KV groups, soft caps, norms behind, another gate.

The float32 class, in the two ways of running that have the most in them; `test_float32` runs all ways on two families.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from parity import test_tiny_models as on_cpu
from parity import tiny
from parity.compare import Mismatch, compare

from .support import ON_GPU, assert_graphs, need
from .test_float32 import CHURN, Pair, _true_float32  # noqa: F401 - a fixture for all tests here

pytestmark = pytest.mark.gpu
KINDS = ["qwen2", "qwen2 tied, a window in the last layer", "mistral", "gemma2", "gemma3"]
WAYS = {"preempted, chunked, cached": on_cpu.WAYS["preempted, chunked, cached"], "churn": CHURN}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    @cache
    def make(kind: str) -> Pair:
        folder: Path = tiny.write(kind, tmp_path_factory.mktemp("tiny"))
        return folder, tiny.reference(folder)

    return make


@pytest.mark.parametrize("mode", ["torch", "triton eager", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_greedy(pair: Callable[[str], Pair], way: str, kind: str, mode: str) -> None:
    folder, model = pair(kind)
    options, asked, happened = WAYS[way]
    lens = [on_cpu.COUNT - i % 7 if way == "churn" else on_cpu.COUNT for i in range(len(asked))]
    params = [on_cpu.GREEDY.replace(max_tokens=n) for n in lens]
    outputs, stats = on_cpu.run(folder, {**ON_GPU, **need(mode), **options, "dtype": "float32"}, asked, params)
    report = compare(model, outputs, params)
    assert happened(stats), stats
    assert stats.free_blocks == stats.num_blocks
    assert report.positions == sum(lens)
    assert report.decided >= 0.97 * report.positions
    assert_graphs(stats, mode)
    assert (stats.mixed_graph_steps > 0) >= (mode == "triton" and way == "churn"), stats


MUTANTS = ["local window one long", "norm weights without their one", "gate is SiLU", "logits not capped"]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    kind, patch = on_cpu.MUTANTS[mutant]
    folder, model = pair(kind)
    patch(monkeypatch)
    outputs, _ = on_cpu.run(
        folder, {**ON_GPU, **need("triton"), "dtype": "float32"}, tiny.prompts(6, shortest=5), on_cpu.GREEDY
    )
    assert all(output.error is None for output in outputs)
    with pytest.raises(Mismatch):
        compare(model, outputs, on_cpu.GREEDY)
