"""Matrix products of few rows, which read every weight once: the time of a decode step at small batch.

Of four kernels the number of rows and the shape choose one (`tile_for`):

- without tensor cores, for one or two rows (here): each program holds whole rows of the weight in registers, loaded
  before it waits for the kernel in front (see `pdl_triton`); sums in float32;
- by tensor cores with the weight held before the wait (`matvec_held_triton`), where all of it fits the multiprocessors;
- by tensor cores in pipelined tiles (`matvec_skinny_triton`);
- the same for large weights, with helpers in kernels of their own (`matvec_large_triton`).

The norm in front, the gate and the residual stream behind are part of the first three: one launch a product. And of a
fifth, for one row and a large weight (`matvec_streamed_triton`), where `engine.kernels` has it on.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_mul
from nanoengine.kernels.inboxes_triton import PLACES, Inboxes, addresses, by_words, next_turn, over_ranks
from nanoengine.kernels.matvec import takes_gemv
from nanoengine.kernels.matvec_held_triton import HeldTile, held
from nanoengine.kernels.matvec_large_triton import LargeTile, large, large_tile
from nanoengine.kernels.matvec_parts_triton import check, load_if, pin, result
from nanoengine.kernels.matvec_skinny_triton import SkinnyTile, skinny
from nanoengine.kernels.matvec_streamed_triton import programs_of, streamed
from nanoengine.kernels.matvec_streamed_triton import tile_of as streamed_tile_of
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.rms_norm_triton import add_rms_norm

MAX_ROWS = 64
_PROGRAMS = 132  # what runs at a time on a Hopper GPU, one a multiprocessor
_SMALL_WEIGHTS = 3 << 20
_SMALL_K = 1024
_HELD_WEIGHTS = 8 << 20
_TILED_NORM_MAX_K = 1024
_FUSED_NORM_MAX_WEIGHTS = 5 << 20  # for two rows: each program repeats the norm


@triton.jit
def _gemv_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, weight_ptr, bias_ptr, add_ptr, y_ptr, total_ptr,
    data, turns, x_stride, residual_stride, add_stride, capacity, eps,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr,
    SHARE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    n_mask, k_mask = n < N, k < K
    mask = n_mask[:, None] & k_mask
    source = weight_ptr + n.to(tl.int64)[:, None] * K + k
    w = tl.load(source, mask=mask, other=0.0)
    if GATED:
        u = tl.load(source + N * K, mask=mask, other=0.0)
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
        if GATED:
            bias_u = tl.load(bias_ptr + N + n, mask=n_mask, other=0.0).to(tl.float32)
    if SIZE > 1:
        others = addresses(data, SIZE)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    if SIZE > 1:
        turn = next_turn(turns)
    for t in tl.static_range(T):
        if PDL and w.dtype.primitive_bitwidth == 16:
            w = pin(w)  # else held weights were widened before the wait, and the next kernel's programs found no room
            if GATED:
                u = pin(u)
        x = tl.load(x_ptr + t * x_stride + k, mask=k_mask, other=0.0)
        if SIZE > 1:  # in front of the wait for others, so that nothing is behind it
            more = load_if(HAS_ADD, add_ptr + t * add_stride + n, n_mask)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + t * residual_stride + k, mask=k_mask, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            if tl.program_id(0) == 0:  # all programs need the sum, one writes it down
                tl.store(total_ptr + t * K + k, x, mask=k_mask)
        x = x.to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / K + eps)
            x *= norm_weight
        y = tl.sum(w.to(tl.float32) * x, axis=1)
        if NORM:
            y *= scale
        if HAS_BIAS:
            y += bias
        if GATED:
            up = tl.sum(u.to(tl.float32) * x, axis=1)
            if NORM:
                up *= scale
            if HAS_BIAS:
                up += bias_u
            y = act_mul(y, up, ACTIVATION)
        if SIZE > 1:
            y = over_ranks(y, n, n_mask, others, turns, turn, capacity, RANK, SIZE, PLACES, SHARE, ASM) + more
        elif HAS_ADD:
            y += tl.load(add_ptr + t * add_stride + n, mask=n_mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + t * N + n, y.to(y_ptr.dtype.element_ty), mask=n_mask)


@dataclass(frozen=True, slots=True)
class GemvTile:
    """Weight rows a program holds, and its warps."""

    block_n: int
    warps: int


# The tiles below come from some 2,500 trials, alone and in a chain of layers (bf16, H200, torch 2.11, Triton 3.6,
# 2026-11-29): for the shapes of Qwen3-0.6B within 3% of the best.
def gemv_tile(k: int, *, gated: bool, itemsize: int) -> GemvTile:
    """128 or 256 bytes of weight a thread, more warps for longer rows."""
    row = triton.next_power_of_2(k) * itemsize * (2 if gated else 1)
    warps, held = (2, 256) if row <= 4096 else (4, 128) if row <= 16384 else (8, 128)
    return GemvTile(max(1, min(16, 32 * warps * held // row)), warps)


def held_tile(rows: int, outputs: int, k: int, *, gated: bool, itemsize: int) -> HeldTile | None:
    """None where the weight is more than all programs can hold at once, or x is read by too many of them."""
    if itemsize != 2 or outputs * (2 if gated else 1) * k > _HELD_WEIGHTS or k > (2048 if gated or rows > 16 else 4096):
        return None
    if rows <= 16:
        wide = not gated and k <= 1024
        block_n = 16 if not wide else 32 if rows <= 8 else 64
        return HeldTile(block_n, warps=4 if k > 2048 and rows <= 8 else 8, block_t=8 if rows <= 8 else 16)
    if (k <= 1024 and rows > 32) or (gated and k > 1024):
        return None
    block_n, block_t = (64, 32) if k <= 1024 and not gated else (32, 32 if gated else 16)
    if triton.cdiv(outputs, block_n) * triton.cdiv(rows, block_t) > _PROGRAMS:
        return None
    return HeldTile(block_n, warps=8, block_t=block_t)


def _parts(tiles: int, k: int) -> int:
    """Into how many parts long rows are cut for a program a multiprocessor; of short ones, 64 programs are enough."""
    splits, enough = 1, _PROGRAMS if k >= 2048 else 64
    while splits < 4 and 2 * splits * tiles <= enough and k // (2 * splits) >= 512:
        splits *= 2
    return splits


def skinny_tile(rows: int, outputs: int, k: int, *, gated: bool, itemsize: int) -> SkinnyTile:
    """64 x 128 of the weight, many stages: bytes in flight count for more than the number of programs. More than 32
    tokens are two tiles where there are multiprocessors for both: each reads half of x, and x is as much as the weight.
    """
    tiles, block_t = triton.cdiv(outputs, 32 if gated else 64), max(8, triton.next_power_of_2(rows))
    if itemsize > 2:
        return SkinnyTile(32 if gated else 64, 128, block_t, warps=4, stages=3)
    if gated:
        if rows > 32 and tiles <= _PROGRAMS:
            return SkinnyTile(64, 128, 32, warps=8, stages=3)
        return SkinnyTile(32, 128, block_t, warps=8 if rows <= 16 else 4, stages=3)
    if rows > 32 and k <= 3072 and 2 * tiles <= _PROGRAMS:
        splits = _parts(2 * tiles, k)
        if k <= 1024:
            return SkinnyTile(64, 256, 32, warps=8, stages=3, splits=splits)
        if splits > 1:
            return SkinnyTile(64, 128, 32, warps=4, stages=5, splits=splits)
    if k <= _SMALL_K and outputs > 1 << 16 and (rows <= 8 or rows > 32):  # an output layer: many waves of programs
        return SkinnyTile(32, 128, 8, warps=2, stages=7) if rows <= 8 else SkinnyTile(128, 64, 64, warps=4, stages=3)
    stages = 7 if rows <= 32 else 5  # as many as shared memory holds
    return SkinnyTile(64, 128, max(16, block_t), warps=4, stages=stages, splits=_parts(tiles, k))


def is_small(weights: int, k: int) -> bool:
    """Whether a product is of a size at which the held and skinny kernels are known to pay: those of Qwen3-0.6B.

    With them its decode gained 11, 28 and 4% at 1, 8 and 64 rows (one H200, 2026-11-29), while Qwen3-8B at 8 rows fell
    from 1,754 to 1,629 tokens/s, and Llama-3.2-1B at 64 rows by 1.5% (with an earlier set of tiles). So larger products
    keep the kernels they had before. Not measured: other numbers of rows of these two models, which of their products
    lost, and both again with the old kernels put back.
    """
    return k <= _SMALL_K or weights <= _SMALL_WEIGHTS


Tile = GemvTile | HeldTile | SkinnyTile | LargeTile


def tile_for(rows: int, outputs: int, k: int, *, gated: bool, itemsize: int) -> Tile:
    """Which kernel makes a product, and its tile. The same kernel sums a row in the same order beside any others."""
    small = is_small(outputs * (2 if gated else 1) * k, k)
    if small and (rows > 1 or k <= 2048):
        held = held_tile(rows, outputs, k, gated=gated, itemsize=itemsize)
        if held is not None:
            return held
    if takes_gemv(rows, k):
        return gemv_tile(k, gated=gated, itemsize=itemsize)
    choose = skinny_tile if small else large_tile
    return choose(rows, outputs, k, gated=gated, itemsize=itemsize)


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
    tickets: Tensor | None = None,
    streams: bool = False,
) -> Tensor:
    """As `matvec.matvec`, for up to `MAX_ROWS` rows.

    `out`: contiguous; where the result goes. `tickets`: see `split_k_triton.tickets_on`. `streams`: whether
    `matvec_streamed_triton` is on.
    """
    rows, k = x.shape
    assert rows <= MAX_ROWS, rows
    outputs = len(weight) // 2 if gate else len(weight)
    if rows == 0:
        return result(x, outputs, out)
    shape: dict[str, Any] = {"gated": gate is not None, "itemsize": x.element_size()}
    if streams and (ring := streamed_tile_of(rows, outputs, k, **shape)):
        return streamed(x, weight, bias, gate=gate, add=add, out=out, tile=ring)
    tile = tile_for(rows, outputs, k, **shape)
    if isinstance(tile, GemvTile):
        return gemv(x, weight, bias, gate=gate, add=add, out=out, tile=tile)[0]
    if isinstance(tile, HeldTile):
        return held(x, weight, bias, gate=gate, add=add, out=out, tile=tile)
    if isinstance(tile, LargeTile):
        return large(x, weight, bias, gate=gate, add=add, out=out, tile=tile)
    return skinny(x, weight, bias, gate=gate, add=add, out=out, tile=tile, tickets=tickets)


def matvec_over_ranks(
    x: Tensor, weight: Tensor, add: Tensor, begin: Callable[[], Inboxes], *, streams: bool = False
) -> Tensor | None:
    """x @ weight.T, summed over ranks, + add, of one row. begin: called before the launch. streams: as in `matvec`.

    None: no kernel here does it, which is the same on all ranks."""
    (rows, k), outputs = x.shape, len(weight)
    if rows != 1:
        return None
    shape: dict[str, Any] = {"gated": False, "itemsize": x.element_size()}
    if streams and (ring := streamed_tile_of(rows, outputs, k, **shape)) and programs_of(ring, outputs) <= PLACES:
        return streamed(x, weight, tile=ring, add=add, out=torch.empty_like(add), inboxes=begin())
    tile = tile_for(rows, outputs, k, **shape)
    if not isinstance(tile, GemvTile) or triton.cdiv(outputs, tile.block_n) > PLACES:
        return None
    return gemv(x, weight, None, tile=tile, add=add, out=torch.empty_like(add), inboxes=begin())[0]


def norm_matvec(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
    tickets: Tensor | None = None,
    streams: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `matvec.norm_matvec`. The norm's scale is applied to the sums; x times its weight is rounded for tensor cores.

    The norm is a kernel of its own where that costs less than each program's share of it: two rows and many weights
    without tensor cores, long rows in tiles without a gate, large weights by tensor cores; and for tensor cores where a
    residual is still to be added.
    """
    rows, k = x.shape
    assert rows <= MAX_ROWS, rows
    outputs = len(weight) // 2 if gate else len(weight)
    shape: dict[str, Any] = {"gated": gate is not None, "itemsize": x.element_size()}
    around: dict[str, Any] = {"gate": gate, "norm_weight": norm_weight, "eps": eps}
    if streams and residual is None and (ring := streamed_tile_of(rows, outputs, k, **shape)):
        return streamed(x, weight, bias, tile=ring, **around), x
    tile = tile_for(rows, outputs, k, **shape)
    if isinstance(tile, GemvTile) and (rows == 1 or weight.numel() <= _FUSED_NORM_MAX_WEIGHTS):
        return gemv(x, weight, bias, residual=residual, tile=tile, **around)
    if rows and residual is None:
        if isinstance(tile, HeldTile):
            return held(x, weight, bias, tile=tile, **around), x
        if isinstance(tile, SkinnyTile) and (gate or k <= _TILED_NORM_MAX_K):
            return skinny(x, weight, bias, tile=tile, tickets=tickets, **around), x
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    return matvec(normed, weight, bias, gate=gate, tickets=tickets), total


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: GemvTile | None = None,
    inboxes: Inboxes | None = None,
) -> tuple[Tensor, Tensor]:
    """Product, and the residual stream if there is a norm (else x). inboxes: the product is summed over ranks."""
    rows, k = x.shape
    outputs = len(weight) // 2 if gate else len(weight)
    assert rows <= MAX_ROWS, rows
    check(x, weight, add, outputs)
    assert inboxes is None or rows == 1, rows
    y = result(x, outputs, out)
    # a buffer of its own: other programs still read `residual`
    total = x if residual is None else torch.empty(rows, k, dtype=x.dtype, device=x.device)
    tile = tile or gemv_tile(k, gated=gate is not None, itemsize=x.element_size())
    programs = triton.cdiv(outputs, tile.block_n)
    _gemv_kernel[(programs,)](
        x, residual if residual is not None else x, norm_weight if norm_weight is not None else x, weight,
        bias if bias is not None else x, add if add is not None else x, y, total,
        x_stride=x.stride(0), residual_stride=0 if residual is None else residual.stride(0),
        add_stride=0 if add is None else add.stride(0), eps=eps, **by_words(inboxes, x, programs),
        T=rows, N=outputs, K=k, BLOCK_N=tile.block_n, BLOCK_K=triton.next_power_of_2(k),
        GATED=gate is not None, ACTIVATION=gate, NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None, HAS_ADD=add is not None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return y, total
