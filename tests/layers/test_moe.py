"""Routers, experts over ranks, and MLPs of experts against the blocks of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from nanoengine.api import (
    Experts,
    ExpertsInfo,
    ExpertsMethod,
    LayerInfo,
    LinearMethod,
    Model,
    ModelConfig,
    ModelError,
    Shard,
    ShardSpec,
    WeightLayer,
    WeightMap,
    WeightsError,
)
from nanoengine.api.parallel import ShapesOnly, SingleRank, TensorParallelGroup
from nanoengine.build import inspect_model
from nanoengine.kernels.experts import RealTokens
from nanoengine.layers.experts import UnquantisedExperts
from nanoengine.layers.hf_config import Fields
from nanoengine.layers.linear import Unquantised
from nanoengine.layers.moe import Routing, SharedExperts, SparseMLP, moe_weights, read_experts_info, read_sparse_layers
from nanoengine.layers.norm import LayerNorm, RMSNorm
from nanoengine.params.engine_options import EngineOptions
from nanoengine.plugins.models.qwen2_moe import Qwen2MoE
from nanoengine.plugins.models.qwen3_moe import Qwen3MoE
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.start.build_model import Builder, build_model
from nanoengine.setup.start.weights import dummy_weights, load_weights
from nanoengine.testing.conformance.ranks import Ranks

CPU = torch.device("cpu")
HIDDEN, WIDTH, EXPERTS = 24, 20, 8
TOKENS = 33


@dataclass(frozen=True)
class Family:
    """A block of transformers, and what it is here."""

    kind: str
    block: str
    routing: Routing
    fields: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    weights: WeightMap = field(default_factory=moe_weights)

    @property
    def sizes(self) -> ExpertsInfo:
        return ExpertsInfo(num_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH, **self.info)

    def reference(self) -> nn.Module:
        """With random weights, of which each shows."""
        torch.manual_seed(3)
        config = AutoConfig.for_model(
            self.kind,
            **{
                "hidden_size": HIDDEN, "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH,
                "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS,
                "num_attention_heads": 4, **self.fields,
            },
        )  # fmt: skip
        name = f"transformers.models.{self.kind}.modeling_{self.kind}"
        config._experts_implementation = "eager"
        made = getattr(import_module(name), self.block)(config).eval()
        for each in (*made.parameters(), *made.buffers()):
            nn.init.normal_(each, std=0.3)
        return made


SIGMOID = {"scoring": "sigmoid", "groups": 4, "top_groups": 2, "group_best": 2, "scale": 2.5}
FAMILIES = {
    "qwen3-moe": Family("qwen3_moe", "Qwen3MoeSparseMoeBlock", Routing(top_k=3), {"num_experts_per_tok": 3}),
    "qwen3-moe, renormalised": Family(
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        Routing(top_k=3, renormalise=True),
        {"num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "mixtral": Family(
        "mixtral", "MixtralSparseMoeBlock", Routing(top_k=2, scoring="softmax_of_top"), {"num_experts_per_tok": 2}
    ),
    "qwen2-moe": Family(
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        Routing(top_k=4),
        {"num_experts_per_tok": 4, "shared_expert_intermediate_size": 28},
        {"shared": SharedExperts(width=28, name="shared_expert", gated=True)},
    ),
    "deepseek-v2": Family(
        "deepseek_v2",
        "DeepseekV2Moe",
        Routing(top_k=3, groups=4, top_groups=2, scale=16.0),
        {
            "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
            "topk_method": "group_limited_greedy", "n_shared_experts": 2,
        },
        {"shared": SharedExperts(width=2 * WIDTH)},
    ),
    "deepseek-v2, greedy": Family(
        "deepseek_v2",
        "DeepseekV2Moe",
        Routing(top_k=3),
        {"num_experts_per_tok": 3, "topk_method": "greedy", "routed_scaling_factor": 1.0, "n_shared_experts": 1},
        {"shared": SharedExperts(width=WIDTH)},
    ),
    "deepseek-v3": Family(
        "deepseek_v3",
        "DeepseekV3MoE",
        Routing(top_k=3, renormalise=True, **SIGMOID),
        {
            "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
            "norm_topk_prob": True, "n_shared_experts": 1,
        },
        {"shared": SharedExperts(width=WIDTH), "correction": True},
    ),
    "glm-4": Family(
        "glm4_moe",
        "Glm4MoeMoE",
        Routing(top_k=2, scoring="sigmoid", group_best=2),
        {
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
            "norm_topk_prob": False, "n_shared_experts": 1,
        },
        {"shared": SharedExperts(width=WIDTH), "correction": True},
    ),
    "gpt-oss": Family(
        "gpt_oss",
        "GptOssMLP",
        Routing(top_k=3, scoring="softmax_of_top"),
        {"num_experts_per_tok": 3},
        {"router_bias": True},
        {"activation": "swiglu_clamped", "bias": True},
        moe_weights(router="router", transposed=True, interleaved=True),
    ),
}  # fmt: skip


class Block(Model):
    """A model that is one such MLP."""

    def __init__(self, family: Family, ctx: Builder) -> None:
        nn.Module.__init__(self)
        self.map = family.weights
        self.mlp = SparseMLP("mlp", family.sizes, family.routing, ctx, **family.options)

    @classmethod
    def read_config(cls, hf: Any) -> ModelConfig:
        raise NotImplementedError

    def weight_map(self, config: Any) -> WeightMap:  # type: ignore[override]
        return self.map

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


def built(family: Family, tp: TensorParallelGroup | None = None, **options: Any) -> tuple[Block, Builder]:
    ctx = Builder(tp or SingleRank(), torch.float32, CPU, weights=family.weights, **options)
    return Block(family, ctx), ctx


def loaded(family: Family, reference: nn.Module, tp: TensorParallelGroup, **options: Any) -> Block:
    block, _ = built(family, tp, **options)
    tensors = {f"mlp.{name}": tensor for name, tensor in reference.state_dict().items()}
    load_weights(block, None, tensors.items(), tp)
    return block


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def answer(reference: nn.Module, x: Tensor) -> Tensor:
    found = reference(x.unsqueeze(0))
    return (found[0] if isinstance(found, tuple) else found).view(x.shape)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("ranks", "whole"), [(1, False), (2, False), (4, True)])
def test_a_block_is_that_of_transformers(name: str, ranks: int, whole: bool) -> None:
    """Also with the shares of ranks summed, by width or with whole experts."""
    family = FAMILIES[name]
    reference, x = family.reference(), tokens()
    want = answer(reference, x)
    assert want.std() > 0.05
    group = Ranks(ranks)
    with torch.inference_mode():
        blocks = [loaded(family, reference, tp, expert_parallel=whole) for tp in group.groups]
        got = group.each(lambda rank: blocks[rank].mlp(x))
    for each in got:
        torch.testing.assert_close(each, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen2-moe"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_joined_is_norm_block_and_sum(name: str, ranks: int, kind: Any) -> None:
    """With and without a residual so far, and with something done to the result first."""
    family, x, residual = FAMILIES[name], tokens(), tokens().flip(0)
    reference, group = family.reference(), Ranks(ranks)

    @torch.inference_mode()
    def run(rank: int) -> None:
        tp = group.groups[rank]
        block, ctx = built(family, tp)
        block = loaded(family, reference, tp)
        norm = kind(HIDDEN, 1e-6, place=ctx)
        norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
        for before in (residual, None):
            hidden, stream = norm.add(x, before)
            plain = block.mlp(hidden)
            y, rest = block.mlp.joined(norm, x, before)
            torch.testing.assert_close(y if rest is None else y + rest, plain + stream, rtol=1e-5, atol=1e-5)
            y, rest = block.mlp.joined(norm, x, before, after=lambda out: out * 3.0)
            torch.testing.assert_close(y + rest, 3.0 * plain + stream, rtol=1e-5, atol=1e-5)
        y, rest = block.mlp.joined(None, x, residual)
        torch.testing.assert_close(y + rest, block.mlp(x + residual) + x + residual, rtol=1e-5, atol=1e-5)

    group.each(run)


def test_ranks_sum_once_with_the_shared_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    family, x, group = FAMILIES["qwen2-moe"], tokens(3), Ranks(2)
    reference, sums = family.reference(), []
    original = type(group.groups[0]).all_reduce
    monkeypatch.setattr(type(group.groups[0]), "all_reduce", lambda tp, x: (sums.append(tp.rank), original(tp, x))[1])
    blocks = [loaded(family, reference, tp) for tp in group.groups]
    with torch.inference_mode():
        group.each(lambda rank: blocks[rank].mlp(x))
    assert sorted(sums) == [0, 1]


def test_padding_goes_nowhere() -> None:
    """By the engine's buffer, whatever its hidden states are; also the shared experts' NaN stays with its token."""
    family = FAMILIES["qwen2-moe"]
    block, ctx = built(family)
    dummy_weights(block, 0, SingleRank())
    x = tokens(6)
    with torch.inference_mode():
        want = block.mlp(x)
        x[[1, 4]] = float("nan")
        ids, weights = block.mlp.gate(x)
        assert weights[1].isnan().all()
        ctx.step.real = RealTokens(torch.tensor([4, 0, 5, 9, 3, 7, 0]), 4)
        ids, weights = block.mlp.gate(x)
        assert ids[[1, 4]].unique().tolist() == [EXPERTS]
        assert weights[[1, 4]].count_nonzero() == 0
        assert block.mlp.experts(x, ids, weights)[[1, 4]].count_nonzero() == 0
        kept = [0, 2, 3, 5]
        torch.testing.assert_close(block.mlp(x)[kept], want[kept])


# What ranks hold, and what chooses a method sees


@pytest.mark.parametrize(
    ("whole", "shapes"),
    [
        (False, {"gate_up_proj.weight": (8, 10, 24), "gate_up_proj.bias": (8, 10), "down_proj.weight": (8, 24, 5),
                 "down_proj.bias": (8, 24)}),
        (True, {"gate_up_proj.weight": (2, 40, 24), "gate_up_proj.bias": (2, 40), "down_proj.weight": (2, 24, 20),
                "down_proj.bias": (2, 24)}),
    ],
)  # fmt: skip
def test_what_a_rank_holds(whole: bool, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for tp in Ranks(4).groups:
        block, _ = built(FAMILIES["gpt-oss"], tp, expert_parallel=whole)
        experts = block.mlp.experts
        assert {name: tuple(each.shape) for name, each in experts.named_parameters()} == shapes
        assert experts.first == (2 * tp.rank if whole else 0)
        assert (experts.down_bias is None) == (not whole and tp.rank > 0)


@pytest.mark.parametrize("whole", [False, True])
def test_dummy_weights_are_slices_of_one_model(whole: bool) -> None:
    one, _ = built(FAMILIES["gpt-oss"])
    dummy_weights(one, 0, SingleRank())
    whole_weights = dict(one.named_parameters())
    for tp in Ranks(2).groups:
        block, _ = built(FAMILIES["gpt-oss"], tp, expert_parallel=whole)
        dummy_weights(block, 0, tp)
        for name, layer in (
            ("gate_up_proj", block.mlp.experts.gate_up_proj),
            ("down_proj", block.mlp.experts.down_proj),
        ):
            for own, spec in layer.specs.items():
                full = whole_weights[f"mlp.experts.{name}.{own}"]
                parts, offset = [], 0
                for shard in spec.shards(tp.rank, 2):
                    size = shard.shape[spec.joined]
                    parts.append(full.narrow(spec.joined, offset, size)[shard.source])
                    offset += size
                assert torch.equal(layer.get_parameter(own), torch.cat(parts, spec.joined))


def per_expert(reference: nn.Module) -> dict[str, Tensor]:
    """As the hub's files have them: a tensor for each expert and product."""
    found = {}
    for name, tensor in reference.state_dict().items():
        if name == "experts.gate_up_proj":
            for e in range(EXPERTS):
                gate, up = tensor[e].chunk(2)
                found |= {f"mlp.experts.{e}.gate_proj.weight": gate, f"mlp.experts.{e}.up_proj.weight": up}
        elif name == "experts.down_proj":
            found |= {f"mlp.experts.{e}.down_proj.weight": tensor[e] for e in range(EXPERTS)}
        else:
            found[f"mlp.{name}"] = tensor
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_files_with_a_tensor_for_each_expert(whole: bool) -> None:
    family = FAMILIES["qwen3-moe"]
    reference = family.reference()
    for tp in Ranks(2).groups:
        block, _ = built(family, tp, expert_parallel=whole)
        load_weights(block, None, per_expert(reference).items(), tp)
        same = loaded(family, reference, tp, expert_parallel=whole)
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, same.get_parameter(name))


