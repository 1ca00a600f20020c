"""Products of a few rows with FP8 weights: as many programs as fit the GPU at once walk through the weight's rows, and
ask for the next ones before they multiply those that came. Each normalises and quantises x itself, once, while its
first rows of the weight are on their way: a product is one launch.

A thread has 16 neighbouring inputs (of each chunk of K) of x and of every row, so a warp reads 512 bytes side by side.
Tensors have one element a thread. Tensor cores sum up what threads multiply, two rows of the weight at a time: codes
are exact in float16. A product has 16 rows and 8 columns: rows 0 to 7 are eight parts of 64 inputs of one row of the
weight, rows 8 to 15 those of the other, and column i is part i of x. So what is wanted of a product is its diagonals.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, disable-error-code="assignment, misc"
# ruff: noqa: N803, RUF005 - constants of a kernel are in capitals; Triton unpacks no tuple into another
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_mul
from nanoengine.kernels.eight_bit import EightBit
from nanoengine.kernels.eight_bit_row import RowProduct
from nanoengine.kernels.gguf_fragment_parts_triton import split4, words_at
from nanoengine.kernels.matvec_parts_triton import load_if
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.quantise_triton import _codes, scale_of

MAX_ROWS = 1  # the kernel takes more, which no GPU has measured
_PROCESSORS = 132  # of a Hopper GPU
_BYTES = 16  # of a row that a thread has in each chunk
_HELD = 128  # bytes of weight that a thread multiplies at a time; as many are on their way
_PART = 64  # inputs of a part: a scale must not change inside


def assembly() -> str:
    """PTX: words of two rows ($4 to $7, $8 to $11), x as float16 ($12 to $19), sums ($20 to $23) -> sums."""
    lines = [".reg .b16 l, h;", ".reg .b32 a<4>;"]
    for word in range(4):
        for row in range(2):
            lines.append(f"mov.b32 {{l, h}}, ${4 + 4 * row + word};")
            lines += [f"cvt.rn.f16x2.e4m3x2 a{row}, l;", f"cvt.rn.f16x2.e4m3x2 a{row + 2}, h;"]
        given = ", ".join(f"${i + (0 if word else 20)}" for i in range(4))
        x = f"{{${12 + 2 * word}, ${13 + 2 * word}}}"
        mma = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        lines.append(f"{mma} {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}}, {x}, {{{given}}};")
    return "{" + "\n".join(lines) + "}"


@triton.jit
def _row(weight_ptr, row, there, at, K: tl.constexpr, ASM: tl.constexpr):
    """A row of the weight: 16 codes of each thread from `at` [threads] on, as four words, or as they are."""
    ptrs = weight_ptr + row.to(tl.int64) * K + at
    mask = there & (at < K)
    if ASM is not None:
        return words_at(ptrs.to(tl.pointer_type(tl.int32)), mask)
    else:
        return tl.load(ptrs[:, None] + tl.arange(0, 16)[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def _rows(
    weight_ptr, n, there, thread,
    ROWS: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, CHUNKS: tl.constexpr, APART: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Of each pair, of each chunk: both rows. n: the first of the ROWS; those of a pair are APART."""
    found = ()
    for pair in tl.static_range(PAIRS):
        for i in tl.static_range(CHUNKS):
            at = (thread + i * thread.shape[0]) * 16
            first, second = n + pair, n + pair + APART
            found = found + (_row(weight_ptr, first, there & (first < ROWS), at, K, ASM),)
            found = found + (_row(weight_ptr, second, there & (second < ROWS), at, K, ASM),)
    return found


