"""Checkpoints that the library compressed-tensors wrote, through the whole engine, against what it decompresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import eight_bit_engines as engines
import pytest
import torch
from eight_bit_files import FP8, INT8, Module, See, expected_logprobs, per_group, per_token, static, write
from torch import Tensor

from nanoengine.api import LayerInfo, ModelError, QuantizationContext
from nanoengine.plugins.quantizations import compressed_tensors
from nanoengine.plugins.quantizations.compressed_tensors import CompressedTensors
from nanoengine.plugins.quantizations.eight_bit import EightBitLinear

pytest.importorskip("compressed_tensors", reason="python -m pip install compressed-tensors==0.20.1 loguru")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

PLAIN = ["lm_head", "re:.*layers\\.1\\.mlp\\.down_proj"]


@dataclass(frozen=True)
class Kind:
    """A scheme as llm-compressor has it: args of weights and inputs, and the label that the start report shows."""

    form: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None
    see: See
    label: str

    def scheme(self, *targets: str) -> QuantizationScheme:
        given = {"targets": list(targets or ["Linear"]), "weights": dict(self.weights), "format": self.form}
        return QuantizationScheme(**given, input_activations=None if self.inputs is None else dict(self.inputs))


_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
_TOKEN = {"strategy": "token", "dynamic": True}
_TENSOR = {"strategy": "tensor", "dynamic": False}
_BLOCK = {"strategy": "block", "block_structure": [32, 32]}
_GROUP = {"strategy": "group", "group_size": 32}
_CHANNEL = {"strategy": "channel"}
INPUT = 0.02
_PACKED_INT4 = "int4 (pack-quantized)"
KINDS = {
    "fp8 dynamic": Kind(
        "float-quantized", {**_FP8, **_CHANNEL}, {**_FP8, **_TOKEN}, per_token(FP8), "fp8 channel, dynamic"
    ),
    "fp8 static": Kind(
        "float-quantized", {**_FP8, **_TENSOR}, {**_FP8, **_TENSOR}, static(FP8, INPUT), "fp8 tensor, static"
    ),
    "fp8 blocks": Kind(
        "float-quantized",
        {**_FP8, **_BLOCK},
        {**_FP8, **_GROUP, "dynamic": True},
        per_group(FP8, 32),
        "fp8 block 32, dynamic",
    ),
    "fp8 groups": Kind(
        "float-quantized", {**_FP8, **_GROUP}, {**_FP8, **_TOKEN}, per_token(FP8), "fp8 block 1x32, dynamic"
    ),
    "fp8 weight only": Kind("naive-quantized", {**_FP8, **_CHANNEL}, None, lambda x: x, "fp8 channel, weight only"),
    "int8 dynamic": Kind(
        "int-quantized", {**_INT8, **_CHANNEL}, {**_INT8, **_TOKEN}, per_token(INT8), "int8 channel, dynamic"
    ),
    "int8 static": Kind(
        "int-quantized", {**_INT8, **_TENSOR}, {**_INT8, **_TENSOR}, static(INT8, INPUT), "int8 tensor, static"
    ),
    "int4 groups": Kind("pack-quantized", {**_INT4, **_GROUP}, None, lambda x: x, f"{_PACKED_INT4}, groups of 32"),
    "int4 zeros": Kind(
        "pack-quantized",
        {**_INT4, **_GROUP, "symmetric": False, "actorder": "weight"},
        None,
        lambda x: x,
        f"{_PACKED_INT4}, groups of 32",
    ),
    "int4 channel": Kind("pack-quantized", {**_INT4, **_CHANNEL}, None, lambda x: x, f"{_PACKED_INT4}, one group"),
    "int8 packed": Kind(
        "pack-quantized", {**_INT8, **_CHANNEL}, None, lambda x: x, "int8 channel, weight only (pack-quantized)"
    ),
    "int8 packed groups": Kind(
        "pack-quantized", {**_INT8, **_GROUP}, None, lambda x: x, "int8 block 1x32, weight only (pack-quantized)"
    ),
    "int8 weight only": Kind("naive-quantized", {**_INT8, **_CHANNEL}, None, lambda x: x, "int8 channel, weight only"),
}


def scale_of(weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Scale and zero of each tensor, output, group or block, as the library computes them of the largest values."""
    args = scheme.weights
    if args.strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
    elif args.strategy == "group":
        blocks = weight.unflatten(1, (-1, args.group_size))
    else:
        blocks = weight if args.strategy == "channel" else weight.flatten()
    low, high = blocks.amin(-1, keepdim=args.strategy == "channel"), blocks.amax(-1, keepdim=args.strategy == "channel")
    scale, zero = calculate_qparams(low, high, args)
    return {"weight_scale": scale, **({} if args.symmetric else {"weight_zero_point": zero})}


