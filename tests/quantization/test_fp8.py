"""FP8 checkpoints through the whole engine, against what they say: weights dequantised, and inputs quantised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import eight_bit_engines as engines
import pytest
import torch
from eight_bit_files import (
    FP8,
    Module,
    by_block,
    by_channel,
    by_tensor,
    expected_logprobs,
    online,
    per_group,
    per_token,
    static,
    write,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module
from triton_interpreter import import_kernels, interpreted

from nanoengine import LLM
from nanoengine.api import ModelError, QuantizationContext, WeightsError
from nanoengine.kernels.ops import TritonOps
from nanoengine.plugins.quantizations import fp8
from nanoengine.plugins.quantizations.eight_bit import EightBitLinear
from nanoengine.plugins.quantizations.fp8 import Fp8, matches

import_kernels()
INPUT_SCALES = {"q_proj": 0.01, "k_proj": 0.02, "v_proj": 0.005}  # others: 0.03


def fine_grained(name: str, weight: torch.Tensor, size: int = 32) -> Module | None:
    if name == "lm_head":
        return None
    codes, scale, values = by_block(weight, FP8, size, size)
    return Module({"weight": codes, "weight_scale_inv": scale}, values, per_group(FP8, size))


def per_tensor(scale_name: str, input_name: str | None, *, same: bool = False):
    def pack(name: str, weight: torch.Tensor) -> Module | None:
        if name == "lm_head":
            return None
        codes, scale, values = by_tensor(weight, FP8)
        tensors = {"weight": codes, scale_name: scale if "layers.0" in name else scale.reshape(1)}
        if input_name is None:
            return Module(tensors, values, per_token(FP8))
        given = 0.02 if same else INPUT_SCALES.get(name.rpartition(".")[2], 0.03)
        return Module({**tensors, input_name: torch.tensor(given)}, values, static(FP8, given))

    return pack


def fbgemm(name: str, weight: torch.Tensor) -> Module | None:
    """Each output by its largest value; what a layer's inputs are limited to is in the file, of some layers."""
    if name in ("lm_head", "model.layers.1.mlp.down_proj"):
        return None
    codes, scale, values = by_channel(weight, FP8)
    own = {"input_scale_ub": torch.tensor([0.9])} if "mlp" in name else {}
    return Module({"weight": codes, "weight_scale": scale, **own}, values, per_token(FP8, 0.9 if own else 1.1))


BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3"}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1.1,
          "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj"]}  # fmt: skip
HALVES = "blocks of which parts have a half"
FORMATS = {
    "blocks": (BLOCKS, fine_grained, "fp8 block 32, dynamic"),
    HALVES: (  # k, v, gate and up
        {**BLOCKS, "weight_block_size": [128, 128]},
        partial(fine_grained, size=128),
        "fp8 block 128, dynamic",
    ),
    "tensor, dynamic": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        per_tensor("weight_scale", None),
        "fp8 tensor, dynamic",
    ),
    "tensor, static": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        per_tensor("weight_scale", "input_scale"),
        "fp8 tensor, static",
    ),
    "tensor, static, one scale": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False},
        per_tensor("weight_scale_inv", "activation_scale", same=True),
        "fp8 tensor, static",
    ),
    "fbgemm": (FBGEMM, fbgemm, "fp8 channel, dynamic"),
}


@dataclass
class Case:
    folder: Path
    made: dict[str, Module]
    label: str
    llm: LLM


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.qwen3(tmp_path_factory.mktemp("source") / "plain")


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    config, pack, label = FORMATS[request.param]
    folder = tmp_path_factory.mktemp("fp8") / "model"
    made = write(source, folder, config, pack)
    with engines.start(folder) as llm:
        yield Case(folder, made, label, llm)


def test_each_layer_is_what_the_checkpoint_means(case: Case) -> None:
    assert engines.layers_off(case.llm, case.made) < 1e-5


def test_the_model_is_what_the_checkpoint_means(case: Case, source: Path) -> None:
    """A code may fall to its neighbour where rounding differs in front of it: 1/16 of one input."""
    got, expected = engines.logprobs(case.llm), expected_logprobs(source, case.made, engines.IDS)[:-1]
    plain = expected_logprobs(source, {}, engines.IDS)[:-1]
    assert (got - expected).norm() < 0.02 * (plain - expected).norm()


