"""Products of some rows with weights in the order of `gguf_fragments`: a warp's loads are operands of tensor cores.

A thread works as in CUDA: tensors have one element a thread, so a warp has two tiles of 16 rows of the weight, and a
program's warps take its tiles along K by turns. A code is put into the last bits of 128 (bfloat16) or 1024 (float16):
two weights by one instruction. Codes and x are multiplied as they are; the sums of a group take their scale in float32.
What the 128 and a group's minimum add is the group's sum of x times a number; that sum is a product with ones.

The eight columns of a product are eight tokens (of sixteen there are two products). Of one token they are the eight
groups of a tile: x of a group is in its column, and 0 in the others, so that a thread scales two groups of a row, and
not all eight of them.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, RUF005 - constants of a kernel are in capitals; Triton unpacks no tuple into another
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.gguf_fragment_parts_triton import assembly, group, inputs, only, split4, sums, words_at
from nanoengine.kernels.gguf_fragment_scales_triton import add_group, add_two_groups, scales
from nanoengine.kernels.gguf_fragments import BLOCK, FRAGMENTS, LINES
from nanoengine.kernels.matmul import Scaled
from nanoengine.kernels.matvec_parts_triton import result
from nanoengine.kernels.norm_parts_triton import norm_scale
from nanoengine.kernels.pdl_triton import release_dependents, wait_for_inputs
from nanoengine.kernels.split_k_triton import SplitProduct, finish_tile

MAX_ROWS = 16
_PROCESSORS = 132


@triton.jit
def _four(ptrs, mask):
    return words_at(ptrs, mask), words_at(ptrs + 128, mask), words_at(ptrs + 256, mask), words_at(ptrs + 384, mask)


@triton.jit
def _codes(tile, lane, mask, FOURS: tl.constexpr, MORE: tl.constexpr):
    """What a thread has of a tile's codes, 16 bytes at a time: two groups each, then further bits."""
    ptrs = tile + lane * 4
    if FOURS == 2:
        return _four(ptrs, mask) + _four(ptrs + 512, mask)
    elif MORE == 2:
        return _four(ptrs, mask) + (words_at(ptrs + 512, mask), words_at(ptrs + 640, mask))
    elif MORE == 1:
        return _four(ptrs, mask) + (words_at(ptrs + 512, mask),)
    else:
        return _four(ptrs, mask)


