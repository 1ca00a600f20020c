"""`int4.int4_linear` in Triton: four codes are cut from each word in registers, for tensor cores.

Codes minus their zero are whole numbers, so a product of 16-bit floats is as exact as its input: a group's sum is made
first, in float32, and takes the group's scale. The weight is on the left, from registers; the tokens are the short side
of a tile. Where tiles alone make too few programs the sum over K is cut in parts, which the last to come adds up, in
order, as in `matvec_skinny_triton`. Very many rows take a dequantised copy, which costs less than unpacking the weight
for each tile of tokens; so do groups that are no multiple of 64.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_and_mul
from nanoengine.kernels.int4 import Int4Weight
from nanoengine.kernels.int4_product import Int4Product
from nanoengine.kernels.matmul import Scaled
from nanoengine.kernels.matvec_parts_triton import pick_rows, prefetch_rows
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.split_k_triton import finish_tile, join_parts, leave_part

MAX_ROWS = 64
"""More rows multiply a dequantised copy, which is faster (one H200, 2026-11-29)."""
_AHEAD = 256  # words of 16 bits of each weight row that a program asks for before it waits; a line is 64

# Two words of 16 bits -> one of the four codes of each, as values of 16 bits: a mask makes it the last bits of 128
# (bfloat16) or 1024 (float16), then that and the zero are taken off.
_CUT = """{{
.reg .b32 a, one;
shr.b32 a, $1, {shift};
lop3.b32 a, a, 0x000F000F, {base}, 0xEA;
mov.b32 one, {one};
fma.rn.{kind} $0, a, one, $2;
}}"""


_LIFT = """{{
.reg .b32 a;
shr.b32 a, $1, {shift};
lop3.b32 $0, a, 0x000F000F, {base}, 0xEA;
}}"""


def _cuts(**kind: str) -> tuple[tl.constexpr, ...]:
    return tuple(tl.constexpr(_CUT.format(shift=4 * code, **kind)) for code in range(4))


_BF16_0, _BF16_1, _BF16_2, _BF16_3 = _cuts(kind="bf16x2", base="0x43004300", one="0x3F803F80")
_FP16_0, _FP16_1, _FP16_2, _FP16_3 = _cuts(kind="f16x2", base="0x64006400", one="0x3C003C00")


_BF16_L0, _BF16_L1, _BF16_L2, _BF16_L3 = (tl.constexpr(_LIFT.format(shift=4 * i, base="0x43004300")) for i in range(4))
_FP16_L0, _FP16_L1, _FP16_L2, _FP16_L3 = (tl.constexpr(_LIFT.format(shift=4 * i, base="0x64006400")) for i in range(4))


@triton.jit
def _run(asm: tl.constexpr, words, taken):
    return tl.inline_asm_elementwise(asm, "=r,r,r", [words, taken], dtype=taken.dtype, is_pure=True, pack=2)


@triton.jit
def _lift(asm: tl.constexpr, words, x_ptr):
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=x_ptr.dtype.element_ty, is_pure=True, pack=2)


@triton.jit
def _lifted(words, x_ptr, CODE: tl.constexpr, OFFSET: tl.constexpr, ASM: tl.constexpr):
    """Code 0 to 3 of each word plus OFFSET: 128 (bfloat16) or 1024 (float16)."""
    if not ASM:
        return (((words >> 4 * CODE) & 15).to(tl.float32) + OFFSET).to(x_ptr.dtype.element_ty)
    elif x_ptr.dtype.element_ty == tl.bfloat16:
        if CODE == 0:
            return _lift(_BF16_L0, words, x_ptr)
        elif CODE == 1:
            return _lift(_BF16_L1, words, x_ptr)
        elif CODE == 2:
            return _lift(_BF16_L2, words, x_ptr)
        else:
            return _lift(_BF16_L3, words, x_ptr)
    else:
        if CODE == 0:
            return _lift(_FP16_L0, words, x_ptr)
        elif CODE == 1:
            return _lift(_FP16_L1, words, x_ptr)
        elif CODE == 2:
            return _lift(_FP16_L2, words, x_ptr)
        else:
            return _lift(_FP16_L3, words, x_ptr)


@triton.jit
def _run_one_of(CODE: tl.constexpr, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr, words, taken):
    if CODE == 0:
        return _run(a, words, taken)
    elif CODE == 1:
        return _run(b, words, taken)
    elif CODE == 2:
        return _run(c, words, taken)
    else:
        return _run(d, words, taken)


@triton.jit
def _cut(words, zeros, x_ptr, CODE: tl.constexpr, ASM: tl.constexpr):
    """Code 0 to 3 of each word [N, M], minus zeros (float32 [N, 1]), in the dtype of x."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if ASM and dtype == tl.bfloat16:
        taken = tl.broadcast_to((-128.0 - zeros).to(dtype), words.shape)
        return _run_one_of(CODE, _BF16_0, _BF16_1, _BF16_2, _BF16_3, words, taken)
    elif ASM and dtype == tl.float16:
        taken = tl.broadcast_to((-1024.0 - zeros).to(dtype), words.shape)
        return _run_one_of(CODE, _FP16_0, _FP16_1, _FP16_2, _FP16_3, words, taken)
    else:
        return (((words >> 4 * CODE) & 15).to(tl.float32) - zeros).to(dtype)


