"""`int4.int4_linear` of up to 8 rows and a weight in tiles by tensor cores, each code cut in the registers into which
it was loaded.

Gluon says where everything lies, which Triton does not: sixteen bytes that a thread loads of a row of the weight are
its share of eight products of tensor cores (`mma.sync`, 16 rows of the weight x 16 inputs x 8 tokens), so codes pass
through no shared memory, and two instructions cut two. Codes stand on 128 (bfloat16) or 1024 (float16); a product with
ones says how much of a sum that, and the zero, was. Each warp of a program has a part of K, of whose codes it asks for
as many as registers hold before it waits for the kernel in front; scales and zeros go to shared memory, and sums are
joined there.

Gluon has no interpreter: this is tested on a GPU, and compiled everywhere. `int4_triton` does the same without the
order, for everything that this does not take.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.int4 import Int4Weight
from nanoengine.kernels.int4_parts_gluon import do, finish_tile, weight_rows, word_at, word_rows
from nanoengine.kernels.int4_product import Int4Product
from nanoengine.kernels.matmul import Scaled

_STEP = 128  # inputs whose codes a thread's sixteen bytes are a quarter of, for a row; a group is a multiple of it


def _cut(code: int, base: str) -> gl.constexpr:
    """Two words of 16 bits -> code 0 to 3 of each, as the last bits of two floats."""
    mask = "lop3.b32 $0, {from_}, 0x000F000F, " + base + ", 0xEA;"
    if code == 0:
        return gl.constexpr(mask.format(from_="$1"))
    return gl.constexpr(f"{{ .reg .b32 a; shr.b32 a, $1, {4 * code}; {mask.format(from_='a')} }}")


_BF16_0, _BF16_1, _BF16_2, _BF16_3 = (_cut(code, "0x43004300") for code in range(4))
_FP16_0, _FP16_1, _FP16_2, _FP16_3 = (_cut(code, "0x64006400") for code in range(4))


@gluon.jit
def _lift(asm: gl.constexpr, words, x_ptr):
    return gl.inline_asm_elementwise(asm, "=r,r", [words], dtype=x_ptr.dtype.element_ty, is_pure=True, pack=2)


@gluon.jit
def _lifted(words, x_ptr, CODE: gl.constexpr):
    """Code 0 to 3 of each word plus 128 (bfloat16) or 1024 (float16)."""
    if x_ptr.dtype.element_ty == gl.bfloat16:
        if CODE == 0:
            return _lift(_BF16_0, words, x_ptr)
        elif CODE == 1:
            return _lift(_BF16_1, words, x_ptr)
        elif CODE == 2:
            return _lift(_BF16_2, words, x_ptr)
        else:
            return _lift(_BF16_3, words, x_ptr)
    else:
        if CODE == 0:
            return _lift(_FP16_0, words, x_ptr)
        elif CODE == 1:
            return _lift(_FP16_1, words, x_ptr)
        elif CODE == 2:
            return _lift(_FP16_2, words, x_ptr)
        else:
            return _lift(_FP16_3, words, x_ptr)


@gluon.jit
def _along(size: gl.constexpr, axis: gl.constexpr, LAYOUT: gl.constexpr):
    """0 to size - 1 along an axis of three."""
    if axis == 0:
        return gl.arange(0, size, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    elif axis == 1:
        return gl.arange(0, size, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    else:
        return gl.arange(0, size, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]


@gluon.constexpr_function
def _tile_layout(warps):
    """Of [warps, 16 scales of a tile]: a thread has those of the rows of which it has sums, which are neighbours."""
    lanes = [[0, 0], [0, 0], [0, 2], [0, 4], [0, 8]]
    return gl.DistributedLinearLayout(
        [[0, 1]], lanes, [[1 << i, 0] for i in range(warps.bit_length() - 1)], [], [warps, 16]
    )


@gluon.jit
def _ask_for_groups(
    ptr, WARPS: gl.constexpr, STEPS: gl.constexpr, CHUNK: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Has scales or zeros of all groups of a program's tile, or of its tiles of the gate and of up, copied to shared
    memory: [steps of all tiles, warps, 16]."""
    own: gl.constexpr = 16 // (ptr.dtype.element_ty.primitive_bitwidth // 8)
    chunks: gl.constexpr = (2 if GATED else 1) * STEPS // CHUNK
    lay: gl.constexpr = gl.BlockedLayout([1, own], [2 * own, 16 // own], [WARPS, 1], [1, 0])
    kept = gl.allocate_shared_memory(
        ptr.dtype.element_ty, [chunks, CHUNK * WARPS, 16], gl.SwizzledSharedLayout(own, 1, 1, [1, 0])
    )
    for c in gl.static_range(chunks):
        i = c * (CHUNK * WARPS) + gl.arange(0, CHUNK * WARPS, layout=gl.SliceLayout(1, lay))
        block = gl.minimum(i % WARPS * STEPS + i // WARPS % STEPS, K // 128 - 1)
        tile = gl.program_id(0) * BLOCK_N // 16 + i // (STEPS * WARPS) * (N // 16)
        at = (tile.to(gl.int64) * (K // GROUP) + block // (GROUP // 128)) * 16
        ptrs = ptr + at[:, None] + gl.arange(0, 16, layout=gl.SliceLayout(0, lay))[None, :]
        async_copy.async_copy_global_to_shared(kept.index(c), ptrs)
    return kept._reinterpret(
        ptr.dtype.element_ty, [chunks * CHUNK, WARPS, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )


@gluon.jit
def _of_step(kept, s, STEPS: gl.constexpr, BLOCK_N: gl.constexpr, GATED: gl.constexpr, LAYOUT: gl.constexpr):
    """[warps, rows] of a step, of what `_ask_for_groups` copied."""
    warps: gl.constexpr = kept.shape[1]
    lay: gl.constexpr = _tile_layout(warps)
    found = gl.reshape(kept.index(s).load(lay), [warps, 8, 2])
    if GATED:
        upper = gl.program_id(0) * BLOCK_N % 16 >= 8  # the rows of this program in tiles of 16
        one, two = gl.split(found)
        three, four = gl.split(gl.reshape(kept.index(STEPS + s).load(lay), [warps, 8, 2]))
        found = gl.join(gl.where(upper, two, one), gl.where(upper, four, three))
    return gl.convert_layout(gl.reshape(gl.permute(found, (0, 2, 1)), [warps, 16]), LAYOUT, assert_trivial=True)


@gluon.jit
def _words(ptrs, block, BLOCKS: gl.constexpr, RAGGED: gl.constexpr, TILED: gl.constexpr):
    """(words of 128 inputs,); of the last ones where there are no such."""
    if RAGGED:
        block = gl.minimum(block, BLOCKS - 1)
    return (gl.load(ptrs + word_at(block * 128, TILED)),)


@gluon.jit
def _tokens(ptrs, there, block, BLOCKS: gl.constexpr, RAGGED: gl.constexpr):
    """What is multiplied with codes 0 to 3 of 128 inputs; 0 where there are no such. Threads of tokens that are not
    there load nothing, and whatever they have goes into sums of those."""
    if RAGGED:
        there = there & (block < BLOCKS)
        return (
            gl.load(ptrs, mask=there, other=0.0), gl.load(ptrs + 8, mask=there, other=0.0),
            gl.load(ptrs + 16, mask=there, other=0.0), gl.load(ptrs + 24, mask=there, other=0.0),
        )  # fmt: skip
    else:
        return (
            gl.load(ptrs, mask=there), gl.load(ptrs + 8, mask=there),
            gl.load(ptrs + 16, mask=there), gl.load(ptrs + 24, mask=there),
        )  # fmt: skip


@gluon.jit(do_not_specialize=["rows"])
def _few_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr, ticket_ptr,
    squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, x_stride, y_stride, add_stride, eps,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr,
    WARPS: gl.constexpr, STEPS: gl.constexpr, CHUNK: gl.constexpr, AHEAD: gl.constexpr,
    SHORT: gl.constexpr,
    HAS_ZEROS: gl.constexpr, TILED: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ADD: gl.constexpr, SQUARES: gl.constexpr, PARTS: gl.constexpr, NEXT: gl.constexpr,
    SPLITS: gl.constexpr, ASM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    width: gl.constexpr = 16
    blocks: gl.constexpr = K // 128
    ragged: gl.constexpr = blocks < WARPS * STEPS
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    of_words: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    of_x: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    of_rows: gl.constexpr = gl.SliceLayout(2, mma)
    offset: gl.constexpr = 128.0 if x_ptr.dtype.element_ty == gl.bfloat16 else 1024.0
    if PDL:
        do("griddepcontrol.launch_dependents; // $0")
    rows_of_words = weight_rows(_along(width, 1, of_words), N, BLOCK_N, GATED)
    word_ptrs = word_rows(codes_ptr, rows_of_words, K, TILED) + _along(32, 2, of_words)
    block = _along(WARPS, 0, of_words) * STEPS
    words = ()
    for s in gl.static_range(AHEAD):
        words += _words(word_ptrs, block + s, blocks, ragged, TILED)
    scales = _ask_for_groups(scales_ptr, WARPS, STEPS, CHUNK, N, K, GROUP, BLOCK_N, GATED)
    zeros = scales
    if HAS_ZEROS:
        zeros = _ask_for_groups(zeros_ptr, WARPS, STEPS, CHUNK, N, K, GROUP, BLOCK_N, GATED)
    async_copy.commit_group()
    if PDL:
        do("griddepcontrol.wait; // $0")

    t = gl.program_id(2) * BLOCK_T + _along(BLOCK_T, 2, of_x)
    k = _along(32, 1, of_x)
    x_block = _along(WARPS, 0, of_x) * STEPS
    x_ptrs = x_ptr + t.to(gl.int64) * x_stride + x_block * 128 + (k // 8 * 32 + k % 8)
    there = t < rows
    acc = gl.zeros([WARPS, width, BLOCK_T], gl.float32, layout=mma)
    for i in gl.static_range((STEPS * 2 + width - 1) // width):  # all lines of a warp's part of the first token at once
        line = _along(WARPS, 0, mma) * (STEPS * 128) + (i * width + _along(width, 1, mma)) % (STEPS * 2) * 64
        seen = gl.load(x_ptr + line, mask=line < K, other=0.0).to(gl.float32)
        acc += gl.where(rows < 0, seen, 0.0)  # never, and the compiler cannot know
    ones = gl.full([WARPS, 16, 32], 1.0, x_ptr.dtype.element_ty, layout=of_words)
    x = _tokens(x_ptrs, there, x_block, blocks, ragged)
    async_copy.wait_group(0)
    for s in gl.static_range(STEPS):
        if s + 1 < STEPS:
            next_x = _tokens(x_ptrs + (s + 1) * 128, there, x_block + (s + 1), blocks, ragged)
        sums = gl.zeros([WARPS, width, BLOCK_T], gl.float32, layout=mma)
        plain = gl.zeros([WARPS, 16, BLOCK_T], gl.float32, layout=mma)
        if SHORT:  # sums of two halves
            half = mma_v2(_lifted(words[s], x_ptr, 1), x[1], mma_v2(_lifted(words[s], x_ptr, 0), x[0], sums))
            sums = mma_v2(_lifted(words[s], x_ptr, 3), x[3], mma_v2(_lifted(words[s], x_ptr, 2), x[2], sums)) + half
        else:
            for code in gl.static_range(4):
                sums = mma_v2(_lifted(words[s], x_ptr, code), x[code], sums)
        for code in gl.static_range(4):
            plain = mma_v2(ones, x[code], plain)
        if s + 1 < STEPS:
            x = next_x
        scale = _of_step(scales, s, STEPS, BLOCK_N, GATED, of_rows)
        zero = 8.0
        if HAS_ZEROS:
            zero = _of_step(zeros, s, STEPS, BLOCK_N, GATED, of_rows).to(gl.float32)[:, :, None]
        acc += scale.to(gl.float32)[:, :, None] * (sums - (offset + zero) * plain)
        if s + AHEAD < STEPS:
            words += _words(word_ptrs, block + (s + AHEAD), blocks, ragged, TILED)
            do("bar.warp.sync 0xffffffff; // $0")  # loads before it stay there
    finish_tile(
        gl.sum(acc, 0), bias_ptr, add_ptr, y_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, y_stride,
        add_stride, eps, N, K, BLOCK_T, BLOCK_N, WARPS, GATED, ACTIVATION, HAS_BIAS, HAS_ADD, SQUARES, PARTS, NEXT,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FewTile:
    """Warps that share K, how many times 128 inputs ahead each loads words, whether it adds up halves of 128 inputs by
    themselves (less to wait for, more to add), and registers of a thread; 0: as many as it takes."""

    warps: int
    ahead: int
    short: bool
    registers: int = 0


def tile_for(n: int, k: int) -> FewTile:
    """n: rows of the weight. From sizes of Qwen3-8B in a chain, bf16, one H200, Triton 3.6, 2026-11-29."""
    if k > 4096:
        return FewTile(8, 8, short=False, registers=128)
    return FewTile(8, 4, short=True) if n <= 4096 else FewTile(4, 8, short=True, registers=128)


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
    tile: FewTile | None = None,
) -> tuple[Tensor, Scaled | None]:
    """As `int4_triton.product`, of a weight in tiles."""
    assert weight.tiled
    values = x.values if isinstance(x, Scaled) else x
    n, k = weight.shape
    tile = tile or tile_for(n, k)
    steps = triton.cdiv(k // _STEP, tile.warps)
    launch = Int4Product(
        x, weight, bias, eps=eps, gate=gate, add=add, next_norm=next_norm, out=out,
        block_n=8 if gate else 16, block_t=8,
    )  # fmt: skip
    if len(values):
        _few_kernel[launch.grid](
            values, *launch.arguments, WARPS=tile.warps, STEPS=steps, CHUNK=min(8, steps & -steps),
            AHEAD=min(tile.ahead, steps), SHORT=tile.short, num_warps=tile.warps, maxnreg=tile.registers or None,
            **launch.constants,
        )  # fmt: skip
    return launch.y, launch.scaled
