"""`int4.int4_linear` in Triton: four codes are cut from each word in registers, for tensor cores.

Codes minus their zero are whole numbers, so a product of 16-bit floats is as exact as its input: a group's sum is made
first, in float32, and takes the group's scale. The weight is on the left, from registers; the tokens are the short side
of a tile. Where tiles alone make too few programs the sum over K is cut in parts, which the last to come adds up, in
order, as in `matvec_skinny_triton`. Very many rows take a dequantised copy, which costs less than unpacking the weight
for each tile of tokens.
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
from nanoengine.kernels.matvec_parts_triton import finish, halves, load_if, pick_rows, prefetch_rows, result
from nanoengine.kernels.matvec_skinny_triton import tickets_on
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

MAX_ROWS = 256  # of the largest graph: what is compiled for graphs is then all that the kernel needs
"""More rows multiply a dequantised copy."""
_AHEAD = 256  # words of 16 bits of each weight row that a program asks for before it waits; a line is 64
_PROGRAMS = 132  # what runs at a time on a Hopper GPU, one a multiprocessor
_MOST_TILES = 1024  # of `tickets_on`

# Two words of 16 bits -> one of the four codes of each, as values of 16 bits: a mask makes it the last bits of 128
# (bfloat16) or 1024 (float16), then that and the zero are taken off.
_CUT = """{{
.reg .b32 a, one;
shr.b32 a, $1, {shift};
lop3.b32 a, a, 0x000F000F, {base}, 0xEA;
mov.b32 one, {one};
fma.rn.{kind} $0, a, one, $2;
}}"""


def _cuts(**kind: str) -> tuple[tl.constexpr, ...]:
    return tuple(tl.constexpr(_CUT.format(shift=4 * code, **kind)) for code in range(4))


_BF16 = _cuts(kind="bf16x2", base="0x43004300", one="0x3F803F80")
_FP16 = _cuts(kind="f16x2", base="0x64006400", one="0x3C003C00")
_BF16_0, _BF16_1, _BF16_2, _BF16_3 = _BF16
_FP16_0, _FP16_1, _FP16_2, _FP16_3 = _FP16


@triton.jit
def _one_of(CODE: tl.constexpr, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):
    if CODE < 2:
        return a if CODE == 0 else b
    else:
        return c if CODE == 2 else d


@triton.jit
def _cut(words, zeros, x_ptr, CODE: tl.constexpr, ASM: tl.constexpr):
    """Code 0 to 3 of each word [N, M], minus zeros (float32 [N, 1]), in the dtype of x."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if ASM and dtype == tl.bfloat16:
        taken = tl.broadcast_to((-128.0 - zeros).to(dtype), words.shape)
        bf16: tl.constexpr = _one_of(CODE, _BF16_0, _BF16_1, _BF16_2, _BF16_3)
        return tl.inline_asm_elementwise(bf16, "=r,r,r", [words, taken], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif ASM and dtype == tl.float16:
        taken = tl.broadcast_to((-1024.0 - zeros).to(dtype), words.shape)
        fp16: tl.constexpr = _one_of(CODE, _FP16_0, _FP16_1, _FP16_2, _FP16_3)
        return tl.inline_asm_elementwise(fp16, "=r,r,r", [words, taken], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return (((words >> 4 * CODE) & 15).to(tl.float32) - zeros).to(dtype)


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
    rows, x_stride, y_stride, add_stride,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    HAS_ZEROS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    groups: tl.constexpr = K // GROUP
    row, source = pick_rows(tl.program_id(0), N, BLOCK_N, GATED)
    source = tl.where(row < N, source, 0).to(tl.int64)[:, None]  # a line too many reads the first, and is not written
    first = tl.program_id(1) * SPAN
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.where(t < rows, t, 0).to(tl.int64)[None, :]
    release_dependents(PDL)
    if PDL:
        prefetch_rows(codes_ptr, source, first // 4, row[:, None] < N, K // 4, AHEAD)
    at = source * groups + first // GROUP  # one group ahead: as few bytes as these are no copy of the pipeline's
    scale = tl.load(scales_ptr + at).to(tl.float32)
    wait_for_inputs(PDL)
    word = tl.arange(0, BLOCK_K // 4)
    word_ptrs = codes_ptr + source * (K // 4) + word[None, :]
    x_ptrs = x_ptr + token * x_stride + (word // 8 * 32 + word % 8)[:, None]
    acc = tl.zeros((width, BLOCK_T), tl.float32)
    for start in tl.range(first, min(first + SPAN, K), BLOCK_K, num_stages=STAGES):
        words = tl.load(word_ptrs + start // 4)
        # not ahead: words come in the layout of a product's operand only if no value of the iteration before joins them
        zero = _zeros_at(zeros_ptr, source * groups + start // GROUP, HAS_ZEROS)
        sums = tl.zeros((width, BLOCK_T), tl.float32)
        for code in tl.static_range(4):
            x = tl.load(x_ptrs + start + 8 * code)
            sums = tl.dot(_cut(words, zero, x_ptr, code, ASM), x, sums, input_precision="ieee")
        acc += scale * sums
        at = source * groups + min(start + BLOCK_K, K - 1) // GROUP
        scale = tl.load(scales_ptr + at).to(tl.float32)
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
    mask = (n < N) & (t < rows)
    y, up = halves(acc, BLOCK_N, BLOCK_T, GATED)
    finish(
        y, up, load_if(HAS_BIAS, bias_ptr + n, n < N), load_if(HAS_BIAS and GATED, bias_ptr + N + n, n < N),
        load_if(HAS_ADD, add_ptr + t.to(tl.int64) * add_stride + n, mask), y_ptr + t.to(tl.int64) * y_stride + n, mask,
        GATED, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _dequantise_kernel(
    codes_ptr, scales_ptr, zeros_ptr, out_ptr, N, K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_ZEROS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    start = tl.program_id(1) * BLOCK_K
    word = tl.arange(0, BLOCK_K // 4)[None, :]
    source = tl.where(n < N, n, 0).to(tl.int64)
    words = tl.load(codes_ptr + source * (K // 4) + start // 4 + word)
    at = source * (K // GROUP) + start // GROUP
    scale, zero = tl.load(scales_ptr + at).to(tl.float32), _zeros_at(zeros_ptr, at, HAS_ZEROS)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    out = out_ptr + source * K + start + word // 8 * 32 + word % 8
    for code in tl.static_range(4):
        value = (((words >> 4 * code) & 15).to(tl.float32) - zero) * scale
        tl.store(out + 8 * code, value.to(out_ptr.dtype.element_ty), mask=n < N)


@dataclass(frozen=True, slots=True)
class Int4Tile:
    """Outputs and at most tokens a tile, warps, pipeline stages, parts of K."""

    block_n: int
    block_t: int
    warps: int
    stages: int
    splits: int = 1


# Not measured on a GPU yet. The compiled kernel's registers and shared memory let several programs of few rows be on a
# multiprocessor, so that one works while others wait.
def tile_for(rows: int, outputs: int, k: int, *, gated: bool, itemsize: int) -> Int4Tile:
    """64 rows of the weight and many stages: what counts is bytes in flight. Long rows are cut for as many programs."""
    lines = outputs * (1 + gated)
    if itemsize > 2:
        return Int4Tile(16 if gated else 32, 16, 4, 2, _parts(lines, 32, rows, 16, k, _PROGRAMS))
    if rows <= 64:
        block_t, stages = max(8, triton.next_power_of_2(rows)), 5 if rows <= 32 else 4
        return Int4Tile(32 if gated else 64, block_t, 4, stages, _parts(lines, 64, rows, block_t, k, 3 * _PROGRAMS))
    return Int4Tile(64 if gated else 128, 128, 8, 3, _parts(lines, 128, rows, 128, k, _PROGRAMS))


def _parts(lines: int, width: int, rows: int, block_t: int, k: int, enough: int) -> int:
    tiles, splits = triton.cdiv(lines, width) * triton.cdiv(rows, block_t), 1
    while splits < 8 and 2 * splits * tiles <= enough and k // (2 * splits) >= 512:
        splits *= 2
    return splits


def int4_linear(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
    tickets: Tensor | None = None,
    tile: Int4Tile | None = None,
) -> Tensor:
    """As `int4.int4_linear`. `tickets`: `tickets_on`, made anew without. `tile`: for the kernel, however many rows."""
    if len(x) <= MAX_ROWS or tile:
        return product(x, weight, bias, gate=gate, add=add, out=out, tickets=tickets, tile=tile)
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
        HAS_ZEROS=weight.zeros is not None, num_warps=4, **pdl_options(made),
    )  # fmt: skip
    return made


def product(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
    tickets: Tensor | None = None,
    tile: Int4Tile | None = None,
) -> Tensor:
    """The product from codes, by the kernel of this file."""
    rows, k = x.shape
    lines = weight.shape[0]
    outputs = lines // 2 if gate else lines
    assert k == weight.shape[1] and x.stride(1) == 1, (x.shape, x.stride(), weight.shape)
    assert add is None or (add.shape == (rows, outputs) and add.stride(1) == 1), (add, outputs)
    y = result(x, outputs, out)
    if rows == 0:
        return y
    tile = tile or tile_for(rows, outputs, k, gated=gate is not None, itemsize=x.element_size())
    block_t = min(tile.block_t, max(8, triton.next_power_of_2(rows)))
    block_k = min(128, weight.group & -weight.group)
    grid = (triton.cdiv(outputs, tile.block_n), tile.splits, triton.cdiv(rows, block_t))
    part = count = y
    if tile.splits > 1:
        assert grid[0] * grid[2] <= _MOST_TILES, grid
        size = tile.block_n * (2 if gate else 1) * block_t
        part = torch.empty(grid[0] * grid[1] * grid[2] * size, dtype=torch.float32, device=x.device)
        count = tickets_on(x.device) if tickets is None else tickets
    span = triton.cdiv(triton.cdiv(k, tile.splits), block_k) * block_k
    zeros = weight.scales if weight.zeros is None else weight.zeros
    _int4_kernel[grid](
        x, weight.codes.view(torch.int16), weight.scales, zeros,
        bias if bias is not None else x, add if add is not None else x, y, part,
        count, rows, x.stride(0), y.stride(0), 0 if add is None else add.stride(0),
        N=outputs, K=k, GROUP=weight.group, BLOCK_T=block_t, BLOCK_N=tile.block_n, BLOCK_K=block_k,
        SPLITS=tile.splits, SPAN=span, AHEAD=max(64, min(_AHEAD, triton.next_power_of_2(span // 4))),
        STAGES=tile.stages, HAS_ZEROS=weight.zeros is not None, GATED=gate is not None, ACTIVATION=gate,
        HAS_BIAS=bias is not None, HAS_ADD=add is not None, ASM=x.is_cuda and torch.version.hip is None,
        num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return y