@triton.jit
def word_rows(codes_ptr, row, K: tl.constexpr, TILED: tl.constexpr):
    """Pointers to the first words of 16 bits of rows."""
    if TILED:
        return codes_ptr + row // 16 * (16 * (K // 4)) + row % 16 * 32
    else:
        return codes_ptr + row * (K // 4)


@triton.jit
def word_at(k, TILED: tl.constexpr):
    """From the first words of a row to those of input k, in tiles a multiple of 128; words of as many inputs are
    neighbours."""
    return 4 * k if TILED else k // 4


@triton.jit
def group_at(row, group, GROUPS: tl.constexpr, TILED: tl.constexpr):
    """Where the scale and the zero of a group of rows are."""
    if TILED:
        return (row // 16 * GROUPS + group) * 16 + row % 8 * 2 + row % 16 // 8
    else:
        return row * GROUPS + group


@triton.jit
def _zeros_at(zeros_ptr, at, HAS_ZEROS: tl.constexpr):
    """float32 zeros; 8 where a weight has none."""
    if HAS_ZEROS:
        return tl.load(zeros_ptr + at).to(tl.float32)
    else:
        return tl.full(at.shape, 8.0, tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _int4_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr, ticket_ptr,
    squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, x_stride, y_stride, add_stride, eps,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    HAS_ZEROS: tl.constexpr, TILED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, SQUARES: tl.constexpr, PARTS: tl.constexpr, NEXT: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    groups: tl.constexpr = K // GROUP
    row, source = pick_rows(tl.program_id(0), N, BLOCK_N, GATED)
    source = tl.where(row < N, source, 0).to(tl.int64)[:, None]  # a line too many reads the first, and is not written
    first = tl.program_id(1) * SPAN
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.where(t < rows, t, 0).to(tl.int64)[None, :]
    release_dependents(PDL)
    if PDL and not TILED:
        prefetch_rows(codes_ptr, source, first // 4, row[:, None] < N, K // 4, AHEAD)
    at = group_at(
        source, first // GROUP, groups, TILED
    )  # one group ahead: as few bytes as these are no copy of the pipeline's
    scale = tl.load(scales_ptr + at).to(tl.float32)
    zero = _zeros_at(zeros_ptr, at, HAS_ZEROS)
    wait_for_inputs(PDL)
    word = tl.arange(0, BLOCK_K // 4)
    word_ptrs = word_rows(codes_ptr, source, K, TILED) + word[None, :]
    x_ptrs = x_ptr + token * x_stride + (word // 8 * 32 + word % 8)[:, None]
    acc = tl.zeros((width, BLOCK_T), tl.float32)
    # Few tokens: codes are multiplied with what they stand on, of which a product with ones says how much it was.
    lifted: tl.constexpr = BLOCK_T <= 16 and x_ptr.dtype.element_ty != tl.float32
    offset: tl.constexpr = 128.0 if x_ptr.dtype.element_ty == tl.bfloat16 else 1024.0
    for start in tl.range(first, min(first + SPAN, K), BLOCK_K, num_stages=STAGES):
        words = tl.load(word_ptrs + word_at(start, TILED))
        sums = tl.zeros((width, BLOCK_T), tl.float32)
        if lifted:
            at = group_at(source, min(start + BLOCK_K, K - 1) // GROUP, groups, TILED)
            next_scale, next_zero = tl.load(scales_ptr + at).to(tl.float32), _zeros_at(zeros_ptr, at, HAS_ZEROS)
            plain = tl.zeros((width, BLOCK_T), tl.float32)
            ones = tl.full((width, BLOCK_K // 4), 1.0, x_ptr.dtype.element_ty)
            for code in tl.static_range(4):
                x = tl.load(x_ptrs + start + 8 * code)
                sums = tl.dot(_lifted(words, x_ptr, code, offset, ASM), x, sums)
                plain = tl.dot(ones, x, plain)
            acc += scale * (sums - (offset + zero) * plain)
            scale, zero = next_scale, next_zero
        else:
            # not ahead: words come in the layout of an operand only if no value of the iteration before joins them
            zero_here = _zeros_at(zeros_ptr, group_at(source, start // GROUP, groups, TILED), HAS_ZEROS)
            for code in tl.static_range(4):
                x = tl.load(x_ptrs + start + 8 * code)
                sums = tl.dot(_cut(words, zero_here, x_ptr, code, ASM), x, sums, input_precision="ieee")
            acc += scale * sums
            at = group_at(source, min(start + BLOCK_K, K - 1) // GROUP, groups, TILED)
            scale = tl.load(scales_ptr + at).to(tl.float32)
    if SPLITS > 1:
        if leave_part(acc, part_ptr, ticket_ptr, SPLITS, width, BLOCK_T) < SPLITS - 1:
            return
        acc = join_parts(part_ptr, ticket_ptr, SPLITS, width, BLOCK_T)
    finish_tile(
        acc, t, bias_ptr, add_ptr, y_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, y_stride, add_stride, eps,
        N, K, BLOCK_T, BLOCK_N, GATED, ACTIVATION, HAS_BIAS, HAS_ADD, SQUARES, PARTS, NEXT,
    )  # fmt: skip


@triton.jit
def _value(words, CODE: tl.constexpr, zero, scale, out_ptr):
    """Of code 0 to 3 of each word, rounded once."""
    return ((((words >> 4 * CODE) & 15).to(tl.float32) - zero) * scale).to(out_ptr.dtype.element_ty)


@triton.jit
def _dequantise_kernel(
    codes_ptr, scales_ptr, zeros_ptr, out_ptr, N, K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_ZEROS: tl.constexpr, TILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    start = tl.program_id(1) * BLOCK_K
    word = tl.arange(0, BLOCK_K // 4)[None, :]
    source = tl.where(n < N, n, 0).to(tl.int64)
    words = tl.load(word_rows(codes_ptr, source, K, TILED) + word_at(start, TILED) + word)
    at = group_at(source, start // GROUP, K // GROUP, TILED)
    scale, zero = tl.load(scales_ptr + at).to(tl.float32), _zeros_at(zeros_ptr, at, HAS_ZEROS)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    even = tl.join(_value(words, 0, zero, scale, out_ptr), _value(words, 2, zero, scale, out_ptr))
    odd = tl.join(_value(words, 1, zero, scale, out_ptr), _value(words, 3, zero, scale, out_ptr))
    values = tl.reshape(tl.join(even, odd), (BLOCK_N, BLOCK_K // 32, 8, 2, 2))
    values = tl.reshape(tl.permute(values, (0, 1, 3, 4, 2)), (BLOCK_N, BLOCK_K))  # whole lines are written at once
    tl.store(out_ptr + source * K + start + tl.arange(0, BLOCK_K)[None, :], values, mask=n < N)


@dataclass(frozen=True, slots=True)
class Int4Tile:
    """Outputs and at most tokens a tile, warps, pipeline stages, parts of K."""

    block_n: int
    block_t: int
    warps: int
    stages: int
    splits: int = 1


def tile_for(rows: int, outputs: int, k: int, *, gated: bool, itemsize: int) -> Int4Tile:
    """Few stages and many programs: while one waits, others on its multiprocessor work (one H200, 2026-11-29, bf16,
    sizes of Qwen3-8B)."""
    if itemsize > 2:
        return Int4Tile(16 if gated else 32, 16, 4, 2, _parts(k))
    block_t = max(8, triton.next_power_of_2(rows))
    if block_t <= 32:
        return Int4Tile(32 if gated else 64, block_t, 4, 3, _parts(k))
    return Int4Tile(64 if gated else 128, min(128, block_t), 8, 3, _parts(k))


def _parts(k: int) -> int:
    """Of K, of which none is shorter than 512."""
    return 4 if k >= 2048 else 2 if k >= 1024 else 1


def takes(rows: int, weight: Int4Weight) -> bool:
    """Whether the kernel multiplies codes: a product of tensor cores has 16 words, of 64 inputs, that share a scale."""
    return rows <= MAX_ROWS and weight.group % 64 == 0


def int4_linear(
    x: Tensor | Scaled,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
    tickets: Tensor | None = None,
    tile: Int4Tile | None = None,
) -> Tensor:
    """As `int4.int4_linear`; x may be normalised by the product before it, as in `matmul.matmul`.

    `tickets`: `tickets_on`, made anew without. `tile`: for the kernel, however many rows.
    """
    if isinstance(x, Scaled) or takes(len(x), weight) or tile:
        return product(x, weight, bias, eps=eps, gate=gate, add=add, out=out, tickets=tickets, tile=tile)[0]
    copy = dequantised(weight, x.dtype)
    if gate or add is not None or out is None:
        y = F.linear(x, copy, bias)
        y = act_and_mul(y, gate) if gate else y
        y = y if add is None else y.add_(add)
        return y if out is None else out.copy_(y)
    return torch.mm(x, copy.t(), out=out) if bias is None else torch.addmm(bias, x, copy.t(), out=out)


def dequantised(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """[out, in] of `dtype`, each value rounded once."""
    outputs, k = weight.shape
    made = torch.empty(outputs, k, dtype=dtype, device=weight.codes.device)
    block_k = min(128, weight.group & -weight.group)
    zeros = weight.scales if weight.zeros is None else weight.zeros
    _dequantise_kernel[(triton.cdiv(outputs, 64), k // block_k)](
        weight.codes.view(torch.int16), weight.scales, zeros, made, outputs,
        K=k, GROUP=weight.group, BLOCK_N=64, BLOCK_K=block_k,
        HAS_ZEROS=weight.zeros is not None, TILED=weight.tiled, num_warps=4, **pdl_options(made),
    )  # fmt: skip
    return made


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
    tile: Int4Tile | None = None,
) -> tuple[Tensor, Scaled | None]:
    """The product from codes, by the kernel of this file, and what `next_norm` needs of it: see `matmul.matmul`."""
    values = x.values if isinstance(x, Scaled) else x
    rows, k = values.shape
    outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    tile = tile or tile_for(rows, outputs, k, gated=gate is not None, itemsize=values.element_size())
    block_t = min(tile.block_t, max(8, triton.next_power_of_2(rows)))
    block_k = min(128, weight.group & -weight.group)
    span = triton.cdiv(triton.cdiv(k, tile.splits), block_k) * block_k
    launch = Int4Product(
        x, weight, bias, eps=eps, gate=gate, add=add, next_norm=next_norm, out=out, tickets=tickets,
        block_n=tile.block_n, block_t=block_t, splits=tile.splits,
    )  # fmt: skip
    if rows:
        _int4_kernel[launch.grid](
            values, *launch.arguments, BLOCK_K=block_k, SPAN=span,
            AHEAD=max(64, min(_AHEAD, triton.next_power_of_2(span // 4))), STAGES=tile.stages,
            num_warps=tile.warps, **launch.constants,
        )  # fmt: skip
    return launch.y, launch.scaled
