"""`int4.int4_linear` of one row by tensor cores, of codes in tiles (`int4.in_tiles`): what a warp loads are
operands of products, without a trip through shared memory.

A thread works as in CUDA: tensors have one element a thread. A warp has 128 inputs at a time, of two tiles of 16 rows
of the weight; thread 4 * g + t has, of rows g and g + 8, the inputs 32 * t to 32 * t + 31. A code is put into the last
bits of 128 (bfloat16) or 1024 (float16), two codes by one instruction or two; a product with ones says how much of a
sum that, and the zero, was. The eight columns of a product are for tokens: the only one is in all of them.

A program's warps take the inputs by turns. There are as many programs as run at a time, each with several units of 32
rows: while one is added up, codes of the next are on their way to registers.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.gguf_fragment_parts_triton import KINDS, MMA, split4, words_at
from nanoengine.kernels.gguf_fragments_triton import sums_of_rows
from nanoengine.kernels.int4 import Int4Weight
from nanoengine.kernels.int4_product import Int4Product
from nanoengine.kernels.matmul import Scaled
from nanoengine.kernels.matvec_parts_triton import load_if
from nanoengine.kernels.norm_parts_triton import prepare_norm
from nanoengine.kernels.pdl_triton import release_dependents, wait_for_inputs
from nanoengine.kernels.split_k_triton import load_around, write_tile

_LINES = 32  # of the weight in a unit
_PROCESSORS = 132


@functools.cache
def assembly(dtype: torch.dtype) -> tuple[str, str]:
    """PTX for the products of 128 inputs, and for the sums of x. Words of rows g and g + 8 ($4 to $7, $8 to $11), x of
    each code (from $12 on, or from $2 on), four words each -> sums."""
    name, base, one = KINDS[dtype]
    mma, zeros = MMA.format(name), "{z, z, z, z}"
    codes, ones = [".reg .b32 a<4>, s; .reg .f32 z;", "mov.f32 z, 0f00000000;"], [".reg .b32 a; .reg .f32 z, p, q;"]
    ones += [f"mov.b32 a, {one};", "mov.f32 z, 0f00000000;"]
    for code in range(4):
        for half in range(2):
            for at in range(4):
                word = f"${4 + 4 * (at % 2) + 2 * half + at // 2}"
                if code:
                    codes.append(f"shr.u32 s, {word}, {4 * code};")
                codes.append(f"lop3.b32 a{at}, {'s' if code else word}, 0x000F000F, {base}, 0xEA;")
            x, first = 4 * code + 2 * half, code == half == 0
            sums = zeros if first else "{$0, $1, $2, $3}"
            codes.append(f"{mma} {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}}, {{${12 + x}, ${13 + x}}}, {sums};")
            sums = zeros if first else "{$0, $1, p, q}"
            ones.append(f"{mma} {{$0, $1, p, q}}, {{a, a, a, a}}, {{${2 + x}, ${3 + x}}}, {sums};")
    return "{" + "\n".join(codes) + "}", "{" + "\n".join(ones) + "}"


@triton.jit
def _words(ptrs, wanted):
    """16 bytes at each of the word pointers [threads]; anything where they are not wanted."""
    return tl.load(ptrs[:, None] + tl.arange(0, 4)[None, :], mask=wanted[:, None], eviction_policy="evict_first")


@triton.jit
def _pair(ptrs, wanted):
    """Two neighbours at each of the pointers [threads]; 0 where they are not wanted."""
    return tl.split(tl.load(ptrs[:, None] + tl.arange(0, 2)[None, :], mask=wanted[:, None], other=0))


@triton.jit
def _step(
    codes_ptr, scales_ptr, zeros_ptr, tile, other, step, lane, wanted,
    K: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """What a thread has of 128 inputs of the two tiles: codes; scales; zeros (scales where there are none). WHOLE: no
    warp asks for a step that is not there."""
    steps: tl.constexpr = K // 128
    groups: tl.constexpr = K // GROUP
    if not WHOLE:  # of a step that is not there: any codes, for x that is 0
        wanted = wanted & (step < steps)
        step = tl.where(step < steps, step, steps - 1)
    wanted = tl.broadcast_to(wanted, lane.shape)
    a = codes_ptr + (tile.to(tl.int64) * steps + step) * 256 + lane * 4
    b = codes_ptr + (other.to(tl.int64) * steps + step) * 256 + lane * 4
    at = step // (GROUP // 128) * 16 + lane // 4 * 2
    first, second = tile.to(tl.int64) * (16 * groups) + at, other.to(tl.int64) * (16 * groups) + at
    codes = (_words(a, wanted), _words(a + 128, wanted), _words(b, wanted), _words(b + 128, wanted))
    scales = _pair(scales_ptr + first, wanted) + _pair(scales_ptr + second, wanted)
    if HAS_ZEROS:
        return codes + scales + _pair(zeros_ptr + first, wanted) + _pair(zeros_ptr + second, wanted)
    else:
        return codes + scales + scales


@triton.jit
def _inputs(ptrs, wanted, ASM: tl.constexpr):
    """x of a thread's 32 inputs: 16 words of two, of code 0 first; without ASM float32 [threads, 32]."""
    if ASM is not None:
        words = ptrs.to(tl.pointer_type(tl.int32))
        return (
            split4(words_at(words, wanted)) + split4(words_at(words + 4, wanted))
            + split4(words_at(words + 8, wanted)) + split4(words_at(words + 12, wanted))
        )  # fmt: skip
    else:
        return (tl.load(ptrs[:, None] + tl.arange(0, 32)[None, :], mask=wanted[:, None], other=0.0).to(tl.float32),)