@triton.jit
def _group_sums(
    codes, x, c, e, J: tl.constexpr,
    KIND: tl.constexpr, FOURS: tl.constexpr, MORE: tl.constexpr, EVEN: tl.constexpr, ODD: tl.constexpr,
):  # fmt: skip
    """Adds the products of group J of a tile to c and e: see `gguf_fragment_parts_triton.group`."""
    words = split4(codes[J // 2])
    low, high, more = words[J % 2 * 2], words[J % 2 * 2 + 1], words[0]
    if MORE == 1:
        more = split4(codes[4])[J // 2]
    elif MORE == 2:
        more = split4(codes[4 + J // 4])[J % 4]
    if FOURS == 2:
        c, _ = group(low, high, more, x, c, e, KIND, MORE, 0, EVEN)
        words = split4(codes[4 + J // 2])
        e, _ = group(words[J % 2 * 2], words[J % 2 * 2 + 1], more, x, e, c, KIND, MORE, 1, ODD)
        return c, e
    elif J % 2:
        return group(low, high, more, x, c, e, KIND, MORE, 1, ODD)
    else:
        return group(low, high, more, x, c, e, KIND, MORE, 0, EVEN)


@triton.jit
def _one_token(
    a, b, rows_of, x, g, t, y, zero,
    KIND: tl.constexpr, FOURS: tl.constexpr, MORE: tl.constexpr, BASE: tl.constexpr,
    EVEN: tl.constexpr, ODD: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """y (rows g and g + 8 of two tiles) and the products of the tiles' codes a and b."""
    zeros = (zero, zero, zero, zero)
    c, e, f, h = zeros, zeros, zeros, zeros
    of_x = sums(x, KIND, SUMS)
    for j in tl.static_range(8):
        here = only(x, g == j, EVEN is not None)
        c, e = _group_sums(a, here, c, e, j, KIND, FOURS, MORE, EVEN, ODD)
        f, h = _group_sums(b, here, f, h, j, KIND, FOURS, MORE, EVEN, ODD)
    return (
        add_two_groups(y[0], rows_of[0], t, c[0], c[1], e[0], e[1], of_x, KIND, BASE),
        add_two_groups(y[1], rows_of[1], t, c[2], c[3], e[2], e[3], of_x, KIND, BASE),
        add_two_groups(y[2], rows_of[2], t, f[0], f[1], h[0], h[1], of_x, KIND, BASE),
        add_two_groups(y[3], rows_of[3], t, f[2], f[3], h[2], h[3], of_x, KIND, BASE),
    )


@triton.jit
def _eight_tokens(
    a, b, rows_of, x, y, zero, J: tl.constexpr,
    KIND: tl.constexpr, FOURS: tl.constexpr, MORE: tl.constexpr, BASE: tl.constexpr,
    EVEN: tl.constexpr, ODD: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """y (two tokens each of rows g and g + 8 of two tiles) and the products of group J of the tiles' codes a and b."""
    zeros = (zero, zero, zero, zero)
    of_x = sums(x, KIND, SUMS)
    c, e = _group_sums(a, x, zeros, zeros, J, KIND, FOURS, MORE, EVEN, ODD)
    y0, y1 = add_group(y[0], y[1], rows_of[0], c[0], c[1], e[0], e[1], of_x, J, KIND, BASE)
    y2, y3 = add_group(y[2], y[3], rows_of[1], c[2], c[3], e[2], e[3], of_x, J, KIND, BASE)
    c, e = _group_sums(b, x, zeros, zeros, J, KIND, FOURS, MORE, EVEN, ODD)
    y4, y5 = add_group(y[4], y[5], rows_of[2], c[0], c[1], e[0], e[1], of_x, J, KIND, BASE)
    y6, y7 = add_group(y[6], y[7], rows_of[3], c[2], c[3], e[2], e[3], of_x, J, KIND, BASE)
    return y0, y1, y2, y3, y4, y5, y6, y7


@triton.jit
def _joined(y):
    return tl.join(tl.join(tl.join(y[0], y[1]), tl.join(y[2], y[3])), tl.join(tl.join(y[4], y[5]), tl.join(y[6], y[7])))


@triton.jit
def sums_of_rows(y, z, WARPS: tl.constexpr, BLOCK_T: tl.constexpr, GATED: tl.constexpr):
    """Sums of threads -> of the program's rows [32, BLOCK_T], a gated tile's as `matvec_parts_triton.halves` has
    them."""
    if BLOCK_T == 1:  # [threads, half of a tile, tile]
        each = tl.reshape(tl.join(tl.join(y[0], y[1]), tl.join(y[2], y[3])), (WARPS, 8, 4, 2, 2))
        each = tl.permute(tl.sum(tl.sum(each, axis=2), axis=0), (1, 2, 0) if GATED else (2, 1, 0))
    elif BLOCK_T == 8:  # [threads, token, half of a tile, tile]
        each = tl.sum(tl.reshape(_joined(y), (WARPS, 8, 4, 2, 2, 2)), axis=0)
        each = tl.permute(each, (3, 4, 0, 1, 2) if GATED else (4, 3, 0, 1, 2))
    else:  # [threads, token, half of a tile, tile, eight tokens]
        each = tl.sum(tl.reshape(tl.join(_joined(y), _joined(z)), (WARPS, 8, 4, 2, 2, 2, 2)), axis=0)
        each = tl.permute(each, (3, 4, 0, 5, 1, 2) if GATED else (4, 3, 0, 5, 1, 2))
    return tl.reshape(each, (32, BLOCK_T))


@triton.jit(do_not_specialize=["rows"])
def _fragments_kernel(
    x_ptr, tiles_ptr, bias_ptr, add_ptr, y_ptr, part_ptr, ticket_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr,
    rows, x_stride, y_stride, add_stride, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
    SQUARES: tl.constexpr, PARTS: tl.constexpr, NEXT: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    KIND: tl.constexpr, FOURS: tl.constexpr, MORE: tl.constexpr, WORDS: tl.constexpr, BASE: tl.constexpr,
    EVEN: tl.constexpr, ODD: tl.constexpr, SUMS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """WORDS: of a tile. EVEN, ODD, SUMS: `gguf_fragment_parts_triton.assembly`."""
    tiles: tl.constexpr = K // 256
    head: tl.constexpr = FOURS * 512 + MORE * 128
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    g, t = lane // 4, lane % 4
    tile = tl.program_id(0) if GATED else 2 * tl.program_id(0)
    other = tile + (N // 16 if GATED else 1)
    base = tiles_ptr.to(tl.pointer_type(tl.int32))
    a_base, b_base = base + tile.to(tl.int64) * (tiles * WORDS), base + other.to(tl.int64) * (tiles * WORDS)
    token = tl.program_id(2) * BLOCK_T + (g if BLOCK_T > 1 else 0)
    x_ptrs = x_ptr + tl.where(token < rows, token, 0).to(tl.int64) * x_stride + (0 if BLOCK_T > 1 else g * 32)
    z_ptrs = x_ptr + tl.where(token + 8 < rows, token + 8, 0).to(tl.int64) * x_stride  # the other eight of sixteen
    zero = tl.zeros((32 * WARPS,), tl.float32)
    here = warp < tiles
    a = _codes(a_base + warp * WORDS, lane, here, FOURS, MORE)
    b = _codes(b_base + warp * WORDS, lane, here, FOURS, MORE)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    scale = 1.0
    if SQUARES > 0:
        of = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        scale = norm_scale(squares_ptr, of, rows, SQUARES, PARTS, K, eps)
    four = (zero, zero, zero, zero)
    y = four if BLOCK_T == 1 else four + four
    z = y
    if BLOCK_T == 1:
        x = inputs(x_ptrs + warp * 256, here, KIND, EVEN is not None)
    for start in tl.range(0, tiles, WARPS, num_stages=1):
        step = start + warp
        here, there = step < tiles, step + WARPS < tiles
        a_head, b_head = a_base + (step * WORDS + head), b_base + (step * WORDS + head)
        rows_of = (
            scales(a_head, g, t, here, KIND, BLOCK_T == 1), scales(a_head, g + 8, t, here, KIND, BLOCK_T == 1),
            scales(b_head, g, t, here, KIND, BLOCK_T == 1), scales(b_head, g + 8, t, here, KIND, BLOCK_T == 1),
        )  # fmt: skip
        at = (step + WARPS) * WORDS
        next_a, next_b = _codes(a_base + at, lane, there, FOURS, MORE), _codes(b_base + at, lane, there, FOURS, MORE)
        if BLOCK_T == 1:
            next_x = inputs(x_ptrs + (step + WARPS) * 256, there, KIND, EVEN is not None)
            y = _one_token(a, b, rows_of, x, g, t, y, zero, KIND, FOURS, MORE, BASE, EVEN, ODD, SUMS)
            x = next_x
        else:
            for j in tl.static_range(8):
                at = step * 256 + 32 * j
                x = inputs(x_ptrs + at, here, KIND, EVEN is not None)
                y = _eight_tokens(a, b, rows_of, x, y, zero, j, KIND, FOURS, MORE, BASE, EVEN, ODD, SUMS)
                if BLOCK_T == 16:  # next to those: codes are taken apart once
                    x = inputs(z_ptrs + at, here, KIND, EVEN is not None)
                    z = _eight_tokens(a, b, rows_of, x, z, zero, j, KIND, FOURS, MORE, BASE, EVEN, ODD, SUMS)
        a, b = next_a, next_b
    acc = sums_of_rows(y, z, WARPS, BLOCK_T, GATED) * scale
    finish_tile(
        acc, tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T), bias_ptr, add_ptr, y_ptr, squares_ptr, next_ptr,
        scaled_ptr, sums_ptr, rows, y_stride, add_stride, eps,
        N, K, BLOCK_T, BLOCK_N, GATED, ACTIVATION, HAS_BIAS, HAS_ADD, 0, 1, NEXT,
    )  # fmt: skip


def fragment_warps(programs: int, tiles: int, rows: int) -> int:
    """Warps of a program, which share the tiles along K: so many that multiprocessors are full of them, as while one
    waits others work; with several tokens a warp has twice the registers (one H200, 2026-11-29)."""
    most, room = (16, 24) if rows == 1 else (8, 8)
    warps = 4
    while warps < most and 2 * warps * programs <= room * _PROCESSORS:
        warps *= 2
    return min(warps, int(triton.next_power_of_2(tiles)))


def few(
    x: Tensor | Scaled,
    tiles: Tensor,
    kind: str,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    next_norm: Tensor | None = None,
    out: Tensor | None = None,
    warps: int | None = None,
) -> tuple[Tensor, Scaled | None]:
    """The product with `gguf_fragments.fragments`, of x [T, K] or of x that the product before it normalised, and what
    `next_norm` needs of it: as `matmul.matmul`. out: [T, outputs], of contiguous rows."""
    if isinstance(x, Tensor):
        x = x.contiguous()  # two values are loaded as one word
    values = x.values if isinstance(x, Scaled) else x
    rows, k = values.shape
    outputs = len(tiles) * LINES // (2 if gate else 1)
    assert tiles.shape[1] == k // BLOCK, (tiles.shape, values.shape)
    y = result(values, outputs, None) if out is None else out
    assert y.shape == (rows, outputs) and y.stride(1) == 1, (y.shape, y.stride())
    launch = SplitProduct(
        x, y, bias, eps=eps, gate=gate, add=add, next_norm=next_norm, tickets=None,
        block_n=LINES * (1 if gate else 2), block_t=1 if rows == 1 else 8 if rows <= 8 else 16, splits=1,
    )  # fmt: skip
    warps, of, asm = warps or fragment_warps(launch.grid[0], k // BLOCK, rows), FRAGMENTS[kind], launch.constants["ASM"]
    even, odd, sums_of_x = assembly(kind, values.dtype) if asm else (None, None, None)
    if rows:
        _fragments_kernel[launch.grid](
            values, tiles, *launch.arguments, **launch.constants, KIND=kind, FOURS=of.fours, MORE=of.more,
            WORDS=LINES * of.row_bytes // 4, BASE=(128.0 if values.dtype == torch.bfloat16 else 1024.0) if asm else 0.0,
            EVEN=even, ODD=odd, SUMS=sums_of_x, WARPS=warps, num_warps=warps,
        )  # fmt: skip
    return y, launch.scaled
