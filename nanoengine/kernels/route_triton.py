"""`experts.route` in Triton, one program a token, and the router's product behind a norm, for a few tokens."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.experts import RealTokens, Routing
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

MAX_NORM_ROWS = 4  # each program repeats the norm
_HELD_BYTES = 16384  # of the router's weight, in a program

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # `experts.LOWEST`
_TINY = tl.constexpr(1e-20)


@triton.jit
def _in_order(values):
    """int32 that are in the order of float32 without NaN. A warp finds the highest of integers in one instruction."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)  # -0.0 is as high as 0.0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _ranks(keys, lanes, COUNT: tl.constexpr):
    """The place of each of the `COUNT` highest of a vector, of equal ones the first in front; COUNT for the others."""
    ranks = tl.zeros_like(keys) + COUNT
    for place in tl.static_range(COUNT):
        best = tl.max(keys, axis=0)
        taken = lanes == tl.min(tl.where(keys == best, lanes, 0x7FFFFFFF), axis=0)
        ranks = tl.where(taken, place, ranks)
        keys = tl.where(taken, -0x80000000, keys)  # below the key of -inf
    return ranks


@triton.jit
def _eligible(choice, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, TOP: tl.constexpr,
              BEST: tl.constexpr):  # fmt: skip
    """[BLOCK_G, BLOCK_S], -inf in all groups but the best `TOP`."""
    group = tl.arange(0, BLOCK_G)
    rest, total = choice, tl.zeros((BLOCK_G,), tl.float32)
    inside = tl.arange(0, BLOCK_S)[None, :]
    for _ in tl.static_range(BEST):
        best, at = tl.max(rest, axis=1, return_indices=True, return_indices_tie_break_left=True)
        total += best
        rest = tl.where(inside == at[:, None], float("-inf"), rest)
    total = tl.where(group < GROUPS, tl.maximum(total, _LOWEST), float("-inf"))
    kept = _ranks(_in_order(total), group, TOP) < TOP
    return tl.where(kept[:, None], choice, float("-inf"))


@triton.jit
def _route_kernel(
    logits_ptr, correction_ptr, places_ptr, ids_ptr, weights_ptr, first_place, scale,
    E: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, TOP_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr, TOP_K: tl.constexpr, SCORING: tl.constexpr,
    RENORMALISE: tl.constexpr, HAS_CORRECTION: tl.constexpr, HAS_PLACES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = E // GROUPS
    group, inside = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_S)[None, :]
    expert, mask = group * size + inside, (group < GROUPS) & (inside < size)
    release_dependents(PDL)
    if HAS_CORRECTION:
        correction = tl.load(correction_ptr + expert, mask=mask, other=0.0)
    wait_for_inputs(PDL)
    logits = tl.load(logits_ptr + t * E + expert, mask=mask, other=float("-inf"))
    scores = logits
    if SCORING == "softmax":
        scores = tl.exp(logits - tl.max(tl.max(logits, axis=1), axis=0))
        scores = scores / tl.sum(tl.sum(scores, axis=1), axis=0)
    if SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = logits if GROUPS == 1 or GROUP_BEST == 1 else scores
    if HAS_CORRECTION:
        choice = scores + correction
    choice = tl.where(choice == choice, tl.maximum(choice, _LOWEST), _LOWEST)
    choice = tl.where(mask, choice, float("-inf"))
    if GROUPS > 1:
        choice = _eligible(choice, GROUPS, BLOCK_G, BLOCK_S, TOP_GROUPS, GROUP_BEST)
    lanes: tl.constexpr = BLOCK_G * BLOCK_S
    choice, scores = tl.reshape(choice, (lanes,)), tl.reshape(scores, (lanes,))
    place = _ranks(_in_order(choice), tl.arange(0, lanes), TOP_K)
    chosen = place < TOP_K
    weights = tl.where(chosen, scores, 0.0)
    if SCORING == "softmax_of_top":
        weights = tl.where(chosen, tl.exp(scores - tl.max(tl.where(chosen, scores, float("-inf")), axis=0)), 0.0)
        weights = weights / tl.sum(weights, axis=0)
    if RENORMALISE:
        weights = weights / (tl.sum(weights, axis=0) + _TINY)
    weights *= scale
    ids = tl.reshape(expert, (lanes,))
    if HAS_PLACES:
        real = tl.load(places_ptr + t) >= first_place
        ids, weights = tl.where(real, ids, E), tl.where(real, weights, 0.0)
    tl.store(ids_ptr + t * TOP_K + place, ids, mask=chosen)
    tl.store(weights_ptr + t * TOP_K + place, weights, mask=chosen)


