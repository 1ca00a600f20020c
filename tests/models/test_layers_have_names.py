"""A layer is loaded, wrapped, tapped and given its method by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanoengine import LLM, SamplingParams
from nanoengine.api import LayerInfo, Linear, LinearMethod, ModelError, Shard, ShardSpec, WeightLayer
from nanoengine.api.parallel import ShapesOnly, SingleRank
from nanoengine.plugins.models.gemma3 import Gemma3
from nanoengine.plugins.models.llama import Llama
from nanoengine.plugins.models.qwen3 import Qwen3
from nanoengine.setup.start.build_model import Builder, build_model
from nanoengine.setup.start.weights import dummy_weights, load_weights
from nanoengine.testing.checkpoints import tiny_gemma3, tiny_llama, tiny_qwen3
from nanoengine.testing.conformance.ranks import Ranks

PLACE: Mapping[str, Any] = {"tp": SingleRank(), "dtype": torch.float32, "device": torch.device("cpu")}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
PROMPT = [5, 6, 7, 8, 9, 10]


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def answer(path: Path, **options: Any) -> tuple[tuple[int, ...], list[float]]:
    with LLM(path, attention="torch", max_model_len=64, num_gpu_blocks_override=64, **options) as llm:
        [sample] = llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs
    assert sample.logprobs is not None
    return sample.token_ids, [
        each[token].logprob for token, each in zip(sample.token_ids, sample.logprobs, strict=True)
    ]


# Names


class Twice(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.more = ctx.linear("model.layers.1.mlp.down_proj", 4, 4)


class Elsewhere(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.more = ctx.linear("model.more", 4, 4)


class NamedAsAParent(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.model.layers[0].more = ctx.linear("model.layers.0", 4, 4)


class InAList(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.more = [ctx.linear("more.0", 4, 4)]


class AttentionElsewhere(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.model.layers[0].self_attn.attn.name = "x"
        self.more = ctx.attention("model.more", self.model.layers[0].self_attn.attn.spec)


class Rows(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.more = ctx.linear("more", 4, 4, parallel="rows")


class SumsNothing(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.more = ctx.linear("more", 4, 4, parallel="column", reduce=False)


class PartsOfARow(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.more = ctx.linear("more", 4, 4, parallel="row", parts=[("a", 1), ("b", 2)])


class PartsAlike(Llama):
    def __init__(self, config: Any, ctx: Any) -> None:
        super().__init__(config, ctx)
        self.more = ctx.linear("more", 4, 4, parallel="column", parts=[("a", 2), ("a", 2)])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Twice, "two layers have the name 'model.layers.1.mlp.down_proj'"),
        (Elsewhere, "the layer 'model.more' is 'more' in the model"),
        (NamedAsAParent, "the layer 'model.layers.0' is 'model.layers.0.more' in the model"),
        (InAList, "the layer 'more.0' is no module of the model.*nn.ModuleList"),
        (AttentionElsewhere, "the layer 'model.more' is 'more' in the model"),
        (Rows, "more: there is no parallel='rows'; did you mean 'row'. Valid: column, replicated, row"),
        (SumsNothing, "more: reduce=False is for parallel='row'"),
        (PartsOfARow, "more: .* do not add up to 4 outputs"),
        (PartsAlike, "more: each part needs a name of its own"),
    ],
)
def test_what_cannot_be_found_by_its_name_is_refused(model: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        build_model(model, config_of(tiny_llama(tmp_path)), **PLACE)
    assert model.__name__ in str(caught.value)


def test_every_layer_has_the_name_of_its_path(tmp_path: Path) -> None:
    model = build_model(Qwen3, config_of(tiny_qwen3(tmp_path)), **PLACE).model
    named = {path: layer.name for path, layer in model.named_modules() if isinstance(layer, WeightLayer)}
    assert all(path == name for path, name in named.items())
    assert {"model.norm", "lm_head", "model.layers.2.self_attn.q_norm", "model.embed_tokens"} <= named.keys()
    assert model.get_submodule("model.layers.1.self_attn.attn").name == "model.layers.1.self_attn.attn"


# Wrapping


class AnyModule(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out


class Wrapper(Linear):
    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base, self.info, self.calls = base, base.info, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.base(x)


@pytest.mark.parametrize("wrapper", [AnyModule, Wrapper])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_wraps_a_linear_layer_is_loaded_and_goes_by_its_forward(
    wrapper: Any, make: Any, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = make(tmp_path, std=0.1), Builder.linear
    hf, model = config_of(path), {tiny_llama: Llama, tiny_gemma3: Gemma3}[make]
    want = answer(path)
    monkeypatch.setattr(Builder, "linear", lambda self, *args, **rest: wrapper(original(self, *args, **rest)))
    got = answer(path)
    assert got[0] == want[0]
    assert got[1] == pytest.approx(want[1], abs=5e-4)
    for rank in Ranks(ranks).groups:
        built = build_model(model, hf, **{**PLACE, "tp": rank})
        load_weights(built.model, built.config, path, rank)
        names = dict(built.model.named_modules())
        assert "model.layers.0.mlp.down_proj.base" in names
        assert names["model.layers.0.mlp.down_proj.base"].name == "model.layers.0.mlp.down_proj"


def test_a_wrapper_is_tapped_by_the_layers_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = tiny_llama(tmp_path), Builder.linear
    monkeypatch.setattr(Builder, "linear", lambda self, *args, **rest: Wrapper(original(self, *args, **rest)))
    name = "model.layers.1.mlp.down_proj"
    with LLM(path, attention="torch", max_model_len=64, num_gpu_blocks_override=64) as llm:
        tap = llm.tap([PROMPT], [name])[0][name]
        assert isinstance(llm.model.get_submodule(name), Wrapper)
    assert (tap.inputs[0].shape, tap.outputs[0].shape) == ((6, 56), (6, 48))


# Methods


class Int8(LinearMethod):
    """int8 weights with a scale an output, made from floats while they are loaded."""

    finished = 0

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        layer.add_weight("weight", weight, dtype=torch.int8)
        outputs = ShardSpec(shape=weight.shape[:1], made=True)
        layer.add_weight("scale", outputs, dtype=torch.float32)

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        scale = values.float().abs().amax(1).clamp(min=1e-8) / 127
        layer.get_parameter("weight").data[shard.target].copy_((values.float() / scale[:, None]).round())
        layer.get_parameter("scale").data[shard.target[0]].copy_(scale)

    def finish(self, layer: WeightLayer) -> None:
        self.finished += 1

    def weight(self, layer: WeightLayer) -> Tensor:
        rows = len(layer.get_parameter("weight"))
        return layer.get_parameter("weight").float() * layer.get_parameter("scale")[:rows, None]

    def apply(self, layer: WeightLayer, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        y = layer.ops.linear(x, self.weight(layer), bias)
        return y if out is None else out.copy_(y)


def rounded(path: Path, into: Path) -> Path:
    """The same checkpoint with the values that `Int8` stores, but for the head."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "proj" in name:
            scale = tensor.abs().amax(1).clamp(min=1e-8) / 127
            tensors[name] = (tensor / scale[:, None]).round() * scale[:, None]
    into.mkdir()
    save_file(tensors, into / "model.safetensors")
    (into / "config.json").write_text((path / "config.json").read_text())
    return into


