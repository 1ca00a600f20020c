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
from nanoengine.kernels.matvec_parts_triton import finish, halves, load_if, pick_rows, prefetch_rows, result
from nanoengine.kernels.matvec_skinny_triton import tickets_on
from nanoengine.kernels.norm_parts_triton import norm_scale, prepare_norm
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

MAX_ROWS = 16
BLOCK, BLOCK_BYTES = 256, 144
_PROGRAMS = 132
_MOST_TILES = 1024  # of `tickets_on`

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
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        size: tl.constexpr = width * BLOCK_T
        place = tl.arange(0, width)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        part = part_ptr + tile * (SPLITS * size)
        tl.store(part + tl.program_id(1) * size + place, acc)
        tl.debug_barrier()  # every thread's part is written before one of them releases the ticket
        if tl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        tl.store(ticket_ptr + tile, 0)  # for the next launch
        acc = tl.zeros((width, BLOCK_T), tl.float32)
        for split in tl.static_range(SPLITS):  # .cg: other programs wrote it; never from this multiprocessor's own L1
            acc += tl.load(part + split * size + place, cache_modifier=".cg")
    n, t = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None], t[None, :]
    if SQUARES > 0:
        acc *= norm_scale(squares_ptr, t, rows, SQUARES, PARTS, K, eps)
    mask = (n < N) & (t < rows)
    y, up = halves(acc, BLOCK_N, BLOCK_T, GATED)
    to = t.to(tl.int64) * y_stride + n
    y = finish(
        y, up, load_if(HAS_BIAS, bias_ptr + n, n < N), load_if(HAS_BIAS and GATED, bias_ptr + N + n, n < N),
        load_if(HAS_ADD, add_ptr + t.to(tl.int64) * add_stride + n, mask), y_ptr + to, mask, GATED, ACTIVATION,
    )  # fmt: skip
    if NEXT:
        prepare_norm(y, next_ptr, scaled_ptr + to, sums_ptr + tl.program_id(0) * rows + t, n, t, mask, N, rows)


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
    squares = x.squares if isinstance(x, Scaled) else None
    x = x.values if isinstance(x, Scaled) else x
    rows, k = x.shape
    outputs = len(planes) // 2 if gate else len(planes)
    assert planes.shape[1] == k // BLOCK * BLOCK_BYTES and x.stride(1) == 1, (planes.shape, x.shape, x.stride())
    assert add is None or (add.shape == (rows, outputs) and add.stride(1) == 1), (add, outputs)
    y = result(x, outputs, None) if out is None else out
    assert y.shape == (rows, outputs) and y.stride(1) == 1, (y.shape, y.stride())
    tile = tile or few_tile(outputs, k, gated=gate is not None)
    tiles, block_t = triton.cdiv(outputs, tile.block_n), 8 if rows <= 8 else 16
    scaled = None
    if next_norm is not None:
        assert y.is_contiguous() and y.dtype == x.dtype, (y.stride(), y.dtype)
        sums = torch.empty(tiles, rows, dtype=torch.float32, device=x.device)
        scaled = Scaled(next_norm, torch.empty_like(y), sums)
    if rows == 0:
        return y, scaled
    grid = (tiles, tile.splits, triton.cdiv(rows, block_t))
    part = count = y
    if tile.splits > 1:
        assert grid[0] * grid[2] <= _MOST_TILES, grid
        size = tile.block_n * (2 if gate else 1) * block_t
        part = torch.empty(grid[0] * grid[1] * grid[2] * size, dtype=torch.float32, device=x.device)
        count = tickets_on(x.device) if tickets is None else tickets
    span = triton.cdiv(k // BLOCK, tile.splits) * BLOCK
    ahead = (y, y, y) if scaled is None else (scaled.norm_weight, scaled.values, scaled.squares)
    _few_kernel[grid](
        x, planes, bias if bias is not None else x, add if add is not None else x, y, part, count,
        y if squares is None else squares, *ahead,
        rows, x.stride(0), y.stride(0), 0 if add is None else add.stride(0), eps,
        N=outputs, K=k, BLOCK_T=block_t, BLOCK_N=tile.block_n, SPLITS=tile.splits, SPAN=span,
        AHEAD=min(512, triton.next_power_of_2(span // 2)), STAGES=tile.stages, GATED=gate is not None, ACTIVATION=gate,
        HAS_BIAS=bias is not None, HAS_ADD=add is not None, SQUARES=0 if squares is None else len(squares),
        PARTS=1 if squares is None else triton.next_power_of_2(len(squares)),
        NEXT=scaled is not None, ASM=x.is_cuda and torch.version.hip is None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return y, scaled
