"""Experts of a few tokens as matrix-vector products: each token reads its own experts, once.

Two kernels, without tensor cores. Gate, up and the activation are one; down, the router's weights, the sum over a
token's experts and the residual stream the other, whose programs sum over all of its experts in one order. What limits
them is the bytes of the experts, so programs ask for all of theirs at once.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment,var-annotated"
# ruff: noqa: N803, RUF005 - constants of a kernel are in capitals, and Triton knows no starred tuple
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_mul
from nanoengine.kernels.matvec_parts_triton import pin
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs


@triton.jit
def _gate_up_kernel(
    x_ptr, ids_ptr, weight_ptr, bias_ptr, inner_ptr, x_stride, first,
    E: tl.constexpr, TOP_K: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)[None, :]
    n_mask, k_mask = n < N, k < K
    wait_for_inputs(PDL)
    release_dependents(PDL)  # behind the wait: `_down_kernel` reads `ids` before its own
    e = tl.load(ids_ptr + pair).to(tl.int64) - first
    if (e < 0) | (e >= E):
        return
    mask = n_mask[:, None] & k_mask
    source = weight_ptr + (e * (2 * N) + n[:, None]) * K + k
    w = tl.load(source, mask=mask, other=0.0)
    u = tl.load(source + N * K, mask=mask, other=0.0)
    x = tl.load(x_ptr + pair // TOP_K * x_stride + k, mask=k_mask, other=0.0).to(tl.float32)
    y, up = tl.sum(w.to(tl.float32) * x, axis=1), tl.sum(u.to(tl.float32) * x, axis=1)
    if HAS_BIAS:
        bias = bias_ptr + e * (2 * N) + n
        y += tl.load(bias, mask=n_mask, other=0.0).to(tl.float32)
        up += tl.load(bias + N, mask=n_mask, other=0.0).to(tl.float32)
    tl.store(inner_ptr + pair * N + n, act_mul(y, up, ACTIVATION).to(inner_ptr.dtype.element_ty), mask=n_mask)


@triton.jit
def _down_kernel(
    inner_ptr, ids_ptr, router_ptr, weight_ptr, bias_ptr, add_ptr, out_ptr, add_stride, first,
    E: tl.constexpr, TOP_K: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pieces: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    t = tl.program_id(1).to(tl.int64)
    n, k = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None], tl.arange(0, BLOCK_K)[None, :]
    ids, router, inner = ids_ptr + t * TOP_K, router_ptr + t * TOP_K, inner_ptr + t * (TOP_K * K)
    weights = ()
    for j in tl.static_range(TOP_K):
        # .cg: a kernel that may not be this one's predecessor wrote it, so never from this multiprocessor's own L1
        e = tl.load(ids + j, cache_modifier=".cg").to(tl.int64) - first
        source = weight_ptr + (e * N + n) * K + k
        mask = (e >= 0) & (e < E) & (n < N)
        for piece in tl.static_range(pieces):
            at = piece * BLOCK_K
            weights = weights + (tl.load(source + at, mask=mask & (k < K - at), other=0.0),)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    y = tl.zeros((BLOCK_N, 1), tl.float32)
    for j in tl.static_range(TOP_K):
        e = tl.load(ids + j, cache_modifier=".cg").to(tl.int64) - first
        here = (e >= 0) & (e < E)
        share = tl.load(router + j)
        for piece in tl.static_range(pieces):
            at = piece * BLOCK_K
            # each row of a program loads its own: handing it over would take a barrier a piece
            x_ptrs = tl.broadcast_to(inner + j * K + at + k, (BLOCK_N, BLOCK_K))
            x = tl.load(x_ptrs, mask=here & (k < K - at), other=0.0).to(tl.float32)
            w = weights[j * pieces + piece]
            if PDL and w.dtype.primitive_bitwidth == 16:
                w = pin(w)  # held as it is, not widened, until it is needed
            acc += w.to(tl.float32) * tl.where(here, x * share, 0.0)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + e * N + n, mask=here & (n < N), other=0.0).to(tl.float32)
            y += tl.where(here, bias * share, 0.0)
    y += tl.sum(acc, axis=1, keep_dims=True)
    if HAS_ADD:
        y += tl.load(add_ptr + t * add_stride + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@dataclass(frozen=True, slots=True)
class FewTile:
    """Outputs a program, elements of each that it loads at a time, warps."""

    block_n: int
    block_k: int
    warps: int


def gate_up_tile(k: int, itemsize: int) -> FewTile:
    """256 bytes of weight a thread, and one warp where that is a row of gate and one of up: no warp waits for another,
    and the smallest programs leave the shortest rest at the end."""
    block_k = triton.next_power_of_2(k)
    row = 2 * block_k * itemsize
    warps = min(8, max(1, row // 8192))
    return FewTile(max(1, min(16, 8192 * warps // row)), block_k, warps)


def down_tile(k: int, top_k: int, itemsize: int) -> FewTile:
    """The largest pieces of a row that waste no more than a tenth of the lanes; up to 384 bytes of weight a thread, by
    one warp if that is enough."""
    fitting = (size for size in (2048, 1024, 512, 256) if 10 * triton.cdiv(k, size) * size <= 11 * k)
    block_k = next(fitting, min(2048, triton.next_power_of_2(k)))
    block_n = max(1, 512 // (block_k * itemsize))  # one load of 16 bytes a thread of one warp
    held = triton.cdiv(k, block_k) * block_k * top_k * block_n * itemsize
    return FewTile(block_n, block_k, min(8, triton.next_power_of_2(triton.cdiv(held, 32 * 384))))


def few(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: Activation,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    first: int,
    add: Tensor | None,
    out: Tensor,
    tiles: tuple[FewTile, FewTile] | None = None,
) -> Tensor:
    """As `experts.experts`, into `out`. Products are summed over all of a token's experts before they are rounded."""
    (count, hidden, width), (rows, top_k) = down.shape, ids.shape
    inner = torch.empty(rows * top_k, width, dtype=x.dtype, device=x.device)
    tile, down_ = tiles or (gate_up_tile(hidden, x.element_size()), down_tile(width, top_k, x.element_size()))
    _gate_up_kernel[(triton.cdiv(width, tile.block_n), rows * top_k)](
        x, ids, gate_up, x if gate_up_bias is None else gate_up_bias, inner, x.stride(0), first,
        E=count, TOP_K=top_k, N=width, K=hidden, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, ACTIVATION=activation,
        HAS_BIAS=gate_up_bias is not None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    _down_kernel[(triton.cdiv(hidden, down_.block_n), rows)](
        inner, ids, weights, down, x if down_bias is None else down_bias, x if add is None else add, out,
        0 if add is None else add.stride(0), first,
        E=count, TOP_K=top_k, N=hidden, K=width, BLOCK_N=down_.block_n, BLOCK_K=down_.block_k,
        HAS_BIAS=down_bias is not None, HAS_ADD=add is not None, num_warps=down_.warps, **pdl_options(x),
    )  # fmt: skip
    return out