@triton.jit
def _stream(
    x_ptr, residual_ptr, norm_weight_ptr, total_ptr, eps, thread,
    K: tl.constexpr, CHUNKS: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A row of x, normalised: of each chunk float32 [threads, 16]."""
    found, squares = (), 0.0
    for i in tl.static_range(CHUNKS):
        k = ((thread + i * thread.shape[0]) * 16)[:, None] + tl.arange(0, 16)[None, :]
        mask = k < K
        x = tl.load(x_ptr + k, mask=mask, other=0.0)
        if HAS_RESIDUAL:
            x = (x.to(tl.float32) + tl.load(residual_ptr + k, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
            if tl.program_id(0) == 0:  # all programs need the sum, one writes it down
                tl.store(total_ptr + k, x, mask=mask)
        x = x.to(tl.float32)
        if NORM:
            squares += tl.sum(tl.sum(x * x, 1), 0)
        found = found + (x,)
    if NORM:
        shrink = tl.rsqrt(squares / K + eps)
        normed = ()
        for i in tl.static_range(CHUNKS):
            k = ((thread + i * thread.shape[0]) * 16)[:, None] + tl.arange(0, 16)[None, :]
            weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            normed = normed + ((found[i] * shrink * weight).to(x_ptr.dtype.element_ty).to(tl.float32),)
        return normed
    else:
        return found


@triton.jit
def _in_group(each, GROUP: tl.constexpr, LARGEST: tl.constexpr):
    """[threads] -> of the threads that have a group's inputs the largest, or the sum; for each of them."""
    rows = tl.reshape(each, (each.shape[0] * 16 // GROUP, GROUP // 16))
    found = tl.max(rows, 1) if LARGEST else tl.sum(rows, 1)
    return tl.reshape(tl.broadcast_to(found[:, None], rows.shape), each.shape)


@triton.jit
def _operands(codes, ASM: tl.constexpr):
    """float32 [threads, 16] -> eight words of two float16 each; as they are without ASM."""
    if ASM is not None:
        halves = tl.reshape(codes.to(tl.float16).to(tl.uint16, bitcast=True), (codes.shape[0], 8, 2))
        low, high = tl.split(halves.to(tl.int32))
        even, odd = tl.split(tl.reshape(low | (high << 16), (codes.shape[0], 4, 2)))
        a, b = split4(even), split4(odd)
        return a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]
    else:
        return (codes,)


@triton.jit
def _quantised(
    x, input_scale_ptr, bound_ptr, CHUNKS: tl.constexpr, GROUP: tl.constexpr,
    INPUTS: tl.constexpr, HAS_BOUND: tl.constexpr, CAST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Chunks of a row -> of each the operands, and of each the scale of what a thread has, [threads]."""
    threads: tl.constexpr = x[0].shape[0]
    operands, scales = (), ()
    most, off = tl.zeros((threads,), tl.float32), tl.zeros((threads,), tl.float32)
    if INPUTS != "group":
        for i in tl.static_range(CHUNKS):
            most = tl.maximum(most, tl.max(tl.abs(x[i]), 1))
            off += tl.sum(x[i] * 0.0, 1)
        most, off = most * 0 + tl.max(most, 0), off * 0 + tl.sum(off, 0)
    for i in tl.static_range(CHUNKS):
        if INPUTS == "group":
            most = _in_group(tl.max(tl.abs(x[i]), 1), GROUP, True)
            off = _in_group(tl.sum(x[i] * 0.0, 1), GROUP, False)
        scale = scale_of(most, off, input_scale_ptr, bound_ptr, INPUTS, False, HAS_BOUND, False)
        codes = _codes(x[i], scale[:, None], False, INPUTS == "tensor" or HAS_BOUND, CAST)
        if CAST:
            codes = codes.to(tl.float8e4nv).to(tl.float32)
        operands = operands + (_operands(codes, ASM),)
        scales = scales + (scale,)
    return operands, scales


@triton.jit
def _added(first, second, x, c, ASM: tl.constexpr):
    """Adds the products of what threads have of two rows and x to the sums c."""
    if ASM is not None:
        a, b = split4(first), split4(second)
        return tl.inline_asm_elementwise(
            ASM, "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
            [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3],
             x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        one, two = tl.sum(first.to(tl.float32) * x[0], 1), tl.sum(second.to(tl.float32) * x[0], 1)
        return c[0] + one, c[1], c[2] + two, c[3]


@triton.jit
def _diagonals(c, thread, ASM: tl.constexpr):
    """What is wanted of the sums: of each of the two rows, [threads]."""
    if ASM is not None:
        part, column = thread % 32 // 4, 2 * (thread % 4)
        first = tl.where(part == column, c[0], tl.where(part == column + 1, c[1], 0.0))
        second = tl.where(part == column, c[2], tl.where(part == column + 1, c[3], 0.0))
        return first, second
    else:
        return c[0], c[2]


@triton.jit
def _scale_at(scale_ptr, row, there, at, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a row of the weight, where each thread is, [threads]."""
    column = at // GROUP
    return tl.load(scale_ptr + row // ROWS * COLUMNS + column, mask=there & (column < COLUMNS), other=0.0)


@triton.jit
def _pair(
    w, x, x_scales, scale_ptr, row, thread, ROWS: tl.constexpr, PAIR: tl.constexpr, APART: tl.constexpr,
    CHUNKS: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """[threads, 2]: what threads have of the sums of two rows. GROUP 0: the weight's scales are left to do."""
    zero = tl.zeros(thread.shape, tl.float32)
    if GROUP == 0:
        c = (zero, zero, zero, zero)
        for i in tl.static_range(CHUNKS):
            c = _added(w[2 * (PAIR * CHUNKS + i)], w[2 * (PAIR * CHUNKS + i) + 1], x[i], c, ASM)
        first, second = _diagonals(c, thread, ASM)
        return tl.join(first * x_scales[0], second * x_scales[0])
    else:
        one, two = zero, zero
        for i in tl.static_range(CHUNKS):
            k = (thread + i * thread.shape[0]) * 16
            first_scale = _scale_at(scale_ptr, row, row < ROWS, k, GROUP, SCALE_ROWS, SCALE_COLUMNS)
            second_scale = _scale_at(scale_ptr, row + APART, row + APART < ROWS, k, GROUP, SCALE_ROWS, SCALE_COLUMNS)
            c = _added(w[2 * (PAIR * CHUNKS + i)], w[2 * (PAIR * CHUNKS + i) + 1], x[i], (zero, zero, zero, zero), ASM)
            first, second = _diagonals(c, thread, ASM)
            one += first * (x_scales[i] * first_scale)
            two += second * (x_scales[i] * second_scale)
        return tl.join(one, two)


@triton.jit
def _sums(
    w, x, x_scales, scale_ptr, n, thread, ROWS: tl.constexpr, PAIRS: tl.constexpr, APART: tl.constexpr,
    CHUNKS: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sums of the first and of the second row of each pair: [PAIRS] each."""
    each = ()
    for pair in tl.static_range(PAIRS):
        each = each + (_pair(
            w, x, x_scales, scale_ptr, n + pair, thread, ROWS, pair, APART,
            CHUNKS, GROUP, SCALE_ROWS, SCALE_COLUMNS, ASM,
        ),)  # fmt: skip
    if PAIRS == 1:
        rows = tl.reshape(tl.sum(each[0], 0), (1, 2))
    elif PAIRS == 2:
        rows = tl.permute(tl.sum(tl.join(each[0], each[1]), 0), (1, 0))
    else:  # [threads, row of a pair, pair % 2, pair // 2]
        tl.static_assert(PAIRS == 4)
        four = tl.join(tl.join(each[0], each[1]), tl.join(each[2], each[3]))
        rows = tl.reshape(tl.permute(tl.sum(four, 0), (2, 1, 0)), (4, 2))
    first, second = tl.split(rows)
    if GROUP == 0:
        row = n + tl.arange(0, PAIRS)
        first *= tl.load(scale_ptr + row // SCALE_ROWS, mask=row < ROWS, other=0.0)
        second *= tl.load(scale_ptr + (row + APART) // SCALE_ROWS, mask=row + APART < ROWS, other=0.0)
    return first, second


@triton.jit
def _finish(y, bias_ptr, add_ptr, y_ptr, n, N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr):
    mask = n < N
    y += load_if(HAS_BIAS, bias_ptr + n, mask)
    y += load_if(HAS_ADD, add_ptr + n, mask)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _streamed_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, input_scale_ptr, bound_ptr, weight_ptr, scale_ptr, bias_ptr, add_ptr,
    y_ptr, total_ptr, x_stride, residual_stride, add_stride, eps,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr,
    GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr, HAS_BOUND: tl.constexpr, CAST: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has every num_programs-th tile of PAIRS outputs with a gate, and of twice as many without. GROUP:
    inputs that have a scale of their own, of the weight, and of x with INPUTS "group"; 0: a row has one."""
    apart: tl.constexpr = N if GATED else PAIRS
    outputs: tl.constexpr = PAIRS if GATED else 2 * PAIRS
    rows: tl.constexpr = 2 * N if GATED else N
    thread = tl.arange(0, 32 * WARPS)
    n = tl.program_id(0) * outputs
    w = _rows(weight_ptr, n, n < N, thread, rows, K, PAIRS, CHUNKS, apart, ASM)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    operands, x_scales = (), ()
    for t in tl.static_range(T):
        x = _stream(
            x_ptr + t * x_stride, residual_ptr + t * residual_stride, norm_weight_ptr, total_ptr + t * K, eps, thread,
            K, CHUNKS, NORM, HAS_RESIDUAL,
        )  # fmt: skip
        made, of = _quantised(x, input_scale_ptr, bound_ptr, CHUNKS, GROUP, INPUTS, HAS_BOUND, CAST, ASM)
        operands = operands + (made,)
        x_scales = x_scales + (of,)
    for step in tl.range(0, STEPS, num_stages=1):
        n = (step * tl.num_programs(0) + tl.program_id(0)) * outputs
        later = n + tl.num_programs(0) * outputs
        next_w = _rows(weight_ptr, later, (later < N) & (step + 1 < STEPS), thread, rows, K, PAIRS, CHUNKS, apart, ASM)
        at = n + tl.arange(0, PAIRS)
        for t in tl.static_range(T):
            first, second = _sums(
                w, operands[t], x_scales[t], scale_ptr, n, thread, rows, PAIRS, apart, CHUNKS, GROUP,
                SCALE_ROWS, SCALE_COLUMNS, ASM,
            )  # fmt: skip
            if GATED:
                first += load_if(HAS_BIAS, bias_ptr + at, at < N)
                second += load_if(HAS_BIAS, bias_ptr + N + at, at < N)
                first = act_mul(first, second, ACTIVATION)
                _finish(first, bias_ptr, add_ptr + t * add_stride, y_ptr + t * N, at, N, False, HAS_ADD)
            else:
                add, to = add_ptr + t * add_stride, y_ptr + t * N
                _finish(first, bias_ptr, add, to, at, N, HAS_BIAS, HAS_ADD)
                _finish(second, bias_ptr, add, to, at + PAIRS, N, HAS_BIAS, HAS_ADD)
        w = next_w


@dataclass(frozen=True, slots=True)
class StreamedTile:
    """Pairs of rows a program multiplies at a time, chunks of K, warps; programs, and how often each does so."""

    pairs: int
    chunks: int
    warps: int
    programs: int
    steps: int


def streamed_tile(outputs: int, k: int, *, gated: bool, held: int = _HELD, programs: int = 0) -> StreamedTile:
    """held: bytes of weight that a thread multiplies at a time. programs: at most; 0: as many as registers allow."""
    warps = max(1, min(8, triton.next_power_of_2(k) // (32 * _BYTES)))
    chunks = triton.cdiv(k, 32 * _BYTES * warps)
    pairs = max(1, min(4, held // (2 * _BYTES * chunks)))
    pairs = 1 << (pairs.bit_length() - 1)
    tiles = triton.cdiv(outputs, pairs if gated else 2 * pairs)
    programs = programs or _PROCESSORS * (3 if chunks == 1 else 2) * 8 // warps
    steps = triton.cdiv(tiles, programs)
    return StreamedTile(pairs, chunks, warps, triton.cdiv(tiles, steps), steps)


def _assembly_for(x: Tensor) -> str | None:
    return assembly() if x.is_cuda and torch.version.hip is None else None


def takes_streamed(w: EightBit, rows: int) -> bool:
    """Whether it is on, and the weight is one that it reads: FP8, of inputs that are quantised, and of whole parts."""
    k, columns = w.weight.shape[-1], w.columns
    parts = _PART <= columns <= 32 * _BYTES and columns & (columns - 1) == 0  # no group is longer than a warp's inputs
    whole = k % _BYTES == 0 and (w.group_of_all or parts)
    fp8 = w.weight.dtype == torch.float8_e4m3fn and w.inputs != "plain"
    return w.streamed and 1 <= rows <= MAX_ROWS and fp8 and whole


def streamed(
    w: EightBit,
    x: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
    tile: StreamedTile | None = None,
) -> tuple[Tensor, Tensor]:
    """The product, of x [up to some rows, K] normalised first if there is a norm, and the residual stream."""
    launch = RowProduct(
        w, x, bias, residual=residual, norm_weight=norm_weight, eps=eps, gate=gate, add=add, out=out
    )  # fmt: skip
    tile = tile or streamed_tile(launch.outputs, x.shape[1], gated=gate is not None)
    assert tile.programs * tile.steps * tile.pairs * (1 if gate else 2) >= launch.outputs, (tile, launch.outputs)
    _streamed_kernel[(tile.programs,)](
        *launch.arguments, **launch.constants, PAIRS=tile.pairs, STEPS=tile.steps, CHUNKS=tile.chunks,
        GROUP=0 if w.group_of_all else w.columns, CAST=x.is_cuda,
        WARPS=tile.warps, ASM=_assembly_for(x), num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return launch.y, launch.total
