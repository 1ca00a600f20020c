"""`int4.int4_linear` of some ten to some hundred rows by warps with roles. Compute capability 9.0 only.

One warp asks the copy engine for tokens and codes, stage by stage. Two or three warpgroups share the tokens, and have
64 rows of the weight each: they cut codes in registers, half a stage at a time, while tensor cores multiply the half
before (`wgmma`, the left operand in registers), or what others have cut. Values are rounded once to the dtype of the
tokens, as those of a dequantised copy. A program stays for several tiles of the weight where there are more than
multiprocessors. Where there are fewer, two programs have half of K each: each leaves its sums of one half of the tokens
to the other, and finishes the other half.

Gluon has no interpreter: this is tested on a GPU, and compiled everywhere. `int4_triton` does the same without the
order.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.int4 import Int4Weight
from nanoengine.kernels.int4_cut_gluon import halves_of_words, values_of, words_layout
from nanoengine.kernels.int4_parts_gluon import do, group_at, rows_from
from nanoengine.kernels.int4_product import Int4Product
from nanoengine.kernels.int4_roles_copies_gluon import STEP, TILES, TOKENS, WORDS, M, described, produce, work
from nanoengine.kernels.int4_roles_ends_gluon import ask_around, exchange, finish, halves, prepare
from nanoengine.kernels.matmul import Scaled
from nanoengine.kernels.paged_attention_copies_gluon import barrier


@gluon.jit
def _of_group(scales_ptr, zeros_ptr, at, HAS_ZEROS: gl.constexpr):
    """(scales, zeros) of rows, as they are in memory."""
    scale = gl.load(scales_ptr + at)
    if HAS_ZEROS:
        return scale, gl.load(zeros_ptr + at)
    else:
        return scale, scale


@gluon.jit
def _first_group(
    scales_ptr, zeros_ptr, tile, begin, OF_WORDS: gl.constexpr, N: gl.constexpr, GROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr, HAS_ZEROS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """(where groups of a tile's rows begin, scales, zeros of the first)."""
    row = rows_from(tile * BLOCK_N, gl.arange(0, M, layout=gl.SliceLayout(1, OF_WORDS)), N, GATED)
    group = group_at(row, 0, GROUPS, True)
    scale, zero = _of_group(scales_ptr, zeros_ptr, group + begin, HAS_ZEROS)
    return group, scale, zero


@gluon.jit
def _multiply(
    acc, at, number: gl.constexpr, scale, zero, group, k0, scales_ptr, zeros_ptr, xs, words, ready, free,
    STEPS: gl.constexpr, EACH: gl.constexpr, LINE: gl.constexpr, ALL: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, HAS_ZEROS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Adds the products of a tile's steps, the first of which is in stage `at` of all."""
    dtype: gl.constexpr = xs.dtype
    of_values: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    of_words: gl.constexpr = words_layout(16, False)
    for step in range(STEPS):
        stage = at % STAGES
        behind = gl.minimum(k0 + step + 1, ALL - 1) // EACH
        next_scale, next_zero = _of_group(scales_ptr, zeros_ptr, group + behind * LINE, HAS_ZEROS)
        mbarrier.wait(ready.index(stage), at // STAGES & 1)
        left, right = halves_of_words(words.index(stage * CONSUMERS + number), GATED)
        a = values_of(left, scale, zero, dtype, of_words, of_values, HAS_ZEROS)
        acc = warpgroup_mma(a, xs.index(stage * 2).permute((1, 0)), acc, is_async=True)
        if step > 0:  # the products before these are done with their stage
            barrier()
            mbarrier.arrive(free.index((at - 1) % STAGES))
        b = values_of(right, scale, zero, dtype, of_words, of_values, HAS_ZEROS)
        acc = warpgroup_mma(b, xs.index(stage * 2 + 1).permute((1, 0)), acc, is_async=True)
        acc, a, b = warpgroup_mma_wait(0, deps=(acc, a, b))
        scale, zero = next_scale, next_zero
        at += 1
    barrier()
    mbarrier.arrive(free.index((at - 1) % STAGES))
    return acc


@gluon.jit
def _consume(
    number: gl.constexpr, xs, words, norms, ready, free, normed,
    scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr, ticket_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr,
    rows, y_stride, add_stride, eps,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr, SPLITS: gl.constexpr, HAS_ZEROS: gl.constexpr,
    GATED: gl.constexpr, ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ADD: gl.constexpr,
    SQUARES: gl.constexpr, NEXT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A warpgroup: the products of its 64 rows of the weight of each tile, and what follows them."""
    steps: gl.constexpr = K // STEP // SPLITS
    each: gl.constexpr = GROUP // STEP
    line: gl.constexpr = 16  # from a row's scale to that of its next group
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_T, 16])
    of_words: gl.constexpr = words_layout(16, False)
    split, tile_t, first, stride, count = work(rows, N, BLOCK_T, BLOCK_N * CONSUMERS, SPLITS)
    t0 = tile_t * BLOCK_T
    k0 = split * steps
    group, scale, zero = _first_group(
        scales_ptr, zeros_ptr, first * CONSUMERS + number, k0 // each * line, of_words, N, K // GROUP, BLOCK_N,
        HAS_ZEROS, GATED,
    )  # fmt: skip
    if PDL:
        do("griddepcontrol.wait; // $0")
    place = ((first * CONSUMERS + number) * gl.cdiv(rows, BLOCK_T) + tile_t).to(gl.int64)
    mark = 0
    if SPLITS > 1:  # programs have one tile
        mark = gl.load(ticket_ptr + 2 * place + split, cache_modifier=".cg") + 1
    at = 0
    for i in range(count):
        tile = (first + i * stride) * CONSUMERS + number
        acc = gl.zeros([M, BLOCK_T], gl.float32, layout=mma)
        acc = _multiply(
            acc, at, number, scale, zero, group, k0, scales_ptr, zeros_ptr, xs, words, ready, free,
            steps, each, line, K // STEP, STAGES, CONSUMERS, HAS_ZEROS, GATED,
        )  # fmt: skip
        at += steps
        group, scale, zero = _first_group(  # of the next tile, before the end of this one
            scales_ptr, zeros_ptr, tile + stride * CONSUMERS, k0 // each * line, of_words, N, K // GROUP, BLOCK_N,
            HAS_ZEROS, GATED,
        )  # fmt: skip
        one, two = halves(acc)
        half: gl.constexpr = BLOCK_T // 2
        n0 = tile * BLOCK_N
        if SPLITS > 1:
            add, weight = ask_around(
                n0, t0 + split * half, add_ptr, next_ptr, rows, add_stride, N, half, BLOCK_N, 4, HAS_ADD, NEXT
            )
            mine, other = gl.where(split == 0, one, two), gl.where(split == 0, two, one)
            mine = exchange(mine, other, part_ptr + place * (2 * M * half), ticket_ptr + 2 * place, mark, split)
            if SQUARES > 0:
                mbarrier.wait(normed.index(0), 0)
            finish(
                mine, n0, t0 + split * half, tile, norms.index(split), add, weight, bias_ptr, y_ptr, scaled_ptr,
                sums_ptr, rows, y_stride, N, half, BLOCK_N, 4, GATED, ACTIVATION, HAS_BIAS, HAS_ADD, SQUARES, NEXT,
            )  # fmt: skip
        else:
            if SQUARES > 0:
                mbarrier.wait(normed.index(0), 0)
            for part in gl.static_range(2):
                add, weight = ask_around(
                    n0, t0 + part * half, add_ptr, next_ptr, rows, add_stride, N, half, BLOCK_N, 4, HAS_ADD, NEXT
                )
                finish(
                    one if part == 0 else two, n0, t0 + part * half, tile, norms.index(part), add, weight, bias_ptr,
                    y_ptr, scaled_ptr, sums_ptr, rows, y_stride,
                    N, half, BLOCK_N, 4, GATED, ACTIVATION, HAS_BIAS, HAS_ADD, SQUARES, NEXT,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["rows"])
def _roles_kernel(
    x_desc, codes_desc, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr, ticket_ptr,
    squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, x_stride, y_stride, add_stride, eps,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    HAS_ZEROS: gl.constexpr, TILED: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ADD: gl.constexpr, SQUARES: gl.constexpr, PARTS: gl.constexpr, NEXT: gl.constexpr,
    SPLITS: gl.constexpr, ASM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    count: gl.constexpr = CONSUMERS * (2 if GATED else 1)
    lines: gl.constexpr = M // (2 if GATED else 1)
    xs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, BLOCK_T, 64], TOKENS)
    boxes = gl.allocate_shared_memory(gl.int16, [STAGES * count, lines // 16, 16, 32], TILES)
    words = boxes._reinterpret(gl.int16, [STAGES * CONSUMERS, M, 32], WORDS)
    norms = gl.allocate_shared_memory(gl.float32, [2, BLOCK_T // 2], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    normed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(normed.index(0), count=1)
    fence_async_shared()
    if PDL:
        do("griddepcontrol.launch_dependents; // $0")
    activation: gl.constexpr = ACTIVATION if GATED else "silu"  # None is no argument of a warp
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    0, xs, words, norms, ready, free, normed, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr,
                    ticket_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, y_stride, add_stride, eps,
                    N, K, GROUP, BLOCK_T, BLOCK_N, STAGES, CONSUMERS, SPLITS, HAS_ZEROS, GATED, activation,
                    HAS_BIAS, HAS_ADD, SQUARES, NEXT, PDL,
                )),
                (_consume, (
                    1, xs, words, norms, ready, free, normed, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr,
                    ticket_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, y_stride, add_stride, eps,
                    N, K, GROUP, BLOCK_T, BLOCK_N, STAGES, CONSUMERS, SPLITS, HAS_ZEROS, GATED, activation,
                    HAS_BIAS, HAS_ADD, SQUARES, NEXT, PDL,
                )),
                (produce, (
                    x_desc, codes_desc, scales_ptr, zeros_ptr, xs, boxes, ready, free, rows,
                    N, K, GROUP, BLOCK_T, BLOCK_N, STAGES, CONSUMERS, SPLITS, HAS_ZEROS, GATED, PDL,
                )),
                (prepare, (
                    norms, normed, squares_ptr, rows, eps,
                    N, K, BLOCK_T, BLOCK_N * CONSUMERS, SPLITS, SQUARES, PDL,
                )),
            ], [4, 1, 2], [232, 40, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    0, xs, words, norms, ready, free, normed, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr,
                    ticket_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, y_stride, add_stride, eps,
                    N, K, GROUP, BLOCK_T, BLOCK_N, STAGES, CONSUMERS, SPLITS, HAS_ZEROS, GATED, activation,
                    HAS_BIAS, HAS_ADD, SQUARES, NEXT, PDL,
                )),
                (_consume, (
                    1, xs, words, norms, ready, free, normed, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr,
                    ticket_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, y_stride, add_stride, eps,
                    N, K, GROUP, BLOCK_T, BLOCK_N, STAGES, CONSUMERS, SPLITS, HAS_ZEROS, GATED, activation,
                    HAS_BIAS, HAS_ADD, SQUARES, NEXT, PDL,
                )),
                (_consume, (
                    2, xs, words, norms, ready, free, normed, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr,
                    ticket_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, y_stride, add_stride, eps,
                    N, K, GROUP, BLOCK_T, BLOCK_N, STAGES, CONSUMERS, SPLITS, HAS_ZEROS, GATED, activation,
                    HAS_BIAS, HAS_ADD, SQUARES, NEXT, PDL,
                )),
                (produce, (
                    x_desc, codes_desc, scales_ptr, zeros_ptr, xs, boxes, ready, free, rows,
                    N, K, GROUP, BLOCK_T, BLOCK_N, STAGES, CONSUMERS, SPLITS, HAS_ZEROS, GATED, PDL,
                )),
                (prepare, (
                    norms, normed, squares_ptr, rows, eps,
                    N, K, BLOCK_T, BLOCK_N * CONSUMERS, SPLITS, SQUARES, PDL,
                )),
            ], [4, 4, 1, 2], [160, 160, 32, 32],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RolesTile:
    """Tokens of a program, warpgroups of 64 rows of the weight each, stages in shared memory, and parts of K: 1, or 2
    if all programs run at the same time."""

    block_t: int
    consumers: int
    stages: int
    splits: int = 1


_PROCESSORS = 132
_FLAGS = 512  # where those of this kernel begin in a weight's tickets; of such weights `int4_triton` has fewer tiles
_END = 6  # steps of one warpgroup in the time of a tile's end, or of an exchange of sums


def tile_for(rows: int, n: int, k: int) -> RolesTile:
    """The least work of the busiest multiprocessor. n: rows of the weight."""
    block_t = 32 if rows <= 32 else 64 if rows <= 64 else 128
    found = list[tuple[float, RolesTile]]()
    for consumers, splits in ((2, 1), (3, 1), (2, 2), (3, 2)):
        tiles_n, tiles_t = triton.cdiv(n, 64 * consumers), triton.cdiv(rows, block_t)
        programs = tiles_n * tiles_t * splits
        if splits > 1 and (programs > _PROCESSORS or n % (64 * consumers) or k % 256):
            continue
        turns = triton.cdiv(programs, _PROCESSORS // tiles_t * tiles_t)
        steps = turns * (consumers * (k // 128 / splits) + _END) + (splits - 1) * _END
        found.append((steps, RolesTile(block_t, consumers, 4, splits)))
    return min(found, key=lambda each: each[0])[1]


def takes(x: Tensor) -> bool:
    """Whether the copy engine can read x."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(1) == 1


def product(
    x: Tensor | Scaled,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    next_norm: Tensor | None = None,
    out: Tensor | None = None,
    tickets: Tensor | None = None,
    tile: RolesTile | None = None,
) -> tuple[Tensor, Scaled | None]:
    """As `int4_triton.product`, of a weight in tiles."""
    assert weight.tiled
    values = x.values if isinstance(x, Scaled) else x
    rows, (n, k) = len(values), weight.shape
    tile = tile or tile_for(rows, n, k)
    lines = 32 if gate else 64
    flags = None if tickets is None else tickets[_FLAGS:]
    launch = Int4Product(
        x, weight, bias, eps=eps, gate=gate, add=add, next_norm=next_norm, out=out, tickets=flags,
        block_n=lines, block_t=tile.block_t, splits=tile.splits,
    )  # fmt: skip
    if rows:
        tiles_t = triton.cdiv(rows, tile.block_t)
        tiles_n = triton.cdiv(launch.grid[0], tile.consumers)
        assert tile.splits == 1 or (launch.grid[0] % tile.consumers == 0 and tiles_t * tiles_n * 2 <= _PROCESSORS)
        wave = max(1, _PROCESSORS // (tiles_t * tile.splits))
        programs = min(tiles_n, wave) * tiles_t * tile.splits
        _roles_kernel[(programs,)](
            *described(values, weight, tile.block_t, lines), *launch.arguments,
            STAGES=min(tile.stages, k // 128 // tile.splits), CONSUMERS=tile.consumers, num_warps=4,
            **launch.constants,
        )  # fmt: skip
    return launch.y, launch.scaled
