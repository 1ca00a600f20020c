"""MLPs of experts: a router, the experts that it chooses for each token, and experts that all tokens share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.api import BuildContext, ExpertsInfo, ModelError, Norm, ShardSpec, WeightLayer, WeightMap, WeightRule
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.experts import Routing
from nanoengine.layers.block import After, Sublayer
from nanoengine.layers.decoder import ACTIVATIONS, DECODER_WEIGHTS, DecoderConfig, DecoderLM
from nanoengine.layers.hf_config import Fields
from nanoengine.layers.mlp import GatedMLP

__all__ = [
    "MoEConfig",
    "MoEDecoderLM",
    "Router",
    "Routing",
    "SharedExperts",
    "SparseMLP",
    "moe_weights",
    "read_experts_info",
    "read_sparse_layers",
]


def moe_weights(
    *,
    block: str = "mlp",
    router: str = "gate",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    transposed: bool = False,
    interleaved: bool = False,
) -> WeightMap:
    """The map of a decoder with experts: `DECODER_WEIGHTS`, with rules for the block that has the experts.

    Args:
        block, router, gate, up, down: names in files: of the block, of its router, of the products of each expert.
        transposed, interleaved: of files that stack the experts of a layer, as transformers 5 does: their weights are
            [experts, in, out]; outputs of gate and up take turns.
    """
    rules = dict(DECODER_WEIGHTS.rules)
    if not transposed and not interleaved:  # else files stack them
        rules |= {
            f"{block}.experts.{{}}.{gate}": WeightRule("mlp.experts.gate_up_proj", "gate"),
            f"{block}.experts.{{}}.{up}": WeightRule("mlp.experts.gate_up_proj", "up"),
            f"{block}.experts.{{}}.{down}": WeightRule("mlp.experts.down_proj"),
        }
    for name, turns in (("mlp.experts.gate_up_proj", interleaved), ("mlp.experts.down_proj", False)):
        parts = ("gate", "up") if turns else ()
        rules[name] = WeightRule(f"{name}.weight", parts, transpose=transposed, interleaved=turns)
        rules[f"{name}_bias"] = WeightRule(f"{name}.bias", parts, interleaved=turns)
    if (found := f"{block}.{router}") != "mlp.gate":
        rules[found] = "mlp.gate"
    return replace(DECODER_WEIGHTS, rules=rules)


class Router(WeightLayer):
    """What chooses each token's experts: a product in float32, whole on every rank.

    Args:
        bias: of the logits. correction: a parameter `e_score_correction_bias`, added to the scores for the choice.
    """

    weight: Tensor
    bias: Tensor | None
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        name: str,
        sizes: ExpertsInfo,
        routing: Routing,
        ctx: BuildContext,
        *,
        bias: bool = False,
        correction: bool = False,
    ) -> None:
        super().__init__(ctx, name)
        check_routing(name, routing, sizes.num_experts)
        self.routing, self.step = routing, ctx.step
        self.add_weight("weight", ShardSpec(shape=(sizes.num_experts, sizes.hidden_size)))
        if bias:
            self.add_weight("bias", ShardSpec(shape=(sizes.num_experts,), init="zeros"))
        else:
            self.register_parameter("bias", None)
        if correction:
            spec = ShardSpec(shape=(sizes.num_experts,), init="zeros")
            self.add_weight("e_score_correction_bias", spec, dtype=torch.float32)
        else:
            self.register_parameter("e_score_correction_bias", None)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[T, hidden] -> experts int32 [T, k] and their weights float32 [T, k]: see `Ops.route`."""
        return self._choose(self.ops.router(hidden, self.weight, self.bias))

    def normed(self, norm: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The router after a norm -> (normalised, residual stream, experts, weights)."""
        if not norm.rms or self._forward_hooks or self._forward_pre_hooks:
            hidden, stream = norm.add(x, residual)
            return hidden, stream, *self(hidden)
        hidden, stream, logits = self.ops.norm_router(x, residual, norm.weight, norm.eps, self.weight, self.bias)
        return hidden, stream, *self._choose(logits)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.route(logits, self.routing, self.e_score_correction_bias, self.step.real)


def check_routing(name: str, routing: Routing, experts: int) -> None:
    """Raises `ModelError` for a routing that `experts` experts cannot have."""
    groups, best, top = routing.groups, routing.group_best, routing.top_groups
    if not 1 <= routing.top_k <= experts:
        raise ModelError(f"{name}: a token cannot have {routing.top_k} of {experts} experts (num_experts_per_tok)")
    if groups < 1 or experts % groups:
        raise ModelError(f"{name}: {experts} experts cannot be in {groups} equal groups (n_group)")
    size = experts // groups
    if not 1 <= top <= groups or not 1 <= best <= size:
        raise ModelError(
            f"{name}: there are no {top} groups (topk_group) with {best} experts each among {groups} of {size}"
        )
    if groups > 1 and routing.top_k > top * size:
        raise ModelError(f"{name}: {top} groups of {size} experts (topk_group) are fewer than {routing.top_k} experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExperts:
    """A gated MLP that every token goes to, beside its experts.

    Attributes:
        width: of its gate and up. name: of the module, as in checkpoints. bias: its products have one.
        gated: its result is multiplied by the sigmoid of a linear layer, `{name}_gate`.
    """

    width: int
    name: str = "shared_experts"
    gated: bool = False
    bias: bool = False


class SparseMLP(Sublayer):
    """Experts in place of an MLP. `name` is its dotted path in the model; the router is `gate`.

    The parts of ranks, those of the shared experts among them, are summed at once.
    """

    def __init__(
        self,
        name: str,
        sizes: ExpertsInfo,
        routing: Routing,
        ctx: BuildContext,
        *,
        router_bias: bool = False,
        correction: bool = False,
        shared: SharedExperts | None = None,
    ) -> None:
        super().__init__()
        self.tp, self.ops, self.hidden_size = ctx.tp, ctx.ops, sizes.hidden_size
        self.gate = Router(f"{name}.gate", sizes, routing, ctx, bias=router_bias, correction=correction)
        self.experts = ctx.experts(f"{name}.experts", sizes)
        self.shared = shared
        if shared is not None:
            made = GatedMLP(
                f"{name}.{shared.name}", sizes.hidden_size, shared.width, ctx,
                activation=sizes.activation, bias=shared.bias, reduce=False,
            )  # fmt: skip
            self.add_module(shared.name, made)
            if shared.gated:
                self.add_module(f"{shared.name}_gate", ctx.linear(f"{name}.{shared.name}_gate", sizes.hidden_size, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        ids, weights = self.gate(hidden)
        return self.tp.all_reduce(self.experts(hidden, ids, weights, add=self._shared(hidden)))

    def joined(
        self, norm: Norm | None, x: Tensor, residual: Tensor | None, *rest: Any, after: After | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if norm is None:
            return super().joined(norm, x, residual, after=after)
        hidden, stream, ids, weights = self.gate.normed(norm, x, residual)
        shared = self._shared(hidden)
        if after is not None:
            return after(self.tp.all_reduce(self.experts(hidden, ids, weights, add=shared))), stream
        if self.tp.size > 1:
            out = self.tp.partial_sum(len(hidden), self.hidden_size, hidden.dtype)
            return self.tp.all_reduce_add(self.experts(hidden, ids, weights, add=shared, out=out), stream)
        if shared is None:
            return self.experts(hidden, ids, weights, add=stream), None
        return self.experts(hidden, ids, weights, add=shared), stream

    def _shared(self, hidden: Tensor) -> Tensor | None:
        """This rank's part of what the shared experts make; None: there are none."""
        if self.shared is None:
            return None
        out: Tensor = getattr(self, self.shared.name)(hidden)
        if self.shared.gated:
            out = out * torch.sigmoid(getattr(self, f"{self.shared.name}_gate")(hidden))
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig(DecoderConfig):
    """A decoder with experts in place of the MLP of some layers, or of all.

    Attributes:
        experts, routing: of each such layer. sparse: for each layer whether it has experts; (): all have.
        shared: experts that all tokens share; None: there are none.
        router_bias, correction: see `Router`.
    """

    experts: ExpertsInfo
    routing: Routing
    sparse: tuple[bool, ...] = ()
    shared: SharedExperts | None = None
    router_bias: bool = False
    correction: bool = False


class MoEDecoderLM(DecoderLM):
    """A decoder with experts. A subclass reads its config.json into a `MoEConfig`."""

    weights = moe_weights()

    def make_mlp(self, name: str, index: int, config: Any, ctx: BuildContext) -> nn.Module:
        if config.sparse and not config.sparse[index]:
            return super().make_mlp(name, index, config, ctx)
        return SparseMLP(
            name,
            config.experts,
            config.routing,
            ctx,
            router_bias=config.router_bias,
            correction=config.correction,
            shared=config.shared,
        )


def read_experts_info(
    fields: Fields, intermediate_size: int, *, activation: Activation | None = None, bias: bool = False
) -> ExpertsInfo:
    """`ExpertsInfo` from config.json; files have `num_experts`, or `num_local_experts`, which transformers writes.

    Args:
        intermediate_size: of an expert. activation: of gates; None: that of `hidden_act`. bias: gate, up and down have
            one.
    """
    given = {name: fields.int(name) for name in ("num_experts", "num_local_experts") if fields.has(name)}
    written = {name: value for name, value in given.items() if name in fields.data} or given
    if len(set(written.values())) > 1:
        raise ModelError(f"config.json: {' and '.join(f'{fields.prefix}{n} {v}' for n, v in written.items())} differ")
    return ExpertsInfo(
        num_experts=next(iter(written.values())) if written else fields.int("num_local_experts"),
        hidden_size=fields.int("hidden_size"),
        intermediate_size=intermediate_size,
        activation=activation or ACTIVATIONS[fields.choice("hidden_act", tuple(ACTIVATIONS))],
        bias=bias,
    )


def read_sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """For each layer whether it has experts, by `decoder_sparse_step` and `mlp_only_layers` (Qwen)."""
    step, dense = fields.int("decoder_sparse_step"), fields.ints("mlp_only_layers", ())
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(fields.int("num_hidden_layers")))
