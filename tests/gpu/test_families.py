"""The model families beside Llama and Qwen3 on a GPU: windows, two KV groups, soft caps, norms behind, another gate.

The float32 class, in the two ways of running that have the most in them; `test_float32` runs all ways on two families.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from parity import test_tiny_models as on_cpu
from parity import tiny
from parity.compare import Mismatch, compare

from .float32 import RICHEST, Pair, greedy, pairs, true_float32  # noqa: F401 - a fixture for all tests here
from .support import ON_GPU, need

pytestmark = pytest.mark.gpu
KINDS = ["qwen2", "qwen2 tied, a window in the last layer", "mistral", "gemma2", "gemma3"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    return pairs(tiny.write, tmp_path_factory)


@pytest.mark.parametrize("mode", ["torch", "triton eager", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", RICHEST)
def test_greedy(pair: Callable[[str], Pair], way: str, kind: str, mode: str) -> None:
    greedy(pair(kind), way, mode)


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
