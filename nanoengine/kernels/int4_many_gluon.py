"""`int4.int4_linear` of 33 to some hundred rows by tensor cores (`wgmma`), whose left operand are the codes, cut in
registers while the product before them is made. Compute capability 9.0 only.

A thread loads, of each 32 inputs of a row of the weight, two words, in which are its shares of two products, as tensor
cores count inputs. Values are rounded once to the dtype of the tokens, as those of a dequantised copy. Tokens and words
come through shared memory.

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
    async_copy,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.int4 import Int4Weight
from nanoengine.kernels.int4_parts_gluon import do, finish_tile, group_at, weight_rows, word_at, word_rows
from nanoengine.kernels.int4_product import Int4Product
from nanoengine.kernels.matmul import Scaled
from nanoengine.kernels.matmul_gluon import shared_layout

_STEP = 128  # inputs that are multiplied at once; a group is a multiple of it

# Two words of 16 bits -> code 0 to 3 of each, as values: a mask makes them the last bits of two floats, $2 takes off
# what these are without a code, and $3 + $4 is the scale, of which $4 is so small that the value is rounded once.
_CUT = """{{
.reg .b32 a, b;
shr.b32 a, $1, {shift};
lop3.b32 a, a, 0x000F000F, {base}, 0xEA;
mov.b32 b, {one};
fma.rn.{kind} a, a, b, $2;
mul.rn.{kind} b, a, $4;
fma.rn.{kind} $0, a, $3, b;
}}"""


def _cuts(**kind: str) -> tuple[gl.constexpr, ...]:
    return tuple(gl.constexpr(_CUT.format(shift=4 * code, **kind)) for code in range(4))


_BF16_0, _BF16_1, _BF16_2, _BF16_3 = _cuts(kind="bf16x2", base="0x43004300", one="0x3F803F80")
_FP16_0, _FP16_1, _FP16_2, _FP16_3 = _cuts(kind="f16x2", base="0x64006400", one="0x3C003C00")


@gluon.jit
def _run(asm: gl.constexpr, words, taken, high, low):
    return gl.inline_asm_elementwise(
        asm, "=r,r,r,r,r", [words, taken, high, low], dtype=taken.dtype, is_pure=True, pack=2
    )


@gluon.constexpr_function
def _words_layout(warps):
    """Of [16 * warps, 32]: a thread has the words whose codes tensor cores take from it."""
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    across = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([[0, 1], [8, 0], [0, 8], [0, 16]], lanes, across, [], [16 * warps, 32])


@gluon.jit
def _of_group(scales_ptr, zeros_ptr, at, HAS_ZEROS: gl.constexpr):
    """(scales, zeros) of rows, as they are in memory."""
    scale = gl.load(scales_ptr + at)
    if HAS_ZEROS:
        return scale, gl.load(zeros_ptr + at)
    else:
        return scale, scale


@gluon.jit
def _request(ptrs, wanted, SIZE: gl.constexpr):
    """Asks for SIZE bytes at each of the pointers that are wanted, to be in L2 soon."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [ptrs.to(gl.int64), gl.where(wanted, 1, 0), gl.full(wanted.shape, SIZE, gl.int32, wanted.type.layout)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _values(
    words, scale, zero, x_desc, OF_WORDS: gl.constexpr, OF_VALUES: gl.constexpr, HAS_ZEROS: gl.constexpr
):  # fmt: skip
    """Words [M, 32] -> 128 values of each row, in order, rounded once to the dtype of x."""
    rows: gl.constexpr = words.shape[0]
    dtype: gl.constexpr = x_desc.dtype
    taken = gl.full([rows], 8.0, gl.float32, layout=gl.SliceLayout(1, OF_WORDS))
    if HAS_ZEROS:
        taken = zero.to(gl.float32)
    taken = (-taken - (128.0 if dtype == gl.bfloat16 else 1024.0)).to(dtype)
    wide = scale.to(gl.float32)
    high = wide.to(dtype)
    low = (wide - high.to(gl.float32)).to(dtype)
    taken = gl.expand_dims(taken, 1).broadcast_to([rows, 32])
    high = gl.expand_dims(high, 1).broadcast_to([rows, 32])
    low = gl.expand_dims(low, 1).broadcast_to([rows, 32])
    if dtype == gl.bfloat16:
        even = gl.join(_run(_BF16_0, words, taken, high, low), _run(_BF16_2, words, taken, high, low))
        odd = gl.join(_run(_BF16_1, words, taken, high, low), _run(_BF16_3, words, taken, high, low))
    else:
        even = gl.join(_run(_FP16_0, words, taken, high, low), _run(_FP16_2, words, taken, high, low))
        odd = gl.join(_run(_FP16_1, words, taken, high, low), _run(_FP16_3, words, taken, high, low))
    both = gl.reshape(gl.join(even, odd), [rows, 4, 8, 2, 2])
    return gl.convert_layout(gl.reshape(gl.permute(both, (0, 1, 3, 4, 2)), [rows, 128]), OF_VALUES, assert_trivial=True)