def route(
    logits: Tensor, routing: Routing, correction: Tensor | None = None, real: RealTokens | None = None
) -> tuple[Tensor, Tensor]:
    """As `experts.route`."""
    rows, count = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous(), (logits.dtype, logits.stride())
    ids = torch.empty(rows, routing.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, routing.top_k, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return ids, weights
    groups = triton.next_power_of_2(routing.groups)
    size = triton.next_power_of_2(count // routing.groups)
    _route_kernel[(rows,)](
        logits, logits if correction is None else correction, logits if real is None else real.places, ids, weights,
        0 if real is None else real.first, routing.scale,
        E=count, GROUPS=routing.groups, BLOCK_G=groups, BLOCK_S=size, TOP_GROUPS=routing.top_groups,
        GROUP_BEST=routing.group_best, TOP_K=routing.top_k, SCORING=routing.scoring,
        RENORMALISE=routing.renormalise, HAS_CORRECTION=correction is not None, HAS_PLACES=real is not None,
        num_warps=1 if groups * size <= 256 else 4, **pdl_options(logits),
    )  # fmt: skip
    return ids, weights


@triton.jit
def _norm_router_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, weight_ptr, bias_ptr, normed_ptr, total_ptr, logits_ptr,
    x_stride, residual_stride, eps,
    E: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n, t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    k = tl.arange(0, BLOCK_K)[None, :]
    n_mask, k_mask = n < E, k < K
    w = tl.load(weight_ptr + n[:, None] * K + k, mask=n_mask[:, None] & k_mask, other=0.0)
    norm_weight = tl.load(norm_weight_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + t * x_stride + k, mask=k_mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + t * residual_stride + k, mask=k_mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        if tl.program_id(0) == 0:
            tl.store(total_ptr + t * K + k, x, mask=k_mask)
    wide = x.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(tl.sum(wide * wide, axis=1), axis=0) / K + eps)
    normed = (wide * norm_weight).to(x.dtype)
    if tl.program_id(0) == 0:  # all programs need it, one writes it down
        tl.store(normed_ptr + t * K + k, normed, mask=k_mask)
    y = tl.sum(w.to(tl.float32) * normed.to(tl.float32), axis=1)
    if HAS_BIAS:
        y += bias
    tl.store(logits_ptr + t * E + n, y, mask=n_mask)


def norm_router(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm` and `experts.router_logits` of up to `MAX_NORM_ROWS` tokens -> (normed, residual stream, logits).

    x and a residual: [T, H], rows may be strided. weight: [E, H], contiguous.
    """
    (rows, k), count = x.shape, len(weight)
    assert 0 < rows <= MAX_NORM_ROWS and weight.is_contiguous() and x.stride(1) == 1, (x.shape, x.stride())
    normed = torch.empty(rows, k, dtype=x.dtype, device=x.device)
    # a buffer of its own: other programs still read `residual`
    total = x if residual is None else torch.empty_like(normed)
    logits = torch.empty(rows, count, dtype=torch.float32, device=x.device)
    block_k = triton.next_power_of_2(k)
    block_n = max(1, min(16, _HELD_BYTES // (block_k * x.element_size())))
    _norm_router_kernel[(triton.cdiv(count, block_n), rows)](
        x, x if residual is None else residual, norm_weight, weight, x if bias is None else bias, normed, total, logits,
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        E=count, K=k, BLOCK_N=block_n, BLOCK_K=block_k,
        HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, num_warps=4, **pdl_options(x),
    )  # fmt: skip
    return normed, total, logits
