"""Models with experts on a GPU, float32: as transformers has them, by every way of running; padding goes nowhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from parity import families, tiny
from parity import test_tiny_models as on_cpu
from parity.compare import compare

from .support import ON_GPU, assert_graphs, need
from .test_float32 import CHURN, Pair, _true_float32  # noqa: F401 - a fixture for all tests here

pytestmark = pytest.mark.gpu
FAMILIES = ["qwen3-moe, one layer dense", "qwen2-moe", "mixtral"]
WAYS = {"preempted, chunked, cached": on_cpu.WAYS["preempted, chunked, cached"], "churn": CHURN}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    @cache
    def make(family: str) -> Pair:
        folder: Path = families.write(tmp_path_factory.mktemp("family"), family)
        return folder, tiny.reference(folder)

    return make


@pytest.mark.parametrize("mode", ["torch", "triton eager", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_greedy(pair: Callable[[str], Pair], way: str, family: str, mode: str) -> None:
    folder, model = pair(family)
    options, asked, happened = WAYS[way]
    lens = [on_cpu.COUNT - i % 7 if way == "churn" else on_cpu.COUNT for i in range(len(asked))]
    params = [on_cpu.GREEDY.replace(max_tokens=n) for n in lens]
    outputs, stats = on_cpu.run(folder, {**ON_GPU, **need(mode), **options, "dtype": "float32"}, asked, params)
    report = compare(model, outputs, params)
    assert happened(stats), stats
    assert report.positions == sum(lens)
    assert report.decided >= 0.97 * report.positions
    assert_graphs(stats, mode)


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
