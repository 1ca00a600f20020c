"""What a thread does with a tile of `gguf_fragments`: products by tensor cores, and scales.

Tensors have one element a thread. Without ASM, as in the interpreter, products are sums over threads.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from nanoengine.kernels.gguf_fragments import FRAGMENTS

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32"
KINDS = {torch.bfloat16: ("bf16", "0x43004300", "0x3F803F80"), torch.float16: ("f16", "0x64006400", "0x3C003C00")}


@functools.cache
def assembly(kind: str, dtype: torch.dtype) -> tuple[str, str, str]:
    """PTX for products of a group; for those of odd groups, or of the upper four bits; and for sums of x."""
    if kind == "Q8_0":
        return _group(kind, dtype, 0, signed=False), _group(kind, dtype, 0, signed=True), _sums(kind, dtype)
    return _group(kind, dtype, 0), _group(kind, dtype, 1), _sums(kind, dtype)


def _group(kind: str, dtype: torch.dtype, part: int, *, signed: bool = False) -> str:
    """Words of rows g and g + 8 ($8, $9), further bits of both ($10), x ($11 to $14), sums ($15 to $22) -> sums. Of
    Q6_K the second half of a group has sums of its own."""
    name, base, _ = KINDS[dtype]
    mma, more = MMA.format(name), FRAGMENTS[kind].more
    lines = [".reg .b32 a<4>, s, m;"]
    for half in range(2):
        for at in range(4):
            row, pair = at % 2, 2 * half + at // 2
            lines.append(f"shr.u32 s, ${8 + row}, {4 * pair};")
            if signed:  # the sign's bit is turned over: codes are 8 more
                lines.append(f"lop3.b32 a{at}, s, 0x000F000F, {_or(base, 0x00080008)}, 0x6A;")
            else:
                lines.append(f"lop3.b32 a{at}, s, 0x000F000F, {base}, 0xEA;")
            if more:
                shift = (4 * row + pair) * more + 8 * part * (more == 1) - 4
                lines.append(f"{'shr.u32' if shift >= 0 else 'shl.b32'} m, $10, {abs(shift)};")
                lines.append(f"lop3.b32 a{at}, m, {'0x00100010' if more == 1 else '0x00300030'}, a{at}, 0xEA;")
        to = 4 if half and kind == "Q6_K" else 0
        taken = 15 + to if to or not half else 0
        sums, given = (", ".join(f"${first + i}" for i in range(4)) for first in (to, taken))
        lines.append(f"{mma} {{{sums}}}, {{a0, a1, a2, a3}}, {{${11 + 2 * half}, ${12 + 2 * half}}}, {{{given}}};")
    if kind != "Q6_K":
        lines += [f"mov.b32 ${4 + i}, ${19 + i};" for i in range(4)]
    return "{" + "\n".join(lines) + "}"


def _or(base: str, bits: int) -> str:
    return hex(int(base, 16) | bits)


def _sums(kind: str, dtype: torch.dtype) -> str:
    """x of a group in each column ($4 to $7) -> its sums in two of them; of Q6_K of each half."""
    name, _, one = KINDS[dtype]
    mma, ones = MMA.format(name), "{a, a, a, a}"
    lines = [".reg .b32 a; .reg .f32 z, p, q;", f"mov.b32 a, {one};", "mov.f32 z, 0f00000000;"]
    lines.append(f"{mma} {{$0, $1, p, q}}, {ones}, {{$4, $5}}, {{z, z, z, z}};")
    if kind == "Q6_K":
        lines.append(f"{mma} {{$2, $3, p, q}}, {ones}, {{$6, $7}}, {{z, z, z, z}};")
    else:
        lines.append(f"{mma} {{$0, $1, p, q}}, {ones}, {{$6, $7}}, {{$0, $1, p, q}};")
        lines.append("mov.f32 $2, z; mov.f32 $3, z;")
    return "{" + "\n".join(lines) + "}"


@triton.jit
def split4(words):
    """[threads, 4] -> four of [threads]."""
    even, odd = tl.split(tl.reshape(words, (words.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def words_at(ptrs, mask):
    """16 bytes at each of the word pointers [threads]."""
    return tl.load(ptrs[:, None] + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0)


@triton.jit
def _two_at(ptrs, mask):
    return tl.split(tl.load(ptrs[:, None] + tl.arange(0, 2)[None, :], mask=mask[:, None], other=0))


@triton.jit
def inputs(x_ptrs, mask, KIND: tl.constexpr, ASM: tl.constexpr):
    """x of a group: eight values of each thread, as four words of two; without ASM float32 [threads, 8]. The pointers:
    where x of the group begins."""
    t = tl.arange(0, x_ptrs.shape[0]) % 4
    if KIND == "Q6_K":
        if ASM:
            ptrs = (x_ptrs + 4 * t).to(tl.pointer_type(tl.int32))
            first, second = _two_at(ptrs, mask)
            third, fourth = _two_at(ptrs + 8, mask)
            return first, second, third, fourth
        else:
            at = tl.arange(0, 8) // 4 * 16 + tl.arange(0, 8) % 4
            return (tl.load((x_ptrs + 4 * t)[:, None] + at[None, :], mask=mask[:, None], other=0.0).to(tl.float32),)
    else:
        if ASM:
            return split4(words_at((x_ptrs + 8 * t).to(tl.pointer_type(tl.int32)), mask))
        else:
            at = tl.arange(0, 8)
            return (tl.load((x_ptrs + 8 * t)[:, None] + at[None, :], mask=mask[:, None], other=0.0).to(tl.float32),)


@triton.jit
def only(x, here, ASM: tl.constexpr):
    """x where it is `here`, else 0."""
    if ASM:
        mask = tl.where(here, -1, 0)
        return x[0] & mask, x[1] & mask, x[2] & mask, x[3] & mask
    else:
        return (tl.where(here[:, None], x[0], 0.0),)


@triton.jit
def by_column(values):
    """What a product would return: [warps, rows, columns] -> two columns of each thread's row."""
    first, second = tl.split(tl.reshape(values, (values.shape[0], 8, 4, 2)))
    return tl.reshape(first, (values.shape[0] * 32,)), tl.reshape(second, (values.shape[0] * 32,))