def pack(choose: Callable[[str], Kind | None]) -> Callable[[str, Tensor], Module | None]:
    def packed(name: str, weight: Tensor) -> Module | None:
        kind = choose(name)
        if kind is None:
            return None
        scheme, compressor = kind.scheme(), BaseCompressor.get_value_from_registry(kind.form)
        made = compressor.compress({"weight": weight, **scale_of(weight, scheme)}, scheme)
        values = compressor.decompress(made, scheme)["weight"]
        own = {"input_scale": torch.tensor([INPUT])} if kind.label.endswith("static") else {}
        return Module({**made, **own}, values.float(), kind.see)

    return packed


def config(form: str, ignore: list[str] = PLAIN, **groups: QuantizationScheme) -> dict[str, Any]:
    made = QuantizationConfig(config_groups=groups, format=form, ignore=ignore, quantization_status="compressed")
    return made.model_dump(mode="json")


def is_plain(name: str) -> bool:
    return name in ("lm_head", "model.layers.1.mlp.down_proj")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.qwen3(tmp_path_factory.mktemp("source") / "plain")


@pytest.mark.parametrize("name", KINDS)
def test_a_compressed_checkpoint_is_what_the_library_decompresses(name: str, source: Path, tmp_path: Path) -> None:
    kind = KINDS[name]
    given = config(kind.form, group_0=kind.scheme())
    made = write(source, tmp_path / "model", given, pack(lambda name: None if is_plain(name) else kind))
    with engines.start(tmp_path / "model", fuse_kernels=False) as llm:  # with them a CPU rounds inputs of INT4
        assert engines.layers_off(llm, made) < 1e-5
        got, (plain, found) = engines.logprobs(llm), llm.start_report.quantised
    assert (found.label, found.layers, plain.layers) == (kind.label, 7, 3)
    expected, full = (expected_logprobs(source, each, engines.IDS)[:-1] for each in (made, {}))
    if kind.inputs is None:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    else:
        assert (got - expected).norm() < 0.02 * (full - expected).norm()


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    plain = engines.qwen3(tmp_path / "plain", intermediate_size=128)
    given = config(kind.form, group_0=kind.scheme())
    made = write(plain, tmp_path / "model", given, pack(lambda name: None if is_plain(name) else kind))
    assert engines.ranks_off(tmp_path / "model", made, CompressedTensors.read(context(given))) < 1e-5


def test_layers_of_several_groups(source: Path, tmp_path: Path) -> None:
    """A name goes before an expression, an expression before a class; the output layer may be quantised too."""
    by = {"o": KINDS["fp8 weight only"], "attention": KINDS["fp8 dynamic"], "rest": KINDS["int8 dynamic"]}
    o_proj = "model.layers.1.self_attn.o_proj"

    def choose(name: str) -> Kind:
        return by["o" if name == o_proj else "attention" if "self_attn" in name else "rest"]

    given = config(
        "mixed-precision",
        [],
        rest=by["rest"].scheme(),
        attention=by["attention"].scheme("re:.*self_attn.*"),
        o=by["o"].scheme(o_proj),
    )
    made = write(source, tmp_path / "model", given, pack(choose))
    head = made.pop("lm_head")
    with engines.start(tmp_path / "model", fuse_kernels=False) as llm:  # with them a CPU rounds inputs of INT4
        assert engines.layers_off(llm, made) < 1e-5
        labels = {found.label: found.layers for found in llm.start_report.quantised}
        assert labels == {"": 1, by["o"].label: 1, by["attention"].label: 3, by["rest"].label: 5}
        x = torch.randn(3, 64)
        torch.testing.assert_close(llm._built.executor.runner.model.lm_head(x), head(x), rtol=1e-4, atol=1e-4)