def test_the_start_report_names_method_and_bytes(case: Case) -> None:
    plain, found = case.llm.start_report.quantised
    layers = engines.linears(case.llm, EightBitLinear).values()
    assert (found.label, found.layers) == (case.label, len(layers))
    assert plain.layers == 10 - len(layers)  # the embedding, the output layer, and what is on a list
    codes = sum(each.get_parameter("weight").numel() for each in layers)
    assert codes < found.num_bytes < 1.3 * codes
    assert all(each.get_parameter("weight").dtype == FP8 for each in layers)


def test_triton_kernels_agree(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter; a method's kernels are chosen by the layer's operations."""
    pytest.importorskip("triton")
    from nanoengine.kernels import eight_bit_triton

    with interpreted(), torch.no_grad():
        for layer in engines.linears(case.llm).values():
            if "layers.1" in layer.info.name:
                continue
            x = torch.randn(3, layer.info.shape[1], generator=torch.Generator().manual_seed(1))
            expected = layer(x)
            monkeypatch.setattr(layer, "ops", TritonOps())
            layer.method.finish(layer)
            assert layer.method._kernels is eight_bit_triton
            torch.testing.assert_close(layer(x), expected, rtol=5e-3, atol=5e-3 * expected.abs().max().item())
            monkeypatch.undo()
            layer.method.finish(layer)


@pytest.mark.parametrize("name", [each for each in FORMATS if each != HALVES])
def test_parts_that_are_fused_in_the_file(name: str, tmp_path: Path) -> None:
    """Phi-3's files have one tensor for q, k and v, and so one scale, or one tensor of scales, for all of them."""
    sizes = {**engines.SIZES, "vocab_size": 131, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **sizes))
    model.save_pretrained(tmp_path / "plain")
    config, pack, label = FORMATS[name]
    key = "ignored_layers" if config["quant_method"] == "fp8" else "modules_to_not_convert"
    plain = ("lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.qkv_proj")

    def but_plain(module: str, weight: torch.Tensor) -> Module | None:
        return None if module in plain else pack(module, weight)

    made = write(tmp_path / "plain", tmp_path / "model", {**config, key: list(plain)}, but_plain)
    with engines.start(tmp_path / "model") as llm:
        assert "model.layers.1.self_attn.qkv_proj" in made
        assert engines.layers_off(llm, made) < 1e-5
        found = llm.start_report.quantised[1]
        assert (found.label, found.layers) == (label, 6)


