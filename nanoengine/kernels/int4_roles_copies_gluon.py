"""The warp that feeds `int4_roles_gluon`: which tiles a program has, and copies of tokens and codes, stage by stage."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanoengine.kernels.int4 import Int4Weight
from nanoengine.kernels.int4_parts_gluon import do

M = gl.constexpr(64)  # rows of the weight of a warpgroup
STEP = gl.constexpr(128)  # inputs of a stage; a group is a multiple of it
TOKENS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2))
TILES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=3))


@gluon.jit
def _ask_for_codes(
    codes_desc, boxes, ready, stage, n, step, N: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
    GATED: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Of a stage: rows n and on of all warpgroups; below a warpgroup's rows of the gate those of up. BYTES: of all that
    belongs to a stage, tokens too."""
    count: gl.constexpr = 2 if GATED else 1
    mbarrier.expect(ready.index(stage), BYTES)
    for i in gl.static_range(CONSUMERS * count):
        row = n + i // count * BLOCK_N + i % count * N
        box = boxes.index(stage * (CONSUMERS * count) + i)
        tma.async_copy_global_to_shared(codes_desc, [row // 16, step * 16, 0], ready.index(stage), box)


@gluon.jit
def _ask_for_tokens(x_desc, xs, ready, stage, t0, step):
    for half in gl.static_range(2):
        place = [t0, step * 128 + half * 64]
        tma.async_copy_global_to_shared(x_desc, place, ready.index(stage), xs.index(stage * 2 + half))


@gluon.jit
def _request(ptr, n, N: gl.constexpr, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
             GATED: gl.constexpr):  # fmt: skip
    """Asks for what belongs to the groups of rows n and on to be in L2 soon: in tiles every fourth step has a line of
    its own."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    each: gl.constexpr = BLOCK_N * CONSUMERS // 16  # tiles
    size: gl.constexpr = GROUPS * 16 * (ptr.dtype.element_ty.primitive_bitwidth // 8)
    tile, tiles = n // 16 + lane, N // 16
    wanted = lane < each
    if GATED:
        tile = n // 16 + lane % each + lane // each * (N // 16)
        tiles = N // 8
        wanted = lane < 2 * each
    at = ptr + tile.to(gl.int64) * (GROUPS * 16)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [at.to(gl.int64), gl.where(wanted & (tile < tiles), 1, 0), gl.full([32], size, gl.int32, lane.type.layout)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def work(rows, N: gl.constexpr, BLOCK_T: gl.constexpr, WIDTH: gl.constexpr, SPLITS: gl.constexpr):
    """(part of K, tile of tokens, first tile of the weight, how far the next is, how many). WIDTH: outputs of a tile.
    Programs of a tile follow each other, so that a GPU that runs fewer at a time comes to an end, too."""
    tiles_t = gl.cdiv(rows, BLOCK_T)
    rest = gl.program_id(0) // SPLITS
    first, stride = rest // tiles_t, gl.num_programs(0) // (SPLITS * tiles_t)
    count = gl.cdiv((N + WIDTH - 1) // WIDTH - first, stride)
    return gl.program_id(0) % SPLITS, rest % tiles_t, first, stride, count


@gluon.jit
def produce(
    x_desc, codes_desc, scales_ptr, zeros_ptr, xs, boxes, ready, free, rows,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, SPLITS: gl.constexpr, HAS_ZEROS: gl.constexpr,
    GATED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp: has everything copied. Codes of the first stages do not wait for the kernel in front."""
    steps: gl.constexpr = K // STEP // SPLITS
    width: gl.constexpr = BLOCK_N * CONSUMERS
    size: gl.constexpr = BLOCK_T * 256 + CONSUMERS * 4096
    split, tile_t, first, stride, count = work(rows, N, BLOCK_T, width, SPLITS)
    t0 = tile_t * BLOCK_T
    k0 = split * steps
    _request(scales_ptr, first * width, N, K // GROUP, BLOCK_N, CONSUMERS, GATED)
    if HAS_ZEROS:
        _request(zeros_ptr, first * width, N, K // GROUP, BLOCK_N, CONSUMERS, GATED)
    for i in gl.static_range(STAGES):
        _ask_for_codes(codes_desc, boxes, ready, i, first * width, k0 + i, N, BLOCK_N, CONSUMERS, GATED, size)
    if PDL:
        do("griddepcontrol.wait; // $0")
    for i in gl.static_range(STAGES):
        _ask_for_tokens(x_desc, xs, ready, i, t0, k0 + i)
    for at in range(STAGES, count * steps):
        stage, step = at % STAGES, k0 + at % steps
        n = (first + at // steps * stride) * width
        if at % steps == 0:
            _request(scales_ptr, n, N, K // GROUP, BLOCK_N, CONSUMERS, GATED)
            if HAS_ZEROS:
                _request(zeros_ptr, n, N, K // GROUP, BLOCK_N, CONSUMERS, GATED)
        mbarrier.wait(free.index(stage), (at // STAGES & 1) ^ 1)
        _ask_for_codes(codes_desc, boxes, ready, stage, n, step, N, BLOCK_N, CONSUMERS, GATED, size)
        _ask_for_tokens(x_desc, xs, ready, stage, t0, step)


def described(x: Tensor, weight: Int4Weight, block_t: int, lines: int) -> tuple[Any, Any]:
    """What the copy engine knows of tokens and codes. lines: rows of the weight it copies at once."""
    n, k = weight.shape
    codes, size = weight.codes.view(torch.int16), [n // 16, k // 8, 32]
    return (
        TensorDescriptor.from_tensor(x, [block_t, 64], TOKENS.value),
        TensorDescriptor(codes, size, [4 * k, 32, 1], [lines // 16, 16, 32], TILES.value),
    )
