"""Quantisations as plugins: how one is chosen, and a format of the test's own through loader, ranks and engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoengine import LLM, SamplingParams
from nanoengine.api import (
    ConfigError,
    LayerInfo,
    LinearMethod,
    ModelError,
    PluginError,
    Quantization,
    QuantizationContext,
    QuantizationSpec,
    Shard,
    ShardSpec,
    WeightLayer,
    WeightRule,
    WeightsError,
    hookimpl,
    is_ignored,
)
from nanoengine.api.parallel import ShapesOnly, SingleRank
from nanoengine.layers.linear import Unquantised
from nanoengine.layers.quantised import divided, one_each, per_output, transposed
from nanoengine.plugins.models.llama import Llama
from nanoengine.setup.plugins.discover import discover_given
from nanoengine.setup.start.choose_quantization import choose_quantization
from nanoengine.testing.checkpoints import tiny_llama

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
PROMPT = [5, 6, 7, 8, 9, 10]
HEAD = "lm_head"


class Scaled(Quantization):
    """int8 weights [out, in], and one scale for each tensor, also of parts that are fused; embeddings too."""

    def __init__(self, ignore: tuple[str, ...]) -> None:
        self.ignore = ignore

    @classmethod
    def read(cls, ctx: QuantizationContext) -> Scaled:
        if ctx.config.get("bits") != 8:
            raise ModelError(f"bits must be 8, not {ctx.config.get('bits')}")
        return cls(tuple(ctx.config["ignore"]))

    def method(self, layer: LayerInfo) -> LinearMethod | None:
        return None if is_ignored(layer, lambda name: name in self.ignore) else ScaledMethod()


class ScaledMethod(LinearMethod):
    label = "int8, a scale a tensor"

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        layer.add_weight("weight", ShardSpec(**{**fields_of(weight), "dtypes": ("I8",)}), dtype=torch.int8)
        self.rows_of = [(shard.part, shard.target[0]) for shard in weight.shards(layer.tp.rank, layer.tp.size)]
        for name, spec in one_each("weight_scale", weight, ShardSpec(shape=(1,))).items():
            layer.add_weight(name, spec, dtype=torch.float32)
        layer.add_weight("offset", ShardSpec(shape=(1,), optional=True))
        layer.get_parameter("offset").data.zero_()

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        WeightLayer.load_shard(layer, name, shard, values)

    def finish(self, layer: WeightLayer) -> None:
        values = layer.get_parameter("weight").float()
        for part, rows in self.rows_of:
            values[rows] *= layer.get_parameter(self.scale_of(part)).item()
        self.values = values + layer.get_parameter("offset")

    def scale_of(self, part: str) -> str:
        return f"weight_scale:{part}" if part else "weight_scale"

    def apply(self, layer: WeightLayer, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        return layer.ops.linear(x, self.values.to(x.dtype), bias, out=out)

    def rows(self, layer: WeightLayer, ids: Tensor) -> Tensor:
        return self.values[ids]


class Swapped(ScaledMethod):
    """A mutant: it takes the scale of k for v."""

    def scale_of(self, part: str) -> str:
        return super().scale_of({"k": "v", "v": "k"}.get(part, part))


def fields_of(spec: ShardSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in ShardSpec.__dataclass_fields__}


class Plugin:
    @hookimpl
    def register_quantizations(self) -> list[QuantizationSpec]:
        return [
            QuantizationSpec(
                name="scaled", target=f"{__name__}:Scaled", help="A test.", api=1, formats=("scaled", "scaled_old")
            )
        ]


def quantise(source: Path, folder: Path, *, tied: bool = False, ignore: tuple[str, ...] = (HEAD,)) -> tuple[Path, Path]:
    """(the checkpoint in the format, the same values in float32)."""
    plain, packed = dict[str, Tensor](), dict[str, Tensor]()
    for number, (name, tensor) in enumerate(load_file(source / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if tied and module == HEAD:
            continue
        if tensor.dim() == 1 or module in ignore:
            plain[name] = packed[name] = tensor
            continue
        scale = tensor.abs().max() / (60 + number % 7 * 10)  # each part of a fused layer has another one
        packed[name] = (tensor / scale).round().to(torch.int8)
        packed[f"{module}.weight_scale"] = scale
        plain[name] = packed[name].float() * scale
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": tied}
    given = {"quant_method": "scaled", "bits": 8, "ignore": list(ignore)}
    for which, tensors, more in (("packed", packed, {"quantization_config": given}), ("plain", plain, {})):
        (folder / which).mkdir(parents=True)
        save_file(tensors, folder / which / "model.safetensors")
        (folder / which / "config.json").write_text(json.dumps(config | more))
    return folder / "packed", folder / "plain"


def answer(path: Path, **options: Any) -> tuple[tuple[int, ...], list[float], LLM]:
    with LLM(
        path, attention="torch", max_model_len=64, num_gpu_blocks_override=64, plugins=[Plugin()], **options
    ) as llm:
        [sample] = llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs
    assert sample.logprobs is not None
    found = [each[token].logprob for token, each in zip(sample.token_ids, sample.logprobs, strict=True)]
    return sample.token_ids, found, llm


@pytest.mark.parametrize(("tied", "ignore"), [(False, (HEAD,)), (True, (HEAD,)), (False, (HEAD, "model.embed_tokens"))])
def test_a_format_equals_its_dequantised_model(tied: bool, ignore: tuple[str, ...], tmp_path: Path) -> None:
    """Scalars of fused parts, embeddings, tied output layers, ignored modules, and a tensor that files lack."""
    packed, plain = quantise(tiny_llama(tmp_path / "model"), tmp_path, tied=tied, ignore=ignore)
    want, got = answer(plain), answer(packed)
    assert got[0] == want[0]
    assert got[1] == pytest.approx(want[1], abs=1e-5)
    report = got[2].start_report
    layers = 12 + ("model.embed_tokens" not in ignore)
    [ours] = [each for each in report.quantised if each.label == ScaledMethod.label]
    assert ours.layers == layers
    assert f"int8, a scale a tensor: {layers} layers" in report.line()
    assert want[2].start_report.quantised == ()


def test_scales_that_are_swapped_between_parts_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = quantise(tiny_llama(tmp_path / "model"), tmp_path)
    monkeypatch.setattr(Scaled, "method", lambda self, layer: Swapped() if layer.kind != "head" else None)
    assert answer(packed)[1] != pytest.approx(answer(plain)[1], abs=1e-5)


def test_dummy_weights_are_quantised_ones(tmp_path: Path) -> None:
    packed, _ = quantise(tiny_llama(tmp_path / "model"), tmp_path)
    assert len(answer(packed, load_format="dummy")[0]) == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.0.self_attn.k_proj.weight_scale": None}, r"1 missing: .*0\.self_attn\.k_proj\.weight_scale"),
        (
            {"model.layers.0.mlp.down_proj.weight": torch.zeros(48, 56)},
            r"down_proj\.weight of dtype F32, expected one of I8",
        ),
        (
            {"model.layers.0.mlp.down_proj.g_idx": torch.zeros(3)},
            r"1 unexpected: model\.layers\.0\.mlp\.down_proj\.g_idx",
        ),
        (
            {"model.layers.0.self_attn.q_proj.weight_scale": torch.zeros(2)},
            r"q_proj\.weight_scale \[2\], expected \[1\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Mapping[str, Any], words: str, tmp_path: Path) -> None:
    packed, _ = quantise(tiny_llama(tmp_path / "model"), tmp_path)
    tensors = load_file(packed / "model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, packed / "model.safetensors")
    with pytest.raises(WeightsError, match=words):
        answer(packed)


def test_a_part_of_a_fused_layer_that_is_ignored_is_refused(tmp_path: Path) -> None:
    ignore = (HEAD, "model.layers.1.self_attn.k_proj")
    packed, _ = quantise(tiny_llama(tmp_path / "model"), tmp_path, ignore=ignore)
    with pytest.raises(ModelError, match=r"qkv_proj: the checkpoint leaves model\.layers\.1\.self_attn\.k_proj plain"):
        answer(packed)


def test_rules_that_change_values_are_refused_for_codes_and_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as tensors that are missing, or of a wrong shape: they are there."""
    packed, _ = quantise(tiny_llama(tmp_path / "model"), tmp_path)
    rules = Llama.weight_map
    turned = {"mlp.down_proj": WeightRule("mlp.down_proj", transpose=True)}
    monkeypatch.setattr(Llama, "weight_map", classmethod(lambda cls, config: replace(rules(config), rules=turned)))
    with pytest.raises(WeightsError, match=r"6 sent nowhere .*0\.mlp\.down_proj is quantised") as raised:
        answer(packed)
    assert not any(word in str(raised.value) for word in ("missing", "misshapen"))