def test_what_is_missing_is_named_expert_by_expert() -> None:
    family = FAMILIES["qwen3-moe"]
    tensors = per_expert(family.reference())
    del tensors["mlp.experts.5.up_proj.weight"]
    tensors["mlp.experts.8.up_proj.weight"] = tensors["mlp.experts.4.up_proj.weight"]
    with pytest.raises(WeightsError, match=r"mlp\.experts\.5\.up_proj\.weight") as caught:
        load_weights(built(family)[0], None, tensors.items(), SingleRank())
    assert "mlp.experts.8.up_proj.weight" in str(caught.value)
    with pytest.raises(WeightsError, match=r"3 missing: .*mlp\.experts\.\{\}\.gate_proj\.weight"):
        load_weights(built(family)[0], None, {"mlp.gate.weight": tensors["mlp.gate.weight"]}.items(), SingleRank())


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (False, r"mlp\.experts: experts of width 20 cannot be divided over .*=3 ranks.*enable_expert_parallel=true"),
        (True, r"mlp\.experts: 8 experts cannot be divided over .*=3 ranks.*enable_expert_parallel"),
    ],
)
def test_what_cannot_be_divided_names_the_other_way(whole: bool, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        built(FAMILIES["mixtral"], ShapesOnly(3), expert_parallel=whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "a token cannot have 9 of 8 experts"),
        ({"top_k": 0}, "a token cannot have 0 of 8 experts"),
        ({"groups": 3}, "8 experts cannot be in 3 equal groups"),
        ({"groups": 4, "top_groups": 5}, "there are no 5 groups"),
        ({"groups": 4, "top_groups": 2, "group_best": 3}, "with 3 experts each among 4 of 2"),
        ({"top_k": 5, "groups": 4, "top_groups": 2}, "2 groups of 2 experts .* are fewer than 5"),
    ],
)
def test_a_routing_that_cannot_be(changes: Mapping[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=rf"mlp\.gate: .*{message}"):
        built(Family("qwen3_moe", "", Routing(**{"top_k": 2, **changes})))


class Int8Experts(ExpertsMethod):
    """int8 weights with a scale an output, made from floats while they are loaded."""

    def __init__(self) -> None:
        self.finished: list[str] = []

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        layer.add_weight("weight", weight, dtype=torch.int8)
        local = weight.local_shape(layer.tp.rank, layer.tp.size)[:2]
        layer.add_weight("scale", ShardSpec(shape=local, made=True), dtype=torch.float32)

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        scale = values.float().abs().amax(-1).clamp(min=1e-8) / 127
        layer.get_parameter("weight").data[shard.target].copy_((values.float() / scale.unsqueeze(-1)).round())
        layer.get_parameter("scale").data[shard.target[:2]].copy_(scale)

    def finish(self, layer: WeightLayer) -> None:
        self.finished.append(layer.name)

    def apply(
        self, experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, *, add: Any = None, out: Any = None
    ) -> Tensor:
        both = [
            layer.get_parameter("weight").float() * layer.get_parameter("scale").unsqueeze(-1)
            for layer in (experts.gate_up_proj, experts.down_proj)
        ]
        return experts.gate_up_proj.ops.experts(x, ids, weights, *both, first=experts.first, add=add, out=out)


@pytest.mark.parametrize(("ranks", "whole"), [(1, False), (2, True)])
def test_a_method_is_chosen_by_what_the_experts_are(ranks: int, whole: bool) -> None:
    """And equals its own dequantised model."""
    family, x, seen = FAMILIES["qwen3-moe"], tokens(), list[LayerInfo]()
    methods, group = list[Int8Experts](), Ranks(ranks)

    def choose(info: LayerInfo) -> LinearMethod | ExpertsMethod | None:
        seen.append(info)
        methods.append(Int8Experts())
        return methods[-1]

    reference = family.reference()
    with torch.inference_mode():
        blocks = [loaded(family, reference, tp, choose=choose, expert_parallel=whole) for tp in group.groups]
        got = group.each(lambda rank: blocks[rank].mlp(x))[0]
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(reference.experts, name).data
            scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
            weight.copy_((weight / scale).round() * scale)
    assert seen[0] == LayerInfo(
        name="mlp.experts",
        kind="experts",
        shape=(EXPERTS, 2 * WIDTH, HIDDEN),
        parts=(("gate", WIDTH), ("up", WIDTH), ("down", HIDDEN)),
        parallel="experts" if whole else "width",
        sources=tuple(f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")),
    )
    assert all(sorted(each.finished) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"] for each in methods)
    assert len(methods) == ranks
    torch.testing.assert_close(got, answer(reference, x), rtol=1e-5, atol=1e-5)
    plain = family.reference()
    assert (got - answer(plain, x)).abs().max() > 1e-4  # it was used


def test_a_method_of_another_kind_of_layer_is_refused() -> None:
    family = FAMILIES["qwen2-moe"]
    with pytest.raises(ModelError, match=r"mlp\.experts: .*Unquantised is not a nanoengine\.api\.ExpertsMethod"):
        built(family, choose=lambda info: Unquantised() if info.kind == "experts" else None)
    with pytest.raises(ModelError, match=r"gate_up_proj: .*UnquantisedExperts is not a nanoengine\.api\.LinearMethod"):
        built(family, choose=lambda info: UnquantisedExperts() if info.kind == "linear" else None)


# config.json

QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN15_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
    "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
    "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(("config", "billions"), [(QWEN3_30B_A3B, 30.5), (QWEN15_MOE, 14.3)])
def test_every_key_of_the_hubs_files_is_read(config: Mapping[str, Any], billions: float, tmp_path: Path) -> None:
    """In their own sizes, which take no memory; the parameters are as many as the models' names and pages say."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert list(inspect_model(tmp_path, EngineOptions(device="cpu"), discover()).unread) == []
    cls = {"qwen3_moe": Qwen3MoE, "qwen2_moe": Qwen2MoE}[config["model_type"]]
    model = build_model(cls, config, tp=SingleRank(), dtype=torch.bfloat16, device="meta").model
    assert sum(each.numel() for each in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"num_experts": 6}, 6),
        ({"num_local_experts": 5}, 5),
        ({}, 128),
        ({"num_experts": 4, "num_local_experts": 4}, 4),
    ],
)
def test_both_names_of_their_number(given: Mapping[str, int], count: int) -> None:
    fields = Fields({"hidden_size": 8, "hidden_act": "silu", **given}, defaults={"num_experts": 128})
    assert read_experts_info(fields, 4).num_experts == count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_experts": 6, "num_local_experts": 5}, "num_experts 6 and num_local_experts 5 differ"),
        ({"num_experts": 0}, "num_experts must be a positive integer"),
        ({"num_experts": 1 << 20}, "num_experts must be at most 4096"),
    ],
)
def test_a_number_of_experts_that_cannot_be(given: Mapping[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_experts_info(Fields({"hidden_size": 8, "hidden_act": "silu", **given}), 4)


def test_which_layers_have_experts() -> None:
    def layers(**given: Any) -> list[int]:
        fields = Fields({"num_hidden_layers": 6, "decoder_sparse_step": 1, **given})
        return [i for i, sparse in enumerate(read_sparse_layers(fields)) if sparse]

    assert layers() == layers(mlp_only_layers=None) == [0, 1, 2, 3, 4, 5]
    assert layers(mlp_only_layers=[0, 3, 9]) == [1, 2, 4, 5]
    assert layers(decoder_sparse_step=2) == [1, 3, 5]
    assert layers(decoder_sparse_step=3, mlp_only_layers=[2]) == [5]
    for wrong in ("none", [1.0], [True]):
        with pytest.raises(ModelError, match="mlp_only_layers must be a list of integers of 0 or more"):
            layers(mlp_only_layers=wrong)