class LastOfAll(EightBitLinear):
    """The scales of the last part are used for the first."""

    def _merged(self, layer: Any, weight: Any, parts: list[str], cuts: list[slice]) -> Any:
        scale, rows, columns = super()._merged(layer, weight, parts, cuts)
        scale = scale.clone()
        scale[cuts[0].start // rows] = scale[-1]
        return scale, rows, columns


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.form != "pack-quantized"])
def test_a_mutant_is_seen(name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS[name]
    given = config(kind.form, group_0=kind.scheme())
    made = write(source, tmp_path / "model", given, pack(lambda name: None if is_plain(name) else kind))
    monkeypatch.setattr(compressed_tensors, "EightBitLinear", LastOfAll)
    with engines.start(tmp_path / "model", fuse_kernels=False) as llm:  # with them a CPU rounds inputs of INT4
        assert engines.layers_off(llm, made) > 1e-3


def context(config: dict[str, Any]) -> QuantizationContext:
    return QuantizationContext(name="ct", config=config, dtype=torch.float32, device="cpu", tp_size=1)


def test_parts_of_different_groups_are_refused() -> None:
    given = config(
        "mixed-precision", [], a=KINDS["fp8 dynamic"].scheme("re:.*q_proj"), b=KINDS["int8 dynamic"].scheme("Linear")
    )
    names = tuple(f"layers.0.{each}_proj" for each in "qkv")
    info = LayerInfo(name="layers.0.qkv_proj", kind="linear", shape=(96, 32), sources=names)
    with pytest.raises(ModelError, match=r"layers.0.qkv_proj: .* different groups .*q_proj: a, .*k_proj: b"):
        CompressedTensors.read(context(given)).method(info)


def test_parts_that_are_fused_in_the_file_go_by_its_name() -> None:
    a, b = KINDS["fp8 dynamic"], KINDS["int8 dynamic"]
    given = config("mixed-precision", ["layers.1.qkv_proj"], a=a.scheme("re:.*qkv_proj"), b=b.scheme("Linear"))
    chosen = CompressedTensors.read(context(given))

    def label(layer: int, own: str) -> str | None:
        names = tuple(f"layers.{layer}.{each}_proj" for each in ("qkv" if own == "qkv_proj" else "o"))
        found = chosen.method(LayerInfo(name=f"layers.{layer}.{own}", kind="linear", shape=(96, 32), sources=names))
        return found and found.label

    assert [label(0, "qkv_proj"), label(1, "qkv_proj"), label(1, "o_proj")] == [a.label, None, b.label]


def _changed(**changes: Any) -> dict[str, Any]:
    """A config whose key, or that of its group's object `weights__x` or `inputs__x`, has another value."""
    kind = KINDS["fp8 blocks"]
    given = config(kind.form, group_0=kind.scheme())
    for path, value in changes.items():
        where, _, key = path.rpartition("__")
        group = given["config_groups"]["group_0"]
        into = {"": given, "group": group, "weights": group["weights"], "inputs": group["input_activations"]}[where]
        into[key] = value
    return given


PACKED = {
    "group__format": "pack-quantized", "group__input_activations": None, "weights__block_structure": None,
    "weights__type": "int", "weights__num_bits": 4, "weights__strategy": "group", "weights__group_size": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity_config": {"format": "sparse-bitmask"}}, r"sparsity_config is .*sparse-bitmask.* supported is null"),
        ({"transform_config": {"config_groups": {"a": 1}}}, r"transform_config is .*; supported is null"),
        ({"moe_sparsity_config": {"method": "prune"}}, r"moe_sparsity_config is"),
        ({"config_groups": {}}, r"config_groups is \{\}; supported is an object with groups"),
        ({"config_groups": None}, r"config_groups is null"),
        ({"ignore": "lm_head"}, r"ignore is 'lm_head'; supported is a list"),
        ({"ignore": ["re:("]}, r"ignore has 're:\(', no regular expression"),
        ({"colour": 1}, r"has colour, which may mean other values"),
        ({"group__format": "marlin-24"}, r"group_0: the format 'marlin-24' is not supported for weights of type float"),
        ({"group__format": "int-quantized"}, r"'int-quantized' .* supported is float-quantized or naive-quantized"),
        ({"group__weights": None}, r"group_0.weights is null; supported is an object"),
        ({"group__output_activations": {"num_bits": 8}}, r"group_0.output_activations is"),
        ({"group__targets": []}, r"group_0.targets is \[\]; supported is a list of names"),
        ({"group__targets": None}, r"group_0.targets is null"),
        ({"weights__num_bits": [8]}, r"weights.num_bits is \[8\]; supported is 8"),
        ({"weights__num_bits": 4}, r"weights.num_bits is 4; supported is 8, or 4 in the format pack-quantized"),
        ({"weights__symmetric": False}, r"weights.symmetric is false; supported is true"),
        ({"weights__dynamic": True}, r"weights.dynamic is true; supported is false"),
        ({"weights__strategy": "token"}, r"weights.strategy is 'token'; supported is 'tensor', 'channel', 'group'"),
        ({"weights__block_structure": None}, r"weights.block_structure is null; supported is"),
        ({"weights__block_structure": [32, 48]}, r"weights.block_structure is \[32, 48\]"),
        ({"weights__zip": 3}, r"weights has zip, which"),
        ({"inputs__group_size": 64}, r"input_activations.group_size is 64; supported is that of the weights, 32"),
        ({"inputs__symmetric": False}, r"input_activations.symmetric is false"),
        ({"inputs__num_bits": 4}, r"input_activations.num_bits is 4; supported is 8"),
        ({"inputs__type": "int"}, r"input_activations.type is 'int'; supported is 'float'"),
        ({"inputs__strategy": "tensor", "inputs__group_size": None}, r"strategy is 'tensor'; .* depend on others"),
        ({"inputs__dynamic": "local"}, r"input_activations.strategy is 'group'; supported is"),
        (
            {"group__format": "pack-quantized", "weights__num_bits": 8, "weights__block_structure": None},
            r"weights.type is 'float'; supported is 'int'",
        ),
        ({**PACKED, "weights__num_bits": 2}, r"weights.num_bits is 2; supported is 4 or 8"),
        ({**PACKED, "weights__num_bits": 8, "weights__symmetric": False}, r"symmetric is false; supported is true"),
        ({**PACKED, "weights__num_bits": 8, "weights__actorder": "group"}, r"actorder is 'group'; supported is"),
        ({**PACKED, "group__input_activations": {"num_bits": 8}}, r"input_activations is .* null for the format pack"),
        ({**PACKED, "weights__strategy": "tensor"}, r"strategy is 'tensor'; supported is 'channel', or 'group'"),
        ({**PACKED, "weights__group_size": None}, r"strategy is 'group'; supported is 'channel', or 'group' with"),
        ({**PACKED, "weights__actorder": "other"}, r"actorder is 'other'; supported is 'group', 'weight' or null"),
        ({**PACKED, "weights__symmetric": "no"}, r"symmetric is 'no'; supported is true or false"),
        ({"inputs__actorder": "group"}, r"input_activations.actorder is 'group'"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: quantization_config.*{message}"):
        CompressedTensors.read(context(_changed(**changes)))


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("experts", "layers.0.mlp.experts.{}.up_proj", r"experts are not supported .*int4 \(pack-quantized\)"),
        ("embedding", "embed", r"embed: embeddings are not supported"),
    ],
)
def test_kinds_of_layers_that_are_not_supported_are_named(kind: Any, name: str, message: str) -> None:
    given = _changed(**PACKED)
    given["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    info = LayerInfo(name=name.replace(".{}.up_proj", ""), kind=kind, shape=(4, 32, 32), sources=(name,))
    with pytest.raises(ModelError, match=message):
        CompressedTensors.read(context(given)).method(info)
    given["ignore"] = [r"re:.*experts\.\d+\.", "embed"]
    assert CompressedTensors.read(context(given)).method(info) is None
