"""A mixture of experts in plain torch: which experts a token goes to, and what they make of it. The reference of
`route_triton` and `experts_triton`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoengine.kernels.activation import Activation, act_and_mul
from nanoengine.kernels.linear import linear

Scoring = Literal["softmax", "sigmoid", "softmax_of_top"]

LOWEST = torch.finfo(torch.float32).min
_TINY = 1e-20  # added to a sum of weights, which may have underflowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a token's experts are chosen by its router logits, and what each of them weighs.

    Attributes:
        top_k: experts of a token.
        scoring: "softmax": a score is the softmax over all experts. "sigmoid": of each by itself. "softmax_of_top": the
            softmax over those that are chosen, by their logits (Mixtral, GPT-OSS).
        renormalise: the weights of a token's experts are divided by their sum.
        groups, top_groups: experts are in `groups` equal groups of neighbours, and those of the best `top_groups` are
            eligible. group_best: a group counts for the sum of so many of its best scores: 1 (DeepSeek-V2), or 2
            (DeepSeek-V3).
        scale: factor of the weights.
    """

    top_k: int
    scoring: Scoring = "softmax"
    renormalise: bool = False
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    scale: float = 1.0

    @property
    def by_logits(self) -> bool:
        """Whether logits choose as scores do, where there is no correction: scores rise with them."""
        return self.groups == 1 or self.group_best == 1


@dataclass(frozen=True, slots=True)
class RealTokens:
    """Which tokens of the running step are real: padding has its place in the first block of the KV cache.

    places: int64 [at least T], on the device: where each token is in the cache. first: where the first block ends.
    """

    places: Tensor
    first: int

    def mask(self, count: int) -> Tensor:
        """bool [count]."""
        return self.places[:count] >= self.first


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, H] @ [E, H].T + [E] -> [T, E], summed and kept in float32: rounded logits would tie."""
    return linear(x.float(), weight.float(), None if bias is None else bias.float())


def route(
    logits: Tensor, routing: Routing, correction: Tensor | None = None, real: RealTokens | None = None
) -> tuple[Tensor, Tensor]:
    """The experts of each token, int32 [T, k], the best first, and their weights, float32 [T, k].

    Of equal scores the lower index is chosen first (torch.topk promises no order). A NaN is chosen last, so a token's
    experts differ whatever its logits are. A token that is not real has the expert E, which does not exist, k times,
    with weight 0.

    Args:
        logits: float32 [T, E]. correction: float32 [E], added to the scores for the choice alone (DeepSeek-V3).
    """
    rows, count = logits.shape
    scores = logits
    if routing.scoring != "softmax_of_top":
        scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
    choice = logits if routing.by_logits else scores
    if correction is not None:
        choice = scores + correction
    choice = torch.where(choice.isnan(), LOWEST, choice).clamp_min(LOWEST)
    if routing.groups > 1:
        grouped = choice.view(rows, routing.groups, -1)
        best = grouped.sort(dim=-1, descending=True).values[..., : routing.group_best].sum(-1)
        kept = _best(best, routing.top_groups)
        eligible = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, True)
        choice = grouped.masked_fill(~eligible.unsqueeze(-1), float("-inf")).view(rows, count)
    ids = _best(choice, routing.top_k)
    weights = scores.gather(1, ids)
    if routing.scoring == "softmax_of_top":
        weights = weights.softmax(-1)
    if routing.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    weights = weights * routing.scale
    if real is not None:
        padding = ~real.mask(rows).unsqueeze(1)
        ids, weights = ids.masked_fill(padding, count), weights.masked_fill(padding, 0.0)
    return ids.to(torch.int32), weights


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest along the last dimension, in order; of equal ones the lower first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: Activation = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    first: int = 0,
    add: Tensor | None = None,
) -> Tensor:
    """[T, H] -> [T, H]: of each token the sum over its experts of weight * down(act(gate(x)) * up(x)).

    What an expert makes is rounded to x's dtype; the sum is float32, in the order of `ids`, and rounded once.

    Args:
        ids, weights: [T, k], as `route` returns them. gate_up: [E, 2 I, H], gates in front. down: [E, H, I].
        gate_up_bias: [E, 2 I]. down_bias: [E, H], weighted like the product.
        first: the number of expert 0 here. An expert that is not among the E (another rank's, or none) adds nothing.
        add: [T, H], added last (the residual stream).
    """
    local = ids.long() - first
    local = torch.where((local >= 0) & (local < len(down)), local, len(down))
    multiply = _grouped if x.is_cuda and can_group(gate_up, down) else _looped
    parts = multiply(x, local, gate_up, down, activation, gate_up_bias, down_bias)
    y = (parts.float() * weights.masked_fill(local == len(down), 0.0).unsqueeze(-1)).sum(1)
    return (y if add is None else y + add.float()).to(x.dtype)


def can_group(gate_up: Tensor, down: Tensor) -> bool:
    """Whether torch has a grouped product on a GPU that does not wait for it."""
    aligned = all(size % 8 == 0 for size in (*gate_up.shape[1:], *down.shape[1:]))
    return gate_up.dtype == torch.bfloat16 and aligned


def _looped(
    x: Tensor,
    local: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """What each token's experts make of it, [T, k, H], zero where there is none; expert by expert. It waits for a GPU,
    so no graph holds it."""
    order, counts = sorted_pairs(local, len(down))
    parts = x.new_zeros(local.numel(), down.shape[1])
    for expert, pairs in enumerate(torch.split(order, counts.tolist())[: len(down)]):
        if len(pairs):
            inner = linear(x[pairs // local.shape[1]], gate_up[expert], _of(gate_up_bias, expert))
            parts[pairs] = linear(act_and_mul(inner, activation), down[expert], _of(down_bias, expert))
    return parts.view(*local.shape, -1)


def _grouped(
    x: Tensor,
    local: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """`_looped` by grouped products: nothing waits for the device where `can_group`."""
    order, counts = sorted_pairs(local, len(down))
    owner = local.flatten()[order]
    ends = counts[:-1].cumsum(0).to(torch.int32)
    inner = F.grouped_mm(x[order // local.shape[1]], gate_up.transpose(1, 2), offs=ends)
    known = owner.clamp_max(len(down) - 1)
    inner = inner if gate_up_bias is None else inner + gate_up_bias[known]
    outer = F.grouped_mm(act_and_mul(inner, activation), down.transpose(1, 2), offs=ends)
    outer = outer if down_bias is None else outer + down_bias[known]
    outer = outer.masked_fill((owner == len(down)).unsqueeze(-1), 0.0)  # behind the last expert nothing was written
    return torch.empty_like(outer).index_copy_(0, order, outer).view(*local.shape, -1)


def sorted_pairs(local: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pairs (token * k + place) by expert, and how many each has, int64 [count + 1]; the last are those of none."""
    flat = local.flatten()
    counts = (flat.unsqueeze(0) == torch.arange(count + 1, device=flat.device).unsqueeze(1)).sum(1)
    return flat.argsort(stable=True), counts


def _of(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]