@gluon.jit
def _ask_for_tokens(x_desc, xs, ready, stage, t0, k, BYTES: gl.constexpr):
    mbarrier.expect(ready.index(stage), BYTES)
    tma.async_copy_global_to_shared(x_desc, [t0, k], ready.index(stage), xs.index(stage))


@gluon.jit
def _step(
    step, acc, values, before, scale, zero, x_desc, xs, ready, t0, words, word_ptrs, scales_ptr, zeros_ptr, at,
    STEPS: gl.constexpr, EACH: gl.constexpr, OF_WORDS: gl.constexpr, OF_VALUES: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_T: gl.constexpr, HAS_ZEROS: gl.constexpr, TILED: gl.constexpr,
):  # fmt: skip
    """Starts the product with `values`, and makes those of the step behind it when that with `before` is made.
    scale, zero: of the step behind it."""
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
    acc = warpgroup_mma(values, xs.index(stage).permute((1, 0)), acc, is_async=True)
    acc, before = warpgroup_mma_wait(1, deps=(acc, before))
    if (step > 0) & (step - 1 + STAGES < STEPS):
        free = (step + STAGES - 1) % STAGES
        _ask_for_tokens(x_desc, xs, ready, free, t0, (step - 1 + STAGES) * 128, BLOCK_T * 256)
    async_copy.wait_group(max(0, STAGES - 2))
    mine = words.index((step + 1) % STAGES).load(OF_WORDS)
    ahead = word_ptrs + word_at(gl.minimum(step + STAGES, STEPS - 1) * 128, TILED)
    async_copy.async_copy_global_to_shared(words.index(stage), ahead)  # also behind the last: groups are counted
    async_copy.commit_group()
    next_values = _values(mine, scale, zero, x_desc, OF_WORDS, OF_VALUES, HAS_ZEROS)
    group = gl.minimum(step + 2, STEPS - 1) // EACH
    next_scale, next_zero = _of_group(scales_ptr, zeros_ptr, at + group * (16 if TILED else 1), HAS_ZEROS)
    return acc, next_values, next_scale, next_zero


