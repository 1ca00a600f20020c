"""Models with experts on a GPU, float32: as transformers has them, by every way of running; padding goes nowhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from parity import families, tiny
from parity import test_tiny_models as on_cpu
from parity.compare import compare

from .float32 import RICHEST, Pair, greedy, pairs, true_float32  # noqa: F401 - a fixture for all tests here
from .support import ON_GPU, need

pytestmark = pytest.mark.gpu
FAMILIES = ["qwen3-moe, one layer dense", "qwen2-moe", "mixtral"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    return pairs(lambda family, folder: families.write(folder, family), tmp_path_factory)


@pytest.mark.parametrize("mode", ["torch", "triton eager", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", RICHEST)
def test_greedy(pair: Callable[[str], Pair], way: str, family: str, mode: str) -> None:
    greedy(pair(family), way, mode)


def test_padding_of_nan_reaches_no_request(pair: Callable[[str], Pair]) -> None:
    """Padding is token 0, which no prompt has; its embedding is NaN."""
    folder, model = pair("qwen3-moe, one layer dense")
    asked = [[1 + token % 130 for token in prompt] for prompt in tiny.prompts(11, longest=30)]
    params = on_cpu.GREEDY.replace(logit_bias={0: -100.0})
    with tiny.llm(folder, **{**ON_GPU, **need("triton"), "dtype": "float32"}) as llm:
        llm.model.model.embed_tokens.weight.data[0] = float("nan")
        outputs = llm.generate(asked, params, use_tqdm=False)
        stats = llm.stats()
    assert all(output.error is None for output in outputs)
    assert stats.graph_steps > 0
    compare(model, outputs, params)