@triton.jit
def _half_sums(codes, x, HALVES: tl.constexpr):
    """Products of [threads, 8] and x, over a thread's eight weights or each four, and over the threads of a row."""
    warps: tl.constexpr = x.shape[0] // 32
    each = tl.reshape(codes, (warps, 8, 1, 4, 2, 4)) * tl.reshape(x, (warps, 1, 8, 4, 2, 4))
    each = tl.sum(tl.sum(each, axis=5), axis=3)  # [warps, rows, columns, halves of a group]
    first, second = tl.split(each)
    if not HALVES:
        first, second = first + second, 0.0 * second
    c0, c1 = by_column(first)
    e0, e1 = by_column(second)
    return c0, c1, e0, e1


@triton.jit
def _codes_of(word, more, ROW: tl.constexpr, PART: tl.constexpr, MORE: tl.constexpr, SIGNED: tl.constexpr):
    weight = tl.arange(0, 8)[None, :]
    codes = (word[:, None] >> (weight // 2 * 4 + weight % 2 * 16)) & 15
    if SIGNED:
        codes = codes ^ 8
    if MORE > 0:
        shift = (ROW * 4 + weight // 2) * MORE + weight % 2 * 16 + (8 * PART if MORE == 1 else 0)
        codes += ((more[:, None] >> shift) & (2 * MORE - 1)) << 4
    return codes.to(tl.float32)


@triton.jit
def group(low, high, more, x, c, e, KIND: tl.constexpr, MORE: tl.constexpr, PART: tl.constexpr, ASM: tl.constexpr):
    """Adds the products of a group's codes to the sums c: (row g, two columns; row g + 8, two columns). Of Q6_K those
    of the second half to e. ASM: for this group; None in the interpreter. PART: 1 in odd groups, and in the upper four
    bits of Q8_0."""
    if ASM is not None:
        c0, c1, c2, c3, e0, e1, e2, e3 = tl.inline_asm_elementwise(
            ASM, "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,f,f,f,f,f,f,f,f",
            [low, high, more, x[0], x[1], x[2], x[3], c[0], c[1], c[2], c[3], e[0], e[1], e[2], e[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip
        return (c0, c1, c2, c3), (e0, e1, e2, e3)
    else:
        signed: tl.constexpr = KIND == "Q8_0" and PART == 1
        halves: tl.constexpr = KIND == "Q6_K"
        c0, c1, e0, e1 = _half_sums(_codes_of(low, more, 0, PART, MORE, signed), x[0], halves)
        c2, c3, e2, e3 = _half_sums(_codes_of(high, more, 1, PART, MORE, signed), x[0], halves)
        return (c[0] + c0, c[1] + c1, c[2] + c2, c[3] + c3), (e[0] + e0, e[1] + e1, e[2] + e2, e[3] + e3)


@triton.jit
def sums(x, KIND: tl.constexpr, ASM: tl.constexpr):
    """Sums of the groups of x in two columns of each thread; of Q6_K of each half."""
    if ASM is not None:
        return tl.inline_asm_elementwise(
            ASM, "=&f,=&f,=&f,=&f,r,r,r,r", [x[0], x[1], x[2], x[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return _half_sums(tl.full(x[0].shape, 1.0, tl.float32), x[0], KIND == "Q6_K")