@gluon.jit(do_not_specialize=["rows"])
def _many_kernel(
    x_desc, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr, ticket_ptr,
    squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, x_stride, y_stride, add_stride, eps,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr,
    WARPS: gl.constexpr, STAGES: gl.constexpr,
    HAS_ZEROS: gl.constexpr, TILED: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ADD: gl.constexpr, SQUARES: gl.constexpr, PARTS: gl.constexpr, NEXT: gl.constexpr,
    SPLITS: gl.constexpr, ASM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    width: gl.constexpr = 16 * WARPS
    steps: gl.constexpr = K // 128
    each: gl.constexpr = GROUP // 128  # steps of a group
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_T, 16]
    )
    of_values: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    of_words: gl.constexpr = _words_layout(WARPS)
    t0 = gl.program_id(2) * BLOCK_T
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_T, 128], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    if PDL:
        do("griddepcontrol.launch_dependents; // $0")
    ask: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    source = weight_rows(gl.arange(0, width, layout=gl.SliceLayout(1, ask)), N, BLOCK_N, GATED)[:, None]
    word_ptrs = word_rows(codes_ptr, source, K, TILED) + gl.arange(0, 32, layout=gl.SliceLayout(0, ask))[None, :]
    words = gl.allocate_shared_memory(gl.int16, [STAGES, width, 32], gl.SwizzledSharedLayout(8, 2, 4, order=[1, 0]))
    for i in gl.static_range(STAGES):
        async_copy.async_copy_global_to_shared(words.index(i), word_ptrs + word_at(min(i, steps - 1) * 128, TILED))
        async_copy.commit_group()
    row = weight_rows(gl.arange(0, width, layout=gl.SliceLayout(1, of_words)), N, BLOCK_N, GATED)
    at = group_at(row, 0, K // GROUP, TILED)
    if TILED:  # steps of a tile's scales lie apart: each would be waited for
        scale_bytes: gl.constexpr = scales_ptr.dtype.element_ty.primitive_bitwidth // 8
        _request(scales_ptr + at, row % 16 == 0, K // GROUP * 16 * scale_bytes)
        if HAS_ZEROS:
            _request(zeros_ptr + at, row % 16 == 0, K // GROUP * 16)
    scale, zero = _of_group(scales_ptr, zeros_ptr, at, HAS_ZEROS)
    next_scale, next_zero = _of_group(
        scales_ptr, zeros_ptr, at + min(1, steps - 1) // each * (16 if TILED else 1), HAS_ZEROS
    )
    async_copy.wait_group(STAGES - 1)
    values = _values(words.index(0).load(of_words), scale, zero, x_desc, of_words, of_values, HAS_ZEROS)
    if PDL:
        do("griddepcontrol.wait; // $0")
    for i in gl.static_range(STAGES):
        if i < steps:
            _ask_for_tokens(x_desc, xs, ready, i, t0, i * 128, BLOCK_T * 256)

    acc = gl.zeros([width, BLOCK_T], gl.float32, layout=mma)
    others = values
    for pair in range(steps // 2):  # values that tensor cores still read stay where they are
        acc, others, next_scale, next_zero = _step(
            2 * pair, acc, values, others, next_scale, next_zero, x_desc, xs, ready, t0, words, word_ptrs,
            scales_ptr, zeros_ptr, at, steps, each, of_words, of_values, STAGES, BLOCK_T, HAS_ZEROS, TILED,
        )  # fmt: skip
        acc, values, next_scale, next_zero = _step(
            2 * pair + 1, acc, others, values, next_scale, next_zero, x_desc, xs, ready, t0, words, word_ptrs,
            scales_ptr, zeros_ptr, at, steps, each, of_words, of_values, STAGES, BLOCK_T, HAS_ZEROS, TILED,
        )  # fmt: skip
    if steps % 2 == 1:
        acc, others, next_scale, next_zero = _step(
            gl.to_tensor(steps - 1), acc, values, others, next_scale, next_zero, x_desc, xs, ready, t0, words,
            word_ptrs, scales_ptr, zeros_ptr, at, steps, each, of_words, of_values, STAGES, BLOCK_T, HAS_ZEROS, TILED,
        )  # fmt: skip
    acc, values, others = warpgroup_mma_wait(0, deps=(acc, values, others))
    async_copy.wait_group(0)
    finish_tile(
        acc, bias_ptr, add_ptr, y_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, y_stride,
        add_stride, eps, N, K, BLOCK_T, BLOCK_N, WARPS, GATED, ACTIVATION, HAS_BIAS, HAS_ADD, SQUARES, PARTS, NEXT,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ManyTile:
    """Tokens a program has, its warps, of which each has 16 rows of the weight, and stages of the tokens' pipeline."""

    block_t: int
    warps: int
    stages: int


def tile_for(rows: int, n: int) -> ManyTile:
    """n: rows of the weight. Two programs on a multiprocessor, if there are so many; else more stages. A weight of very
    many rows is read once for 256 tokens. From sizes of Qwen3-8B, bf16, one H200, Triton 3.6, 2026-11-30."""
    if rows <= 64:
        return ManyTile(max(32, triton.next_power_of_2(rows)), 8, 6)
    if 128 < rows <= 256 and n > 16384:
        return ManyTile(256, 4, 3)
    return ManyTile(128, 4, 3 if triton.cdiv(rows, 128) * triton.cdiv(n, 64) > 132 else 5)


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
    tile: ManyTile | None = None,
) -> tuple[Tensor, Scaled | None]:
    """As `int4_triton.product`."""
    values = x.values if isinstance(x, Scaled) else x
    rows, k = values.shape
    tile = tile or tile_for(rows, weight.shape[0])
    launch = Int4Product(
        x, weight, bias, eps=eps, gate=gate, add=add, next_norm=next_norm, out=out,
        block_n=tile.warps * (8 if gate else 16), block_t=tile.block_t,
    )  # fmt: skip
    if rows:
        lies = shared_layout(tile.block_t, _STEP, values.dtype)
        _many_kernel[launch.grid](
            TensorDescriptor.from_tensor(values, [tile.block_t, _STEP], lies), *launch.arguments,
            WARPS=tile.warps, STAGES=min(tile.stages, k // _STEP), num_warps=tile.warps, **launch.constants,
        )  # fmt: skip
    return launch.y, launch.scaled