@triton.jit
def _codes_of(words):
    """Words [threads, 4] -> float32 [threads, 32], in the order of the inputs."""
    code, half = tl.arange(0, 4)[None, :, None, None], tl.arange(0, 2)[None, None, None, :]
    codes = (tl.reshape(words, (words.shape[0], 1, 4, 1)) >> (4 * code + 16 * half)) & 15
    return tl.reshape(codes, (words.shape[0], 32)).to(tl.float32)


@triton.jit
def _plain_products(codes, x):
    """Of [threads, 32] each, added up over a thread's inputs and the threads of a row, in all of which it is."""
    each = tl.reshape(tl.sum(codes * x, axis=1), (x.shape[0] // 4, 4))
    return tl.reshape(tl.broadcast_to(tl.sum(each, axis=1)[:, None], each.shape), (x.shape[0],))


@triton.jit
def _products(low, high, x, ASM: tl.constexpr):
    """Of words [threads, 4] of rows g and g + 8 and x: (row g, row g + 8). All columns are the same."""
    if ASM is not None:
        found = tl.inline_asm_elementwise(
            ASM, "=&f,=&f,=&f,=&f" + ",r" * 24, split4(low) + split4(high) + x,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
        return found[0], found[2]
    else:
        return _plain_products(_codes_of(low), x[0]), _plain_products(_codes_of(high), x[0])


@triton.jit
def _sums(x, ASM: tl.constexpr):
    """Sum of a step's x, in each thread."""
    if ASM is not None:
        return tl.inline_asm_elementwise(
            ASM, "=&f,=&f" + ",r" * 16, x, dtype=(tl.float32, tl.float32), is_pure=False, pack=1
        )[0]
    else:
        return _plain_products(tl.full(x[0].shape, 1.0, tl.float32), x[0])


@triton.jit
def _scaled(c, s, scale, zero, BASE: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """Sums with values, of sums c with codes and s of x."""
    if HAS_ZEROS:
        return scale.to(tl.float32) * (c - (zero.to(tl.float32) + BASE) * s)
    else:
        return scale.to(tl.float32) * (c - (8.0 + BASE) * s)


@triton.jit
def _added(here, x, y, BASE: tl.constexpr, HAS_ZEROS: tl.constexpr, PRODUCTS: tl.constexpr, SUMS: tl.constexpr):
    """y, of a thread's four rows, and the products of a step. here: of `_step`."""
    s = _sums(x, SUMS)
    a0, a1 = _products(here[0], here[1], x, PRODUCTS)
    b0, b1 = _products(here[2], here[3], x, PRODUCTS)
    return (
        y[0] + _scaled(a0, s, here[4], here[8], BASE, HAS_ZEROS),
        y[1] + _scaled(a1, s, here[5], here[9], BASE, HAS_ZEROS),
        y[2] + _scaled(b0, s, here[6], here[10], BASE, HAS_ZEROS),
        y[3] + _scaled(b1, s, here[7], here[11], BASE, HAS_ZEROS),
    )


@triton.jit
def _squares_at(squares_ptr, lane, there, SQUARES: tl.constexpr):
    """What a thread has of the sum of squares: each warp has all of it, so that none waits for another."""
    found = tl.zeros(lane.shape, tl.float32)
    for i in tl.static_range((SQUARES + 31) // 32):
        part = lane + 32 * i
        found += tl.load(squares_ptr + part, mask=(part < SQUARES) & there, other=0.0)
    return found


@triton.jit
def _normalised(y, squares, eps, K: tl.constexpr):
    """Sums with the norm of x."""
    each = tl.reshape(squares, (squares.shape[0] // 32, 32))
    total = tl.broadcast_to(tl.sum(each, 1)[:, None], each.shape)
    norm = tl.reshape(tl.rsqrt(total / K + eps), squares.shape)
    return y[0] * norm, y[1] * norm, y[2] * norm, y[3] * norm


@triton.jit
def _tiles_of(unit, N: tl.constexpr, GATED: tl.constexpr):
    if GATED:
        return unit, unit + N // 16
    else:
        return 2 * unit, 2 * unit + 1


@triton.jit(do_not_specialize=["rows"])
def _tiles_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, add_ptr, y_ptr, part_ptr, ticket_ptr,
    squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, x_stride, y_stride, add_stride, eps,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, HAS_ZEROS: tl.constexpr, TILED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, SQUARES: tl.constexpr, PARTS: tl.constexpr, NEXT: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr, PRODUCTS: tl.constexpr, SUMS: tl.constexpr, BASE: tl.constexpr,
    UNITS: tl.constexpr, PROGRAMS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """UNITS: of 32 rows. AHEAD: steps of 128 inputs whose codes a warp asks for before it needs them."""
    steps: tl.constexpr = K // 128
    each: tl.constexpr = (steps + WARPS * AHEAD - 1) // (WARPS * AHEAD) * AHEAD  # of a warp
    whole: tl.constexpr = each * WARPS == steps
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
    first = tl.program_id(0)
    tile, other = _tiles_of(first, N, GATED)
    codes = ()
    for j in tl.static_range(AHEAD):
        codes = codes + _step(
            words_ptr, scales_ptr, zeros_ptr, tile, other, j * WARPS + warp, lane, first < UNITS,
            K, GROUP, whole, HAS_ZEROS,
        )  # fmt: skip
    release_dependents(PDL)
    wait_for_inputs(PDL)
    t = tl.arange(0, BLOCK_T)[None, :]  # one token
    x_ptrs = x_ptr + lane % 4 * 32
    zero = tl.zeros((32 * WARPS,), tl.float32)
    for unit in range(first, UNITS, PROGRAMS):
        around = load_around(unit, t, bias_ptr, add_ptr, rows, add_stride, N, BLOCK_N, GATED, HAS_BIAS, HAS_ADD)
        n = (unit * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        next_weight = load_if(NEXT, next_ptr + n, n < N)
        behind_tile, behind_other = _tiles_of(unit + PROGRAMS, N, GATED)
        if SQUARES > 0:  # the mask keeps it, and what waits for it, behind the products
            squares = _squares_at(squares_ptr, lane, unit < UNITS, SQUARES)
        y = (zero, zero, zero, zero)
        for start in range(0, each, AHEAD):
            last = start + AHEAD >= each
            wanted = (start + AHEAD < each) | (unit + PROGRAMS < UNITS)
            next_tile, next_other = tl.where(last, behind_tile, tile), tl.where(last, behind_other, other)
            next_start = tl.where(last, 0, start + AHEAD)
            for j in tl.static_range(AHEAD):
                step = (start + j) * WARPS + warp
                x = _inputs(x_ptrs + step * 128, step < steps, PRODUCTS)
                y = _added(codes, x, y, BASE, HAS_ZEROS, PRODUCTS, SUMS)
                codes = codes[12:] + _step(
                    words_ptr, scales_ptr, zeros_ptr, next_tile, next_other, (next_start + j) * WARPS + warp, lane,
                    wanted, K, GROUP, whole, HAS_ZEROS,
                )  # fmt: skip
        tile, other = behind_tile, behind_other
        if SQUARES > 0:
            y = _normalised(y, squares, eps, K)
        acc = sums_of_rows(y, y, WARPS, BLOCK_T, GATED) * 0.25  # four threads have the same
        y, to, mask = write_tile(acc, unit, t, around, y_ptr, rows, y_stride, N, BLOCK_T, BLOCK_N, GATED, ACTIVATION)
        if NEXT:
            prepare_norm(y, next_weight, scaled_ptr + to, sums_ptr + unit * rows + t, t, mask, rows)


@dataclass(frozen=True, slots=True)
class TilesTile:
    """Warps of a program, how many programs a multiprocessor has, steps of codes ahead in registers, and registers of a
    thread; 0: as many as it takes."""

    warps: int
    programs: int
    ahead: int
    registers: int = 0


def tile_for(n: int, k: int) -> TilesTile:
    """n: rows of the weight. From the layers of Qwen3-8B in a chain with attention, bf16, one H200, Triton 3.6,
    2026-11-30."""
    units = n // _LINES
    if units > 2 * _PROCESSORS:
        return TilesTile(8, 3, 1, registers=80)
    if units > _PROCESSORS:
        return TilesTile(8, 2, 2)
    return TilesTile(32, 1, 1, registers=64) if k > 8192 else TilesTile(16, 1, 2)


def takes(x: Tensor, weight: Int4Weight) -> bool:
    """Whether it makes a product; tensor cores round float32."""
    return weight.tiled and len(x) == 1 and (x.element_size() == 2 or not x.is_cuda)


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
    tile: TilesTile | None = None,
) -> tuple[Tensor, Scaled | None]:
    """As `int4_triton.product`, of a row and a weight in tiles."""
    if isinstance(x, Tensor):
        x = x.contiguous()  # 16 bytes are loaded at once
    values = x.values if isinstance(x, Scaled) else x
    assert weight.tiled and len(values) == 1, (weight.shape, values.shape)
    tile = tile or tile_for(*weight.shape)
    launch = Int4Product(
        x, weight, bias, eps=eps, gate=gate, add=add, next_norm=next_norm, out=out,
        block_n=_LINES // (2 if gate else 1), block_t=1,
    )  # fmt: skip
    units, asm = launch.grid[0], launch.constants["ASM"]
    programs = min(units, tile.programs * _PROCESSORS)
    products, sums = assembly(values.dtype) if asm else (None, None)
    _tiles_kernel[(programs,)](
        values, *launch.arguments, **launch.constants, PRODUCTS=products, SUMS=sums,
        BASE=(128.0 if values.dtype == torch.bfloat16 else 1024.0) if asm else 0.0,
        UNITS=units, PROGRAMS=programs, WARPS=tile.warps, AHEAD=tile.ahead, num_warps=tile.warps,
        maxnreg=tile.registers or None,
    )  # fmt: skip
    return launch.y, launch.scaled
