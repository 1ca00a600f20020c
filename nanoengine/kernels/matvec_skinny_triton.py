"""Products of few rows by tensor cores in tiles of outputs x tokens ("skinny"), the weight on the left, so that the
tokens are the short side of a tile.

A norm in front is part of the product: its weight goes onto the tiles of x, and its scale, known when all of x has been
seen, onto the sum. Where tiles alone make too few programs the sum over K is cut in parts. Each is written down and
takes a ticket; the last to come adds them up, in order, so that a product comes out the same every time.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.matvec_parts_triton import check, finish, halves, load_if, pick_rows, prefetch_rows, result
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.split_k_triton import come, parts_of

_AHEAD = 256  # elements of each weight row that a program asks for before it waits


@triton.jit(do_not_specialize=["rows"])
def _skinny_kernel(
    x_ptr, norm_weight_ptr, weight_ptr, bias_ptr, add_ptr, y_ptr, part_ptr, ticket_ptr, rows, x_stride, add_stride, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, SPAN: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    row, source = pick_rows(tl.program_id(0), N, BLOCK_N, GATED)
    row, source = row[:, None], source[:, None]
    first = tl.program_id(1) * SPAN
    t = (tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :]
    w_mask, t_mask = row < N, t < rows
    release_dependents(PDL)
    if PDL:
        prefetch_rows(weight_ptr, source, first, w_mask, K, AHEAD)
    k = tl.arange(0, BLOCK_K)
    if NORM:  # one tile ahead: as few bytes as these are no copy of the pipeline's
        norm_weight = tl.load(norm_weight_ptr + first + k, mask=k < K - first, other=0.0)
    wait_for_inputs(PDL)
    w_ptrs = weight_ptr + source.to(tl.int64) * K + k[None, :]
    x_ptrs = x_ptr + t * x_stride + k[:, None]
    acc = tl.zeros((width, BLOCK_T), tl.float32)
    squares = tl.zeros((BLOCK_K // 8, BLOCK_T), tl.float32)
    for start in tl.range(first, first + SPAN, BLOCK_K, num_stages=STAGES):
        k_left = K - start
        x = tl.load(x_ptrs + start, mask=t_mask & (k[:, None] < k_left), other=0.0)
        w = tl.load(w_ptrs + start, mask=w_mask & (k[None, :] < k_left), other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(tl.reshape(wide * wide, (BLOCK_K // 8, 8, BLOCK_T)), 1)
            x = (wide * norm_weight[:, None].to(tl.float32)).to(x.dtype)
            norm_weight = tl.load(norm_weight_ptr + start + BLOCK_K + k, mask=k < k_left - BLOCK_K, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    square = tl.sum(squares, 0)
    if SPLITS > 1:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        size: tl.constexpr = (width + 1) * BLOCK_T  # the last line is the squares'
        r, c = tl.arange(0, width)[:, None], tl.arange(0, BLOCK_T)
        part = part_ptr + tile * (SPLITS * size)
        mine = part + tl.program_id(1) * size
        tl.store(mine + r * BLOCK_T + c[None, :], acc)
        if NORM:
            tl.store(mine + width * BLOCK_T + c, square)
        if come(ticket_ptr + tile) < SPLITS - 1:
            return
        tl.store(ticket_ptr + tile, 0)  # for the next launch
        acc = tl.zeros((width, BLOCK_T), tl.float32)
        square = tl.zeros((BLOCK_T,), tl.float32)
        for split in tl.static_range(SPLITS):  # .cg: other programs wrote it; never from this multiprocessor's own L1
            acc += tl.load(part + split * size + r * BLOCK_T + c[None, :], cache_modifier=".cg")
            if NORM:
                square += tl.load(part + split * size + width * BLOCK_T + c, cache_modifier=".cg")
    if NORM:
        acc *= tl.rsqrt(square / K + eps)[None, :]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    mask = (n < N) & t_mask
    y, up = halves(acc, BLOCK_N, BLOCK_T, GATED)
    finish(
        y, up, load_if(HAS_BIAS, bias_ptr + n, n < N), load_if(HAS_BIAS and GATED, bias_ptr + N + n, n < N),
        load_if(HAS_ADD, add_ptr + t * add_stride + n, mask), y_ptr + t * N + n, mask, GATED, ACTIVATION,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SkinnyTile:
    """Outputs, K and at most tokens a tile, warps, pipeline stages, parts of K."""

    block_n: int
    block_k: int
    block_t: int
    warps: int
    stages: int
    splits: int = 1


def skinny(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tile: SkinnyTile,
    gate: Activation | None = None,
    add: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
    tickets: Tensor | None = None,
) -> Tensor:
    """The product, of x normalised first if there is a norm. `tickets`: `split_k_triton.tickets_on`, or made anew."""
    rows, k = x.shape
    outputs = len(weight) // 2 if gate else len(weight)
    check(x, weight, add, outputs)
    y = result(x, outputs, out)
    block_t = min(tile.block_t, max(8, triton.next_power_of_2(rows)))
    grid = (triton.cdiv(outputs, tile.block_n), tile.splits, triton.cdiv(rows, block_t))
    part, count = parts_of(y, grid, (tile.block_n * (2 if gate else 1) + 1) * block_t, tickets)
    span = triton.cdiv(triton.cdiv(k, tile.splits), tile.block_k) * tile.block_k
    _skinny_kernel[grid](
        x, norm_weight if norm_weight is not None else x, weight, bias if bias is not None else x,
        add if add is not None else x, y, part, count, rows, x.stride(0), 0 if add is None else add.stride(0), eps,
        N=outputs, K=k, BLOCK_T=block_t, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        SPLITS=tile.splits, SPAN=span, AHEAD=min(_AHEAD, triton.next_power_of_2(span)), STAGES=tile.stages,
        GATED=gate is not None, ACTIVATION=gate, NORM=norm_weight is not None,
        HAS_BIAS=bias is not None, HAS_ADD=add is not None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return y