# Choosing


def chosen(name: str, config: Any, *plugins: Any) -> Any:
    hf = {} if config is None else {"quantization_config": config}
    return choose_quantization(discover_given([Plugin(), *plugins]), name, hf)


def test_auto_goes_by_the_checkpoint() -> None:
    assert chosen("auto", None) is None
    assert chosen("none", None) is None
    assert chosen("auto", {"quant_method": "mxfp4"}) is None
    for method in ("scaled", "scaled_old"):
        assert chosen("auto", {"quant_method": method, "bits": 8}).name == "scaled"
    plan = chosen("scaled", {"quant_method": "scaled", "bits": 8})
    assert plan.config == {"quant_method": "scaled", "bits": 8}


@pytest.mark.parametrize(
    ("name", "config", "error", "words"),
    [
        ("auto", {"quant_method": "nowhere"}, ModelError, r"quant_method 'nowhere'\); supported: .*mxfp4.*scaled"),
        ("auto", {"bits": 4}, ModelError, "quant_method None"),
        ("auto", "scaled", ModelError, "a mapping with a quant_method"),
        ("none", {"quant_method": "scaled"}, ConfigError, r"quantised by 'scaled'; engine.quantization=auto"),
        ("scaled", None, ConfigError, "scaled quantises no plain weights"),
        ("scaled", {"quant_method": "mxfp4"}, ConfigError, "reads scaled, scaled_old, but .* 'mxfp4'"),
        ("scaled_old", None, PluginError, "'scaled_old', a quant_method, which 'scaled' reads; use .*=auto, or that"),
        ("FP8", None, PluginError, "'FP8', a quant_method, which 'fp8' reads"),
        ("scalled", None, PluginError, "no quantisation 'scalled' is installed; did you mean 'scaled'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, config: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        chosen(name, config)


def test_two_plugins_that_read_one_format() -> None:
    spec = QuantizationSpec(name="other", target="a:B", help="Other.", api=1, formats=("scaled",), online=True)
    other = SimpleNamespace(register_quantizations=hookimpl(lambda: [spec]))
    config = {"quant_method": "scaled", "bits": 8}
    with pytest.raises(PluginError, match=r"'scaled' is read by 'scaled' of .* and 'other'.*choose one by engine"):
        chosen("auto", config, other)
    assert chosen("other", config, other).name == "other"
    assert chosen("other", None, other).config == {}


def test_values_of_the_config_that_are_not_supported_are_named(tmp_path: Path) -> None:
    packed, _ = quantise(tiny_llama(tmp_path / "model"), tmp_path)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["bits"] = 4
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="bits must be 8, not 4"):
        answer(packed)


def test_a_method_of_an_embedding_needs_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRows(ScaledMethod):
        rows = LinearMethod.rows

    monkeypatch.setattr(Scaled, "method", lambda self, layer: NoRows())
    packed, _ = quantise(tiny_llama(tmp_path / "model"), tmp_path)
    with pytest.raises(ModelError, match=r"embed_tokens: .*NoRows has no rows\(\)"):
        answer(packed)


def fails(*args: Any, **_: Any) -> Any:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("call", ["create", "load", "finish", "apply"])
def test_what_a_method_raises_names_its_class_and_not_the_model(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = quantise(tiny_llama(tmp_path / "model"), tmp_path)
    monkeypatch.setattr(ScaledMethod, call, lambda self, *args, **named: fails())
    with pytest.raises((PluginError, ModelError), match=r"on purpose.*test_seam") as raised:
        answer(packed)
    assert f"{__name__}:ScaledMethod" in str(raised.value)
    assert "Llama" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "made", "words"),
    [
        ("read", classmethod(fails), r"quantisation 'scaled' .* failed in read: RuntimeError: on purpose"),
        ("read", classmethod(lambda *_: None), r"quantisation 'scaled' .* returned None from read, not one of its"),
        ("method", fails, r"'scaled' .* failed in method, for model\.embed_tokens: RuntimeError: on purpose"),
        ("method", lambda *_: "x", r"'scaled' .* returned 'x' from method, for .*, not None or a .*\.LinearMethod"),
        ("method", lambda *_: ScaledMethod, r"returned <class .*ScaledMethod'> from method"),
        ("method", lambda *_: Unlabelled(), r"returned the label 3 from method"),
    ],
)
def test_a_quantisation_that_is_broken_is_named(
    name: str, made: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = quantise(tiny_llama(tmp_path / "model"), tmp_path)
    monkeypatch.setattr(Scaled, name, made)
    with pytest.raises((PluginError, ModelError), match=words) as raised:
        answer(packed)
    assert "Llama" not in str(raised.value)


class Unlabelled(ScaledMethod):
    label = 3  # type: ignore[assignment]


# Specs


def layer_of(rank: int, size: int) -> WeightLayer:
    tp = SingleRank() if size == 1 else ShapesOnly(size)
    made = WeightLayer(SimpleNamespace(tp=tp, ops=None, dtype=torch.float32, device="cpu"), "mlp.x")  # type: ignore[arg-type]
    made.tp.rank = rank  # type: ignore[misc]
    return made


COLUMN = ShardSpec(shape=(96, 64), split="even", parts=(("q", 64), ("k", 16), ("v", 16)), unit=16, replicate=True)
ROW = ShardSpec(shape=(96, 64), split="even", dim=1, join=0, unit=16)


@pytest.mark.parametrize("weight", [COLUMN, ROW, ShardSpec(shape=(96, 64))], ids=["column", "row", "whole"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 8), (8, 1), (16, 16)])
def test_a_rank_holds_the_blocks_of_its_weights(weight: ShardSpec, size: int, outputs: int, inputs: int) -> None:
    """Each element of the weight is the number of its block; a rank's blocks are those of its share of the weight."""
    numbers = torch.arange(96 // outputs * (64 // inputs)).view(96 // outputs, -1)
    dense = numbers.repeat_interleave(outputs, 0).repeat_interleave(inputs, 1)
    for rank in range(size):
        spec = divided(layer_of(rank, size), weight, outputs=outputs, inputs=inputs)
        got, want = share(numbers, spec, rank, size), share(dense, weight, rank, size)
        torch.testing.assert_close(got.repeat_interleave(outputs, 0).repeat_interleave(inputs, 1), want)
        torch.testing.assert_close(share(numbers.t(), transposed(spec), rank, size), got.t())
        column = share(dense[:, :1], per_column(weight), rank, size)
        torch.testing.assert_close(share(dense[:, 0], per_output(weight), rank, size), column[:, 0])


def per_column(weight: ShardSpec) -> ShardSpec:
    """Of the weight's first column, which every rank has."""
    changed = {"shape": (96, 1)} | ({"dim": 0, "split": "whole", "unit": 1} if weight.dim else {})
    return ShardSpec(**{**fields_of(weight), **changed})


def share(values: Tensor, spec: ShardSpec, rank: int, size: int) -> Tensor:
    out = torch.empty(spec.local_shape(rank, size), dtype=values.dtype)
    offset = 0
    for shard in spec.shards(rank, size):
        whole = values.narrow(spec.joined, offset, shard.shape[spec.joined])
        out[shard.target] = whole[shard.source]
        offset += shard.shape[spec.joined]
    return out


@pytest.mark.parametrize(
    ("weight", "size", "cut", "words"),
    [
        (ROW, 2, {"inputs": 64}, r"mlp\.x: 64 inputs over tensor_parallel_size=2 ranks are 32 each, .* block of 64"),
        (COLUMN, 2, {"outputs": 32}, r"part k of 16 outputs over .*=2 ranks are 16 each, .* block of 32"),
        (COLUMN, 1, {"outputs": 32}, r"fused parts \(q 64, k 16, v 16 outputs\) end within a block of 32"),
    ],
)
def test_cuts_within_blocks_are_refused_with_the_numbers(weight: Any, size: int, cut: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        divided(layer_of(0, size), weight, **cut)


def test_heads_that_are_no_blocks_are_cut_between_blocks() -> None:
    weight = ShardSpec(shape=(160, 64), split="even", unit=20)
    for size in (1, 2):
        spec = divided(layer_of(0, size), weight, outputs=8)
        assert spec.local_shape(0, size) == (20 // size, 64)


def test_a_block_that_ends_behind_the_weight_is_fine_where_nothing_is_cut() -> None:
    assert divided(layer_of(0, 1), ROW, outputs=128, inputs=48).shape == (1, 2)
    assert divided(layer_of(0, 2), COLUMN, inputs=48).shape == (96, 2)
    assert Unquantised().label == ""
