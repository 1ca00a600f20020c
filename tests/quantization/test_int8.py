"""INT8 weights that are made of a plain checkpoint while it is loaded. `test_compressed_tensors` has W8A8."""

from __future__ import annotations

from pathlib import Path

import eight_bit_engines as engines
import pytest
import torch
from eight_bit_files import INT8, Module, by_channel, expected_logprobs, online

from nanoengine import LLM
from nanoengine.api import LayerInfo, QuantizationContext
from nanoengine.api.sources import cache_root
from nanoengine.kernels.cpu import NotBuilt, load
from nanoengine.plugins.quantizations import reading
from nanoengine.plugins.quantizations.eight_bit import EightBitLinear
from nanoengine.plugins.quantizations.int8 import Int8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.qwen3(tmp_path_factory.mktemp("source") / "plain", tie_word_embeddings=True)


def made(source: Path) -> dict[str, Module]:
    return online(source, lambda weight: Module({}, by_channel(weight, INT8)[2]))


def chosen() -> Int8:
    return Int8.read(QuantizationContext(name="int8", config={}, dtype=torch.float32, device="cpu", tp_size=1))


def test_a_plain_checkpoint_is_quantised_an_output_at_a_time(source: Path) -> None:
    """Inputs stay as they are; so do the embedding, and the output layer that is tied to it."""
    with engines.start(source, quantization="int8") as llm:
        assert engines.layers_off(llm, made(source)) < 1e-5
        got, (plain, found) = engines.logprobs(llm), llm.start_report.quantised
    torch.testing.assert_close(got, expected_logprobs(source, made(source), engines.IDS)[:-1], rtol=0, atol=1e-5)
    assert (found.label, found.layers) == ("int8 channel, weight only, quantised while loading", 8)
    assert plain.num_bytes == 151 * 64 * 4


def test_kernels_in_c_round_the_inputs_of_such_weights(source: Path) -> None:
    """Within 1%, and the report says so."""
    if isinstance(load(cache_root()), NotBuilt):
        pytest.skip("no kernels in C")
    with engines.start(source, quantization="int8", fuse_kernels=True) as llm:
        assert 1e-4 < engines.layers_off(llm, made(source)) < 0.01
        got, (_, found) = engines.logprobs(llm), llm.start_report.quantised
    torch.testing.assert_close(got, expected_logprobs(source, made(source), engines.IDS)[:-1], rtol=0, atol=0.3)
    assert (found.label, found.layers) == (
        "int8 channel, weight only, quantised while loading, inputs rounded to int8", 8
    )  # fmt: skip


def test_two_ranks(source: Path) -> None:
    """A rank's part of a row-parallel weight has scales of its own: within the format's error."""
    assert engines.ranks_off(source, made(source), chosen()) < 0.01


class LastOfAll(EightBitLinear):
    def _merged(self, *given):
        scale, rows, columns = super()._merged(*given)
        return scale[-1:].expand_as(scale).contiguous(), rows, columns


def test_a_mutant_is_seen(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "EightBitLinear", LastOfAll)
    with engines.start(source, quantization="int8") as llm:
        assert engines.layers_off(llm, made(source)) > 1e-3


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_dummy_weights(source: Path, name: str) -> None:
    """They are not zero, and give finite log-probs."""
    options = {**engines.SMALL, "quantization": name, "load_format": "dummy"}
    with LLM(source, **options) as llm:
        layers = engines.linears(llm, EightBitLinear)
        assert len(layers) == 8
        assert all(each.get_parameter("weight").float().std() > 10 for each in layers.values())
        assert engines.logprobs(llm).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "outputs", "quantised"),
    [("linear", 16, True), ("linear", 1, False), ("embedding", 99, False), ("head", 99, False)],
)
def test_which_layers_are_quantised(kind, outputs: int, quantised: bool) -> None:
    """Linear layers, but no gate of a single output."""
    assert (chosen().method(LayerInfo(name="x", kind=kind, shape=(outputs, 32))) is not None) is quantised
