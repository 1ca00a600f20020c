"""Products of one row with a large FP8 weight, by programs that all run at once and walk through the weight's rows, as
`matvec_streamed_triton` does it: rings of shared memory are filled before a program waits for the kernel in front. Each
program normalises and quantises x itself, while its ring fills: a product is one launch.

A thread has 16 neighbouring inputs of each piece of K, of x and of every row. Tensor cores sum up what threads
multiply, two rows of the weight at a time: codes are exact in float16. A product has 16 rows and 8 columns: rows 0 to 7
are eight parts of 64 inputs of one row of the weight, rows 8 to 15 those of the other, and column i is part i of x. So
what is wanted of a product is its diagonals. Which inputs a thread has does not matter, but that they are those of one
row, and the same of x.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment,var-annotated"
# ruff: noqa: N803, RUF005 - constants of a kernel are in capitals, and Triton knows no starred tuple
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_mul
from nanoengine.kernels.eight_bit import EightBit
from nanoengine.kernels.matvec_parts_triton import load_if, result
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.quantise_triton import _codes, scale_of

_PROCESSORS = 132  # of a Hopper GPU
_PIECE = 4096  # of K: a tensor's elements
_LEAST_K = 2048
_WORTH = 20 << 20  # bytes of a weight; smaller ones were not faster


def assembly() -> tuple[str, str]:
    """PTX: words of two rows ($4 to $7, $8 to $11), x as float16 (first halves $12 to $15, second $16 to $19), sums
    ($20 to $23) -> sums. And sums ($8 to $11) -> what is wanted of the first ($0) and second ($4), and zeros."""
    lines = [".reg .b16 l, h;", ".reg .b32 a<4>;"]
    for word in range(4):
        for row in range(2):
            lines.append(f"mov.b32 {{l, h}}, ${4 + 4 * row + word};")
            lines += [f"cvt.rn.f16x2.e4m3x2 a{row}, l;", f"cvt.rn.f16x2.e4m3x2 a{row + 2}, h;"]
        given = ", ".join(f"${i + (0 if word else 20)}" for i in range(4))
        x = f"{{${12 + word}, ${16 + word}}}"
        mma = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        lines.append(f"{mma} {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}}, {x}, {{{given}}};")
    pick = [".reg .b32 lane, part, column;", ".reg .pred even, odd;"]
    pick += ["mov.u32 lane, %laneid;", "shr.u32 part, lane, 2;", "and.b32 column, lane, 3;"]
    pick += ["shl.b32 column, column, 1;", "setp.eq.u32 even, part, column;"]
    pick += ["add.u32 column, column, 1;", "setp.eq.u32 odd, part, column;"]
    for row in range(2):
        pick += [f"selp.f32 ${4 * row}, ${9 + 2 * row}, 0f00000000, odd;"]
        pick += [f"selp.f32 ${4 * row}, ${8 + 2 * row}, ${4 * row}, even;"]
        pick += [f"mov.f32 ${4 * row + i}, 0f00000000;" for i in range(1, 4)]
    return "{" + "\n".join(lines) + "}", "{" + "\n".join(pick) + "}"


@triton.jit
def _row_pieces(ptr, row, there, K: tl.constexpr, PIECE: tl.constexpr, ASM: tl.constexpr):
    """Rows [R, 1]: of each piece the codes [R, PIECE], or words of four of them."""
    found = ()
    for first in tl.static_range(0, K, PIECE):
        if ASM is not None:
            word = tl.arange(0, PIECE // 4)[None, :]
            ptrs = ptr.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * (K // 4) + first // 4 + word
            found = found + (tl.load(ptrs, mask=there & (word < (K - first) // 4), other=0),)
        else:
            k = tl.arange(0, PIECE)[None, :]
            ptrs = ptr + row.to(tl.int64) * K + first + k
            found = found + (tl.load(ptrs, mask=there & (k < K - first), other=0.0),)
    return found


@triton.jit
def _vector(ptr, K: tl.constexpr, PIECE: tl.constexpr):
    """K values: of each piece [1, PIECE]."""
    found = ()
    for first in tl.static_range(0, K, PIECE):
        k = tl.arange(0, PIECE)[None, :]
        found = found + (tl.load(ptr + first + k, mask=k < K - first, other=0.0),)
    return found


@triton.jit
def _normed(raw, norms, eps, K: tl.constexpr, PIECES: tl.constexpr, NORM: tl.constexpr):
    """Pieces of x in float32, normalised as a kernel in front would."""
    found = ()
    if NORM:
        squares = tl.zeros(raw[0].shape, tl.float32)
        for i in tl.static_range(PIECES):
            wide = raw[i].to(tl.float32)
            squares += wide * wide
        shrink = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / K + eps)
    for i in tl.static_range(PIECES):
        wide = raw[i].to(tl.float32)
        if NORM:
            wide = (wide * shrink * norms[i].to(tl.float32)).to(raw[0].dtype).to(tl.float32)
        found = found + (wide,)
    return found


@triton.jit
def _words(codes, PIECE: tl.constexpr):
    """FP8 [1, PIECE] -> words of two float16 [1, PIECE / 4]: of the first two of each four codes, and of the others."""
    bits = tl.reshape(codes.to(tl.uint8, bitcast=True), (1, PIECE // 4, 2, 2)).to(tl.int32)
    even, odd = tl.split(bits)
    low, high = tl.split(even | (odd << 8))
    return tl.inline_asm_elementwise(
        "{.reg .b16 l, h;\nmov.b32 {l, h}, $2;\ncvt.rn.f16x2.e4m3x2 $0, l;\ncvt.rn.f16x2.e4m3x2 $1, h;}",
        "=r,=r,r", [low | (high << 16)], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _quantised(
    x, input_scale_ptr, bound_ptr, PIECES: tl.constexpr, PIECE: tl.constexpr,
    INPUTS: tl.constexpr, HAS_BOUND: tl.constexpr, CAST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Pieces of x -> of each two operands of `_added`, and the scale [1]."""
    most, off = tl.zeros(x[0].shape, tl.float32), tl.zeros(x[0].shape, tl.float32)
    for i in tl.static_range(PIECES):
        most = tl.maximum(most, tl.abs(x[i]))
        off += x[i] * 0.0
    # of bits, which have the order of what is not negative: a warp has an instruction for whole numbers
    most = tl.max(most.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    scale = scale_of(most, tl.sum(off, 1), input_scale_ptr, bound_ptr, INPUTS, False, HAS_BOUND, False)
    found = ()
    for i in tl.static_range(PIECES):
        codes = _codes(x[i], scale[:, None], False, INPUTS == "tensor" or HAS_BOUND, CAST)
        if CAST or ASM is not None:
            codes = codes.to(tl.float8e4nv)
        if ASM is not None:
            found = found + _words(codes, PIECE)
        else:
            found = found + (codes.to(tl.float32), codes.to(tl.float32))
    return found, scale


@triton.jit
def _empty(PIECES: tl.constexpr, PIECE: tl.constexpr, ASM: tl.constexpr):
    """What `_quantised` gives, of zeros."""
    found = ()
    for _ in tl.static_range(2 * PIECES):
        if ASM is not None:
            found = found + (tl.zeros((1, PIECE // 4), tl.int32),)
        else:
            found = found + (tl.zeros((1, PIECE), tl.float32),)
    return found, tl.zeros((1,), tl.float32)


@triton.jit
def _by_warp(each, ROWS: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, width] -> [ROWS, WARPS], sums over what a warp has: LANES neighbours, again and again."""
    turns: tl.constexpr = each.shape[1] // (WARPS * LANES) if each.shape[1] > WARPS * LANES else 1
    parts = tl.reshape(each, (ROWS, turns, WARPS, each.shape[1] // (turns * WARPS)))
    return tl.sum(tl.sum(parts, 1), 2)


@triton.jit
def _sums(
    w, u, x, ROWS: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr
):
    """Pieces of ROWS rows and of as many others, times those of x -> each [ROWS, WARPS]."""
    if ASM is not None:
        c = tl.zeros((ROWS, PIECE // 4), tl.float32)
        for i in tl.static_range(PIECES):
            low, high = tl.broadcast_to(x[2 * i], c.shape), tl.broadcast_to(x[2 * i + 1], c.shape)
            c = tl.inline_asm_elementwise(
                ASM[0], "=&f,=&f,=&f,=&f" + ",r" * 16 + ",f,f,f,f", [w[i], u[i], low, high, c],
                dtype=tl.float32, is_pure=False, pack=4,
            )  # fmt: skip
        first, second = tl.inline_asm_elementwise(
            ASM[1], "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f", [c], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )
    else:
        first = tl.zeros((ROWS, PIECE), tl.float32)
        second = tl.zeros((ROWS, PIECE), tl.float32)
        for i in tl.static_range(PIECES):
            first += w[i].to(tl.float32) * x[2 * i]
            second += u[i].to(tl.float32) * x[2 * i]
    return _by_warp(first, ROWS, WARPS, 64), _by_warp(second, ROWS, WARPS, 64)


@triton.jit
def _streamed_kernel(
    x_ptr, norm_weight_ptr, input_scale_ptr, bound_ptr, weight_ptr, scale_ptr, bias_ptr, add_ptr, y_ptr, eps,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, PADDED: tl.constexpr,
    PIECE: tl.constexpr, STAGES: tl.constexpr, SCALE_ROWS: tl.constexpr,
    INPUTS: tl.constexpr, HAS_BOUND: tl.constexpr, CAST: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
    WARPS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A step has ROWS rows of the weight and as many others: ups of the same outputs with a gate, else the next
    outputs. PADDED: STEPS, up to the next power of two; a warp's lanes at least."""
    pieces: tl.constexpr = (K + PIECE - 1) // PIECE
    apart: tl.constexpr = N if GATED else ROWS
    outputs: tl.constexpr = ROWS if GATED else 2 * ROWS
    rows: tl.constexpr = 2 * N if GATED else N
    first = tl.program_id(0) * (STEPS * outputs)
    at_step = tl.arange(0, PADDED)[None, :]
    n = first + at_step * outputs + tl.arange(0, ROWS)[:, None]
    there, there_too = (at_step < STEPS) & (n < N), (at_step < STEPS) & (n + apart < rows)
    release_dependents(PDL)
    scale = tl.load(scale_ptr + n // SCALE_ROWS, mask=there, other=0.0)
    scale_too = tl.load(scale_ptr + (n + apart) // SCALE_ROWS, mask=there_too, other=0.0)
    norms = ()
    if NORM:
        norms = _vector(norm_weight_ptr, K, PIECE)
    x, x_scale = _empty(pieces, PIECE, ASM)
    # A warp's part of each step's sums, which a lane keeps: warps meet at the end.
    sums = tl.zeros((ROWS, WARPS, PADDED), tl.float32)
    sums_too = tl.zeros((ROWS, WARPS, PADDED), tl.float32)
    add = tl.zeros((ROWS, PADDED), tl.float32)
    add_too = tl.zeros((ROWS, PADDED), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        r = first + step * outputs + tl.arange(0, ROWS)[:, None]
        w = _row_pieces(weight_ptr, r, r < N, K, PIECE, ASM)
        u = _row_pieces(weight_ptr, r + apart, r + apart < rows, K, PIECE, ASM)
        if step == 0:  # in the loop, so that copies of its first stages are in front of the wait
            wait_for_inputs(PDL)
            normed = _normed(_vector(x_ptr, K, PIECE), norms, eps, K, pieces, NORM)
            x, x_scale = _quantised(normed, input_scale_ptr, bound_ptr, pieces, PIECE, INPUTS, HAS_BOUND, CAST, ASM)
            add += load_if(HAS_ADD, add_ptr + n, there)
            add_too += load_if(HAS_ADD and not GATED, add_ptr + n + apart, there_too)
        own, own_too = _sums(w, u, x, ROWS, pieces, PIECE, WARPS, ASM)
        this = tl.arange(0, PADDED)[None, None, :] == step
        sums = tl.where(this, own[:, :, None], sums)
        sums_too = tl.where(this, own_too[:, :, None], sums_too)
    y, too = tl.split(tl.sum(tl.join(sums, sums_too), 1) * x_scale[:, None, None])
    y = y * scale + load_if(HAS_BIAS, bias_ptr + n, there)
    too = too * scale_too + load_if(HAS_BIAS, bias_ptr + n + apart, there_too)
    if GATED:
        y = act_mul(y, too, ACTIVATION)
    else:
        tl.store(y_ptr + n + apart, (too + add_too).to(y_ptr.dtype.element_ty), mask=there_too)
    tl.store(y_ptr + n, (y + add).to(y_ptr.dtype.element_ty), mask=there)


@dataclass(frozen=True, slots=True)
class StreamedTile:
    """Pairs of rows of the weight a step, stages of the ring and one more, warps, and programs at most. registers: the
    most that a thread takes, so that the next kernel's programs find room beside these; 0: any number."""

    rows: int
    stages: int
    warps: int = 4
    programs: int = 2 * _PROCESSORS
    registers: int = 0


def tile_of(outputs: int, k: int, *, gated: bool) -> StreamedTile:
    """The fastest of 8 to 15 tiles for each product of Qwen3-8B, in a chain of 10 layers (one H200, 2026-11-30)."""
    if k > _PIECE:  # a row is long: one pair a step
        return StreamedTile(1, 5)
    return StreamedTile(2, 4, programs=4 * _PROCESSORS) if gated else StreamedTile(2, 5)


def constants(tile: StreamedTile, outputs: int, k: int, *, gated: bool) -> dict[str, int]:
    """Those of the kernel that the tile and the weight decide."""
    each = tile.rows if gated else 2 * tile.rows
    steps = triton.cdiv(triton.cdiv(outputs, each), tile.programs)
    return {
        "N": outputs, "K": k, "ROWS": tile.rows, "STEPS": steps, "PADDED": max(32, triton.next_power_of_2(steps)),
        "PIECE": min(_PIECE, triton.next_power_of_2(k)), "STAGES": tile.stages, "WARPS": tile.warps,
    }  # fmt: skip


def _assembly_for(x: Tensor) -> tuple[str, str] | None:
    return assembly() if x.is_cuda and torch.version.hip is None else None


def takes_streamed(w: EightBit, rows: int) -> bool:
    """Whether it is on, for one row of inputs that are quantised with one scale, and a large FP8 weight with one an
    output."""
    outputs, k = w.weight.shape
    fp8 = w.weight.dtype == torch.float8_e4m3fn and w.inputs in ("token", "tensor")
    large = outputs * k >= _WORTH and k >= _LEAST_K and k % 16 == 0 and outputs <= 1 << 15
    return w.streamed and rows == 1 and fp8 and w.group_of_all and large


def streamed(
    w: EightBit,
    x: Tensor,
    bias: Tensor | None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
    tile: StreamedTile | None = None,
) -> Tensor:
    """The product, of x [1, K] normalised first if there is a norm."""
    rows, k = x.shape
    outputs = len(w.weight) // 2 if gate else len(w.weight)
    assert rows == 1 and x.stride(1) == 1 and w.weight.is_contiguous() and w.scale.is_contiguous(), (x.stride(), w)
    assert add is None or (add.shape == (1, outputs) and add.stride(1) == 1), add
    tile = tile or tile_of(outputs, k, gated=gate is not None)
    y, made = result(x, outputs, out), constants(tile, outputs, k, gated=gate is not None)
    share = made["STEPS"] * tile.rows * (1 if gate else 2)
    assert not x.is_cuda or made["PIECE"] >= 512 * tile.warps, (made, tile)  # four words a thread
    options: dict[str, Any] = {"maxnreg": tile.registers} if tile.registers and x.is_cuda else {}
    _streamed_kernel[(triton.cdiv(outputs, share),)](
        x, norm_weight if norm_weight is not None else x, w.input_scale if w.input_scale is not None else w.scale,
        w.bound if w.bound is not None else w.scale, w.weight, w.scale, bias if bias is not None else x,
        add if add is not None else x, y, eps, **made, SCALE_ROWS=w.rows,
        INPUTS=w.inputs, HAS_BOUND=w.bound is not None, CAST=x.is_cuda,
        GATED=gate is not None, ACTIVATION=gate, NORM=norm_weight is not None, HAS_BIAS=bias is not None,
        HAS_ADD=add is not None, ASM=_assembly_for(x), num_warps=tile.warps, **options, **pdl_options(x),
    )  # fmt: skip
    return y
