"""Products of some rows with Q4_K blocks, by tensor cores: bytes of the file become floats by two instructions.

A code is put into the last bits of 128 (bfloat16) or 1024 (float16), and multiplied so: codes and x are exact, and a
group's sum is made in float32, where it takes its scale. What the 128 and the group's minimum add is the group's sum of
x times a number, and that sum is a product with ones. Where tiles alone make too few programs the sum over K is cut in
parts, as in `int4_triton`.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.matmul import Scaled
from nanoengine.kernels.matvec_parts_triton import pick_rows, prefetch_rows, result
from nanoengine.kernels.pdl_triton import release_dependents, wait_for_inputs
from nanoengine.kernels.split_k_triton import SplitProduct, finish_tile, join_parts, leave_part

MAX_ROWS = 16
BLOCK, BLOCK_BYTES = 256, 144
_PROGRAMS = 132

# Four bytes -> their low codes as four values of 16 bits; `shift` 4: their high codes.
_CUT = """{{
.reg .b32 a, b, c;
shr.b32 a, $2, {shift};
prmt.b32 b, a, 0, 0x4140;
prmt.b32 c, a, 0, 0x4342;
lop3.b32 $0, b, 0x000F000F, {base}, 0xEA;
lop3.b32 $1, c, 0x000F000F, {base}, 0xEA;
}}"""
# Ones, in the layout in which codes are multiplied: x of both products then is one copy.
_ONES = "mov.b32 $0, {one}; mov.b32 $1, {one}; // $2"
_BF16_ONES, _FP16_ONES = (tl.constexpr(_ONES.format(one=one)) for one in ("0x3F803F80", "0x3C003C00"))
_BF16_LOW, _BF16_HIGH = (tl.constexpr(_CUT.format(shift=shift, base="0x43004300")) for shift in (0, 4))
_FP16_LOW, _FP16_HIGH = (tl.constexpr(_CUT.format(shift=shift, base="0x64006400")) for shift in (0, 4))


@triton.jit
def _run(asm: tl.constexpr, codes, x_ptr):
    return tl.inline_asm_elementwise(asm, "=r,=r,r", [codes], dtype=x_ptr.dtype.element_ty, is_pure=True, pack=4)


@triton.jit
def _cut(codes, x_ptr, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Low or high codes of bytes, in the dtype of x, plus `_offset`."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if ASM and dtype == tl.bfloat16:
        if HIGH:
            return _run(_BF16_HIGH, codes, x_ptr)
        else:
            return _run(_BF16_LOW, codes, x_ptr)
    elif ASM and dtype == tl.float16:
        if HIGH:
            return _run(_FP16_HIGH, codes, x_ptr)
        else:
            return _run(_FP16_LOW, codes, x_ptr)
    else:
        return ((codes.to(tl.int32) >> (4 if HIGH else 0)) & 15).to(dtype)


@triton.jit
def _ones(codes, x_ptr, ASM: tl.constexpr):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if ASM and dtype == tl.bfloat16:
        return _run(_BF16_ONES, codes, x_ptr)
    elif ASM and dtype == tl.float16:
        return _run(_FP16_ONES, codes, x_ptr)
    else:
        return tl.full(codes.shape, 1.0, dtype)


@triton.jit
def _offset(x_ptr, ASM: tl.constexpr):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if ASM and dtype == tl.bfloat16:
        return 128.0
    elif ASM and dtype == tl.float16:
        return 1024.0
    else:
        return 0.0


@triton.jit
def _byte(words, AT: tl.constexpr):
    return ((words >> 8 * AT) & 255).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _few_kernel(
    x_ptr, blocks_ptr, bias_ptr, add_ptr, y_ptr, part_ptr, ticket_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr,
    rows, x_stride, y_stride, add_stride, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, SPAN: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
    SQUARES: tl.constexpr, PARTS: tl.constexpr, NEXT: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    row_bytes: tl.constexpr = K // 256 * 144
    row, source = pick_rows(tl.program_id(0), N, BLOCK_N, GATED)
    source = tl.where(row < N, source, 0).to(tl.int64)[:, None]  # a line too many reads the first, and is not written
    first = tl.program_id(1) * SPAN
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.where(t < rows, t, 0).to(tl.int64)[None, :]
    release_dependents(PDL)
    if PDL:
        prefetch_rows(blocks_ptr, source, first // 2, row[:, None] < N, row_bytes, AHEAD)
    byte = tl.arange(0, 32)
    codes_ptrs = blocks_ptr + source * row_bytes + byte[None, :]
    heads = (blocks_ptr + source * row_bytes + K // 2).to(tl.pointer_type(tl.int32))  # 16 bytes of each block
    x_ptrs = x_ptr + token * x_stride + byte[:, None]
    offset = _offset(x_ptr, ASM)
    acc = tl.zeros((width, BLOCK_T), tl.float32)
    head = heads + first // 256 * 4  # one block ahead: as few bytes as these are no copy of the pipeline's
    h0, h1, h2, h3 = tl.load(head), tl.load(head + 1), tl.load(head + 2), tl.load(head + 3)
    wait_for_inputs(PDL)
    for start in tl.range(first, min(first + SPAN, K), 256, num_stages=STAGES):
        head = heads + min(start + 256, K - 256) // 256 * 4
        next0, next1, next2, next3 = tl.load(head), tl.load(head + 1), tl.load(head + 2), tl.load(head + 3)
        d = (h0 & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        least = ((h0 >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        scales_0, mins_0 = h1 & 0x3F3F3F3F, h2 & 0x3F3F3F3F  # of groups 0 to 3; below, of 4 to 7
        scales_4 = (h3 & 0x0F0F0F0F) | ((h1 >> 2) & 0x30303030)
        mins_4 = ((h3 >> 4) & 0x0F0F0F0F) | ((h2 >> 2) & 0x30303030)
        for pair in tl.static_range(4):
            codes = tl.load(codes_ptrs + (start // 2 + 32 * pair))
            x = tl.load(x_ptrs + (start + 64 * pair))
            x_high = tl.load(x_ptrs + (start + 64 * pair + 32))
            ones = _ones(codes, x_ptr, ASM)
            scales = scales_0 if pair < 2 else scales_4
            mins = mins_0 if pair < 2 else mins_4
            scale, high_scale = d * _byte(scales, pair % 2 * 2), d * _byte(scales, pair % 2 * 2 + 1)
            low = least * _byte(mins, pair % 2 * 2) + offset * scale
            high = least * _byte(mins, pair % 2 * 2 + 1) + offset * high_scale
            acc += scale * tl.dot(_cut(codes, x_ptr, False, ASM), x, input_precision="ieee")
            acc -= low * tl.dot(ones, x, input_precision="ieee")
            acc += high_scale * tl.dot(_cut(codes, x_ptr, True, ASM), x_high, input_precision="ieee")
            acc -= high * tl.dot(ones, x_high, input_precision="ieee")
        h0, h1, h2, h3 = next0, next1, next2, next3
    if SPLITS > 1:
        if leave_part(acc, part_ptr, ticket_ptr, SPLITS, width, BLOCK_T) < SPLITS - 1:
            return
        acc = join_parts(part_ptr, ticket_ptr, SPLITS, width, BLOCK_T)
    finish_tile(
        acc, t, bias_ptr, add_ptr, y_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, y_stride, add_stride, eps,
        N, K, BLOCK_T, BLOCK_N, GATED, ACTIVATION, HAS_BIAS, HAS_ADD, SQUARES, PARTS, NEXT,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FewTile:
    """Outputs a tile, warps, pipeline stages, parts of K."""

    block_n: int
    warps: int
    stages: int
    splits: int = 1


def few_tile(outputs: int, k: int, *, gated: bool) -> FewTile:
    """64 rows of the weight, and as many parts of K as fill a multiprocessor with programs: while one waits, others
    work (one H200, 2026-11-29)."""
    lines, splits = triton.cdiv(outputs * (1 + gated), 64), 1
    while splits < 8 and 2 * splits * lines <= 6 * _PROGRAMS and k // (2 * splits) >= 512:
        splits *= 2
    return FewTile(64 // (1 + gated), 4, 3, splits)


def takes_few(x: Tensor, kind: str) -> bool:
    """Float32 has no tensor cores that keep it."""
    return kind == "Q4_K" and 0 < len(x) <= MAX_ROWS and (x.dtype != torch.float32 or not x.is_cuda)


def few(
    x: Tensor | Scaled,
    planes: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    next_norm: Tensor | None = None,
    out: Tensor | None = None,
    tickets: Tensor | None = None,
    tile: FewTile | None = None,
) -> tuple[Tensor, Scaled | None]:
    """The product with Q4_K in planes, of x [T, K] or of x that the product before it normalised, and what `next_norm`
    needs of it: as `matmul.matmul`. out: [T, outputs], of contiguous rows."""
    values = x.values if isinstance(x, Scaled) else x
    rows, k = values.shape
    outputs = len(planes) // 2 if gate else len(planes)
    shapes = (planes.shape, values.shape, values.stride())
    assert planes.shape[1] == k // BLOCK * BLOCK_BYTES and values.stride(1) == 1, shapes
    y = result(values, outputs, None) if out is None else out
    assert y.shape == (rows, outputs) and y.stride(1) == 1, (y.shape, y.stride())
    tile = tile or few_tile(outputs, k, gated=gate is not None)
    span = triton.cdiv(k // BLOCK, tile.splits) * BLOCK
    launch = SplitProduct(
        x, y, bias, eps=eps, gate=gate, add=add, next_norm=next_norm, tickets=tickets,
        block_n=tile.block_n, block_t=8 if rows <= 8 else 16, splits=tile.splits,
    )  # fmt: skip
    if rows:
        _few_kernel[launch.grid](
            values, planes, *launch.arguments, SPAN=span, AHEAD=min(512, triton.next_power_of_2(span // 2)),
            STAGES=tile.stages, num_warps=tile.warps, **launch.constants,
        )  # fmt: skip
    return y, launch.scaled