def test_a_method_is_chosen_by_what_a_layer_is_and_finishes_once_a_loading(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model")
    seen = dict[str, LayerInfo]()
    methods = list[Int8]()

    def choose(info: LayerInfo) -> LinearMethod | None:
        seen[info.name] = info
        if info.kind != "linear":
            return None
        methods.append(Int8())
        return methods[-1]

    built = build_model(Llama, config_of(path), choose=choose, **PLACE)
    load_weights(built.model, built.config, path, SingleRank())
    assert len(seen) == 3 * 4 + 2
    assert seen["model.embed_tokens"].kind == "embedding"
    assert [method.finished for method in methods] == [1] * 12
    dummy_weights(built.model, 0, SingleRank())
    assert [method.finished for method in methods] == [2] * 12
    qkv = "model.layers.1.self_attn.qkv_proj"
    assert seen[qkv] == LayerInfo(
        name=qkv,
        kind="linear",
        shape=(80, 48),
        parts=(("q", 48), ("k", 16), ("v", 16)),
        parallel="column",
        sources=tuple(f"model.layers.1.self_attn.{part}_proj" for part in "qkv"),
    )
    down = "model.layers.1.mlp.down_proj"
    assert seen[down] == LayerInfo(name=down, kind="linear", shape=(48, 56), parallel="row", sources=(down,))
    head = LayerInfo(name="lm_head", kind="head", shape=(131, 48), parallel="vocabulary", sources=("lm_head",))
    assert seen["lm_head"] == head
    assert built.model.get_submodule(qkv).info is not None


def test_a_method_that_stores_other_values_than_files_hold_equals_its_dequantised_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank; every product goes by it, and its own parameter is nothing that a file must hold."""
    path = tiny_llama(tmp_path / "model")
    want, plain = answer(rounded(path, tmp_path / "rounded")), answer(path)
    monkeypatch.setattr(
        "nanoengine.setup.start.starter.choose_methods",
        lambda *_: lambda info: Int8() if info.kind == "linear" else None,
    )
    got = answer(path)
    assert got[0] == want[0]
    assert got[1] == pytest.approx(want[1], abs=1e-5)
    assert got[1] != pytest.approx(plain[1], abs=1e-5)  # it was used
    assert len(answer(path, load_format="dummy")[0]) == 8


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("place", ["", "text_config"])
def test_quantised_weights_are_refused_by_name_whatever_the_model_reads(key: str, place: str, tmp_path: Path) -> None:
    class ReadsAll(Llama):
        @classmethod
        def read_config(cls, hf: Mapping[str, Any]) -> Any:
            return super().read_config({name: value for name, value in hf.items() if name not in (key, place)})

    hf = config_of(tiny_llama(tmp_path))
    given = {key: {"quant_method": "awq", "bits": 4}}
    hf |= {place: given} if place else given
    with pytest.raises(ModelError, match=rf"config\.json: ({place}\.)?{key} .*quant_method 'awq'.*GGUF"):
        build_model(ReadsAll, hf, **PLACE)


def test_a_model_learns_the_longest_request_of_its_engine(tmp_path: Path) -> None:
    seen = list[int]()

    class Longest(Llama):
        def __init__(self, config: Any, ctx: Any) -> None:
            super().__init__(config, ctx)
            seen.append(ctx.max_model_len)

    hf = config_of(tiny_llama(tmp_path))
    for asked, told in ((None, 256), (64, 64), (999, 256)):  # a larger one is refused later
        build_model(Longest, hf, max_model_len=asked, **PLACE)
        assert seen.pop() == told


@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_a_row_layer_are_joined_along_its_outputs(size: int) -> None:
    random = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*shape, generator=random) for shape in ((3, 8), (2, 8), (4, 8)))
    ranks = Ranks(size)

    def run(rank: int) -> tuple[Tensor, Tensor]:
        tp = ranks.groups[rank]
        ctx = Builder(tp, torch.float32, torch.device("cpu"))
        options: dict[str, Any] = {"parallel": "row", "parts": [("a", 2), ("b", 4)]}
        whole, partial = (ctx.linear(name, 8, 6, reduce=name == "sum", **options) for name in ("sum", "part"))
        for layer in (whole, partial):
            assert isinstance(layer, WeightLayer)
            for shard, values in zip(layer.specs["weight"].shards(rank, size), (a, b), strict=True):
                layer.load_shard("weight", shard, values[shard.source])
        share = x.tensor_split(size, dim=1)[rank]
        return whole(share), partial(share)

    found = ranks.each(run)
    want = torch.cat((x @ a.T, x @ b.T), dim=1)
    torch.testing.assert_close(found[0][0], want)
    torch.testing.assert_close(sum(part for _, part in found), want)
    assert size == 1 or not torch.allclose(found[0][1], want)


def test_shapes_alone_need_no_other_rank() -> None:
    layer = Builder(ShapesOnly(2), torch.float32, torch.device("meta")).linear("x", 8, 6, parallel="row")
    assert isinstance(layer, WeightLayer)
    assert layer.get_parameter("weight").shape == (6, 4)
