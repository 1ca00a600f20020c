"""`int4.int4_linear` of 17 to some hundred rows by tensor cores (`wgmma`), whose left operand are the codes, cut in
registers while the product before them is made. Compute capability 9.0 only.

A thread loads, of each 32 inputs of a row of the weight, two words, in which are its shares of two products, as tensor
cores count inputs. Codes minus their zero are whole numbers, so a product is as exact as its input: the sum over 128
inputs is made first, and takes the group's scale. Tokens come through shared memory, which all warps read.

Gluon has no interpreter: this is tested on a GPU, and compiled everywhere. `int4_triton` does the same without the
order.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import torch
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
from nanoengine.kernels.int4_parts_gluon import do, finish_tile, weight_rows
from nanoengine.kernels.matmul import Scaled
from nanoengine.kernels.matmul_gluon import shared_layout
from nanoengine.kernels.matvec_parts_triton import result
from nanoengine.kernels.split_k_triton import SplitProduct

_STEP = 128  # inputs that are multiplied at once; a group is a multiple of it

# Two words of 16 bits -> code 0 to 3 of each minus what is in $2: a mask makes them the last bits of two floats.
_CUT = "{{ .reg .b32 a, b; shr.b32 a, $1, {shift}; lop3.b32 a, a, 0x000F000F, {base}, 0xEA; mov.b32 b, {one}; fma.rn.{kind} $0, a, b, $2; }}"  # noqa: E501


def _cuts(**kind: str) -> tuple[gl.constexpr, ...]:
    return tuple(gl.constexpr(_CUT.format(shift=4 * code, **kind)) for code in range(4))


_BF16_0, _BF16_1, _BF16_2, _BF16_3 = _cuts(kind="bf16x2", base="0x43004300", one="0x3F803F80")
_FP16_0, _FP16_1, _FP16_2, _FP16_3 = _cuts(kind="f16x2", base="0x64006400", one="0x3C003C00")


@gluon.jit
def _run(asm: gl.constexpr, words, taken):
    return gl.inline_asm_elementwise(asm, "=r,r,r", [words, taken], dtype=taken.dtype, is_pure=True, pack=2)


@gluon.constexpr_function
def _words_layout(warps):
    """Of [16 * warps, 32]: a thread has the words whose codes tensor cores take from it."""
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    across = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([[0, 1], [8, 0], [0, 8], [0, 16]], lanes, across, [], [16 * warps, 32])


@gluon.jit
def _cut(words, taken, LAYOUT: gl.constexpr):
    """Words [M, 32] -> 128 codes of each row, minus what `taken` [M] says, in order."""
    rows: gl.constexpr = words.shape[0]
    taken = gl.expand_dims(taken, 1).broadcast_to([rows, 32])
    if taken.dtype == gl.bfloat16:
        even = gl.join(_run(_BF16_0, words, taken), _run(_BF16_2, words, taken))
        odd = gl.join(_run(_BF16_1, words, taken), _run(_BF16_3, words, taken))
    else:
        even = gl.join(_run(_FP16_0, words, taken), _run(_FP16_2, words, taken))
        odd = gl.join(_run(_FP16_1, words, taken), _run(_FP16_3, words, taken))
    both = gl.reshape(gl.join(even, odd), [rows, 4, 8, 2, 2])
    return gl.convert_layout(gl.reshape(gl.permute(both, (0, 1, 3, 4, 2)), [rows, 128]), LAYOUT, assert_trivial=True)


@gluon.jit
def _taken(zeros_ptr, at, x_desc, HAS_ZEROS: gl.constexpr):
    """-(128 + zero) for bfloat16, -(1024 + zero) for float16."""
    offset: gl.constexpr = 128.0 if x_desc.dtype == gl.bfloat16 else 1024.0
    if HAS_ZEROS:
        return (-offset - gl.load(zeros_ptr + at).to(gl.float32)).to(x_desc.dtype)
    else:
        return gl.full(at.shape, -offset - 8.0, x_desc.dtype, layout=at.type.layout)


@gluon.jit
def _ask_for_tokens(x_desc, xs, ready, stage, t0, k, BYTES: gl.constexpr):
    mbarrier.expect(ready.index(stage), BYTES)
    tma.async_copy_global_to_shared(x_desc, [t0, k], ready.index(stage), xs.index(stage))


@gluon.jit(do_not_specialize=["rows"])
def _many_kernel(
    x_desc, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr, ticket_ptr,
    squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, x_stride, y_stride, add_stride, eps,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr,
    WARPS: gl.constexpr, STAGES: gl.constexpr,
    HAS_ZEROS: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ADD: gl.constexpr, SQUARES: gl.constexpr, PARTS: gl.constexpr, NEXT: gl.constexpr,
    SPLITS: gl.constexpr, ASM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    width: gl.constexpr = 16 * WARPS
    steps: gl.constexpr = K // 128
    each: gl.constexpr = GROUP // 128  # steps of a group
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_T, 16]
    )
    of_codes: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    of_words: gl.constexpr = _words_layout(WARPS)
    of_rows: gl.constexpr = gl.SliceLayout(1, mma)
    t0 = gl.program_id(2) * BLOCK_T
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_T, 128], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    if PDL:
        do("griddepcontrol.launch_dependents; // $0")
    ask: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    source = weight_rows(gl.arange(0, width, layout=gl.SliceLayout(1, ask)), N, BLOCK_N, GATED)[:, None]
    word_ptrs = codes_ptr + source * (K // 4) + gl.arange(0, 32, layout=gl.SliceLayout(0, ask))[None, :]
    words = gl.allocate_shared_memory(gl.int16, [STAGES, width, 32], gl.SwizzledSharedLayout(8, 2, 4, order=[1, 0]))
    for i in gl.static_range(STAGES):
        async_copy.async_copy_global_to_shared(words.index(i), word_ptrs + min(i, steps - 1) * 32)
        async_copy.commit_group()
    zero_at = weight_rows(gl.arange(0, width, layout=gl.SliceLayout(1, of_words)), N, BLOCK_N, GATED) * (K // GROUP)
    scale_at = weight_rows(gl.arange(0, width, layout=of_rows), N, BLOCK_N, GATED) * (K // GROUP)
    taken = _taken(zeros_ptr, zero_at, x_desc, HAS_ZEROS)
    next_taken = _taken(zeros_ptr, zero_at + min(1, steps - 1) // each, x_desc, HAS_ZEROS)
    scale = gl.load(scales_ptr + scale_at)
    async_copy.wait_group(STAGES - 1)
    codes = _cut(words.index(0).load(of_words), taken, of_codes)
    if PDL:
        do("griddepcontrol.wait; // $0")
    for i in gl.static_range(STAGES):
        if i < steps:
            _ask_for_tokens(x_desc, xs, ready, i, t0, i * 128, BLOCK_T * 256)

    acc = gl.zeros([width, BLOCK_T], gl.float32, layout=mma)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        sums = gl.zeros([width, BLOCK_T], gl.float32, layout=mma)
        sums = warpgroup_mma(codes, xs.index(stage).permute((1, 0)), sums, use_acc=False, is_async=True)
        taken = next_taken
        next_taken = _taken(zeros_ptr, zero_at + gl.minimum(step + 2, steps - 1) // each, x_desc, HAS_ZEROS)
        next_scale = gl.load(scales_ptr + scale_at + gl.minimum(step + 1, steps - 1) // each)
        async_copy.wait_group(STAGES - 2)
        next_codes = _cut(words.index((step + 1) % STAGES).load(of_words), taken, of_codes)
        ahead = word_ptrs + gl.minimum(step + STAGES, steps - 1) * 32
        async_copy.async_copy_global_to_shared(words.index(stage), ahead)  # also behind the last: groups are counted
        async_copy.commit_group()
        sums, codes = warpgroup_mma_wait(0, deps=(sums, codes))
        acc += scale.to(gl.float32)[:, None] * sums
        codes, scale = next_codes, next_scale
        if step + STAGES < steps:
            _ask_for_tokens(x_desc, xs, ready, stage, t0, (step + STAGES) * 128, BLOCK_T * 256)
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
    """n: rows of the weight. Few programs are helped by many stages, many by two on a multiprocessor. From sizes of
    Qwen3-8B, bf16, one H200, Triton 3.6, 2026-11-29."""
    block_t = min(128, max(32, triton.next_power_of_2(rows)))
    return ManyTile(block_t, 4, 5 if triton.cdiv(rows, block_t) * n <= 8192 else 3)


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
    assert k == weight.shape[1] and values.stride(1) == 1, (values.shape, values.stride(), weight.shape)
    y = result(values, weight.shape[0] // 2 if gate else weight.shape[0], out)
    tile = tile or tile_for(rows, weight.shape[0])
    launch = SplitProduct(
        x, y, bias, eps=eps, gate=gate, add=add, next_norm=next_norm, tickets=None,
        block_n=tile.warps * (8 if gate else 16), block_t=tile.block_t, splits=1,
    )  # fmt: skip
    if rows:
        zeros = weight.scales if weight.zeros is None else weight.zeros
        lies = shared_layout(tile.block_t, _STEP, values.dtype)
        _many_kernel[launch.grid](
            TensorDescriptor.from_tensor(values, [tile.block_t, _STEP], lies),
            weight.codes.view(torch.int16), weight.scales, zeros, *launch.arguments,
            GROUP=weight.group, WARPS=tile.warps, STAGES=min(tile.stages, k // _STEP),
            HAS_ZEROS=weight.zeros is not None, num_warps=tile.warps, **launch.constants,
        )  # fmt: skip
    return y, launch.scaled