class Swapped(EightBitLinear):
    """The scales of the first two parts change places."""

    def _merged(self, layer: Any, weight: Any, parts: list[str], cuts: list[slice]) -> Any:
        scale, rows, columns = super()._merged(layer, weight, parts, cuts)
        if len(cuts) > 1:
            a, b = (range(at.start // rows, at.stop // rows) for at in cuts[:2])
            size = min(len(a), len(b))
            scale = scale.clone()
            scale[a[:size]], scale[b[:size]] = scale[b[:size]], scale[a[:size]].clone()
        return scale, rows, columns


class LastOfAll(EightBitLinear):
    """The last part's scale is used for all."""

    def _merged(self, layer: Any, weight: Any, parts: list[str], cuts: list[slice]) -> Any:
        scale, rows, columns = super()._merged(layer, weight, parts, cuts)
        return scale[-1:].expand_as(scale).contiguous(), rows, columns


class Transposed(EightBitLinear):
    """Scales of blocks in the order of columns."""

    def _merged(self, layer: Any, weight: Any, parts: list[str], cuts: list[slice]) -> Any:
        scale, rows, columns = super()._merged(layer, weight, parts, cuts)
        return scale.t().reshape(scale.shape).contiguous(), rows, columns


class OneInputScale(EightBitLinear):
    """The input scale, or bound, of the first part is used for all."""

    def finish(self, layer: Any) -> None:
        super().finish(layer)
        spec = replace(self._weights[0], weight=layer.get_parameter("weight").data)
        scale = torch.cat([each.scale for each in self._weights])
        self._weights = (replace(spec, scale=scale),)


class PlainInputs(EightBitLinear):
    """Inputs are not quantised."""

    def finish(self, layer: Any) -> None:
        super().finish(layer)
        self._weights = tuple(replace(each, inputs="plain") for each in self._weights)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("blocks", Swapped),
        ("blocks", LastOfAll),
        ("blocks", Transposed),
        ("blocks", PlainInputs),
        ("tensor, dynamic", Swapped),
        ("tensor, dynamic", LastOfAll),
        ("tensor, dynamic", PlainInputs),
        ("tensor, static", OneInputScale),
        ("tensor, static, one scale", PlainInputs),
        ("fbgemm", Swapped),
        ("fbgemm", PlainInputs),
    ],
)
def test_mutants_are_seen(
    name: str, mutant: type[EightBitLinear], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, pack, _ = FORMATS[name]
    made = write(source, tmp_path / "model", config, pack)
    monkeypatch.setattr(fp8, "EightBitLinear", mutant)
    with engines.start(tmp_path / "model") as llm:
        assert engines.layers_off(llm, made) > 1e-3


@pytest.mark.parametrize("name", [each for each in FORMATS if each != HALVES])
def test_two_ranks(name: str, source: Path, tmp_path: Path) -> None:
    config, pack, _ = FORMATS[name]
    overrides = {"intermediate_size": 128} if name == "blocks" else {}
    plain = engines.qwen3(tmp_path / "plain", **overrides) if overrides else source
    made = write(plain, tmp_path / "model", config, pack)
    assert engines.ranks_off(tmp_path / "model", made, Fp8.read(context(config))) < 1e-5


def test_two_processes_and_one_agree(tmp_path: Path) -> None:
    """Of a format whose row-parallel layers quantise their inputs as one rank does: by groups."""
    plain = engines.qwen3(tmp_path / "plain", intermediate_size=128)
    made = write(plain, tmp_path / "model", BLOCKS, fine_grained)
    with engines.start(tmp_path / "model") as one, engines.start(tmp_path / "model", tensor_parallel_size=2) as two:
        got, expected = engines.logprobs(two), engines.logprobs(one)
        assert two.start_report.quantised[1].label == "fp8 block 32, dynamic"
    full = expected_logprobs(plain, {}, engines.IDS)[:-1]
    assert len(made) == 14
    assert (got - expected).norm() < 0.02 * (full - expected).norm()


def test_a_cut_within_a_block_is_refused_with_the_numbers(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "model", BLOCKS, fine_grained)
    with pytest.raises(ModelError, match=r"96 outputs over tensor_parallel_size=2 ranks are 48 each.* block of 32"):
        engines.start(tmp_path / "model", tensor_parallel_size=2)


def context(config: dict[str, Any]) -> QuantizationContext:
    return QuantizationContext(name="fp8", config=config, dtype=torch.float32, device="cpu", tp_size=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BLOCKS, "weight_block_size": [32, 48]}, r"weight_block_size is \[32, 48\]; .* power of two from 32"),
        ({**BLOCKS, "weight_block_size": 128}, r"weight_block_size is 128; supported is \[outputs, inputs\]"),
        ({**BLOCKS, "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({**BLOCKS, "weight_block_size": [True, 128]}, r"weight_block_size is \[True, 128\]"),
        ({**BLOCKS, "activation_scheme": "none"}, "activation_scheme is 'none'; supported is 'dynamic' or 'static'"),
        ({**BLOCKS, "fmt": "e5m2"}, "fmt is 'e5m2'; supported is 'e4m3' or 'float8_e4m3fn' or null"),
        ({**BLOCKS, "scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'; supported is 'float'"),
        ({**BLOCKS, "dequantize": True}, "dequantize is true; supported is false"),
        ({**BLOCKS, "modules_to_convert": ["model.embed_tokens"]}, "modules_to_convert is "),
        ({**BLOCKS, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'; supported is a list"),
        ({**BLOCKS, "modules_to_not_convert": ["a(b"]}, r"has 'a\(b', no regular expression"),
        ({**BLOCKS, "ignored_layers": ["(?i)HEAD"]}, r"has '\(\?i\)HEAD', no regular expression: global flags"),
        ({**BLOCKS, "weight_bits": 8}, "has weight_bits, which may mean other values; known: "),
        ({**FBGEMM, "activation_scale_ub": 0}, "activation_scale_ub is 0; supported is a positive number"),
        ({**FBGEMM, "activation_scale_ub": True}, "activation_scale_ub is true"),
        ({**FBGEMM, "activation_scheme": "static"}, "has activation_scheme, which"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: quantization_config.*{message}"):
        Fp8.read(context(config))


@pytest.mark.parametrize(
    ("pattern", "module", "plain"),
    [
        ("lm_head", "lm_head", True),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("down_proj", "model.layers.1.mlp.down_proj", True),
        ("mlp.gate", "model.layers.1.mlp.gate_proj", False),
        ("model.layers.*", "model.layers.11.mlp.up_proj", True),
        ("model.layers.0|model.layers.2", "model.layers.2.mlp", True),
        ("self_attn", "model.layers.2.mlp", False),
    ],
)
def test_a_list_of_plain_modules_is_read_as_transformers_does(pattern: str, module: str, plain: bool) -> None:
    assert matches(pattern, module) is plain
    assert should_convert_module(module, [pattern]) is not plain


@pytest.mark.parametrize("name", ["self_attn.k_scale", "self_attn.attn.v_scale", "self_attn.k_proj.output_scale"])
def test_scales_of_a_kv_cache_are_not_needed(name: str, source: Path, tmp_path: Path) -> None:
    """As other engines write them, whatever the file says of them: here each token has its own."""
    config = {**BLOCKS, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    write(source, tmp_path / "model", config, fine_grained)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"model.layers.0.{name}": torch.tensor([0.5])}, file)
    with engines.start(tmp_path / "model", kv_dtype="fp8") as llm:
        labels = {each.label for each in llm.start_report.quantised}
    assert "fp8 block 32, dynamic" in labels


def test_a_fused_layer_of_which_a_part_is_plain_is_refused(source: Path, tmp_path: Path) -> None:
    config = {**BLOCKS, "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.k_proj"]}
    write(source, tmp_path / "model", config, fine_grained)
    with pytest.raises(ModelError, match=r"leaves model.layers.0.self_attn.k_proj plain and quantises .*q_proj"):
        engines.start(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (BLOCKS, WeightsError, r"missing: model.layers.0.mlp.down_proj.weight_scale_inv"),
        (
            {"quant_method": "fp8", "activation_scheme": "dynamic"},
            ModelError,
            r"qkv_proj \(q\): the checkpoint has none of weight_scale_inv, weight_scale",
        ),
    ],
)
def test_a_weight_that_has_no_scale_is_named(
    source: Path, tmp_path: Path, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    def pack(name: str, weight: torch.Tensor) -> Module | None:
        return None if name == "lm_head" else Module({"weight": weight.to(FP8)}, weight)

    write(source, tmp_path / "model", config, pack)
    with pytest.raises(error, match=message):
        engines.start(tmp_path / "model")


def test_plain_weights_in_place_of_codes_are_refused(source: Path, tmp_path: Path) -> None:
    def pack(name: str, weight: torch.Tensor) -> Module | None:
        found = fine_grained(name, weight)
        return found if found is None or "q_proj" not in name else replace(found, tensors={"weight": weight})

    write(source, tmp_path / "model", BLOCKS, pack)
    with pytest.raises(WeightsError, match=r"q_proj.weight of dtype F32, expected one of F8_E4M3"):
        engines.start(tmp_path / "model")


class TestOnline:
    def test_a_plain_checkpoint_is_quantised_an_output_at_a_time(self, source: Path) -> None:
        made = online(source, lambda w: Module({}, by_channel(w, FP8)[2], per_token(FP8)))
        with engines.start(source, quantization="fp8") as llm:
            assert engines.layers_off(llm, made) < 1e-5
            got, (_, found) = engines.logprobs(llm), llm.start_report.quantised
        expected = expected_logprobs(source, made, engines.IDS)[:-1]
        plain = expected_logprobs(source, {}, engines.IDS)[:-1]
        assert (got - expected).norm() < 0.02 * (plain - expected).norm()
        assert (found.label, found.layers) == ("fp8 channel, dynamic, quantised while loading", 8)

    def test_two_ranks(self, source: Path) -> None:
        """A rank's part of a row-parallel weight has scales of its own: within the format's error."""
        made = online(source, lambda w: Module({}, by_channel(w, FP8)[2], per_token(FP8)))
        assert engines.ranks_off(source, made, Fp8.read(context({}))) < 0.04
