"""Triton: a tile of keys and values in eight bits, by products of float16, which has each of their codes."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import triton
import triton.language as tl

from nanoengine.kernels.paged_attention_read_triton import capped

# Two bytes of each of two keys -> the first, or the second, of both as float16.
_FP8_AT = """{{
.reg .b32 a;
.reg .b16 b, c;
prmt.b32 a, $1, 0, {bytes};
mov.b32 {{b, c}}, a;
cvt.rn.f16x2.e4m3x2 $0, b;
}}"""
_INT8_AT = """{{
.reg .b32 a, one, off;
prmt.b32 a, $1, 0x64646464, {bytes};
xor.b32 a, a, 0x00800080;
mov.b32 one, 0x3C003C00;
mov.b32 off, 0xE480E480;
fma.rn.f16x2 $0, a, one, off;
}}"""
_INT8_ALL = tl.constexpr("""{
.reg .b32 a, b, one, off;
prmt.b32 a, $2, 0x64646464, 0x4140;
prmt.b32 b, $2, 0x64646464, 0x4342;
xor.b32 a, a, 0x00800080;
xor.b32 b, b, 0x00800080;
mov.b32 one, 0x3C003C00;
mov.b32 off, 0xE480E480;
fma.rn.f16x2 $0, a, one, off;
fma.rn.f16x2 $1, b, one, off;
}""")
FP8_EVEN, FP8_ODD = (tl.constexpr(_FP8_AT.format(bytes=bytes_)) for bytes_ in ("0x0020", "0x0031"))
INT8_EVEN, INT8_ODD = (tl.constexpr(_INT8_AT.format(bytes=bytes_)) for bytes_ in ("0x4240", "0x4341"))


@triton.jit
def _run(asm: tl.constexpr, words):
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _codes_at(words, ODD: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """float16: the even or the odd codes of int16 words of two. So values are read as tensor cores take them."""
    if ASM and DTYPE == tl.int8:  # noqa: SIM300
        if ODD:
            return _run(INT8_ODD, words)
        else:
            return _run(INT8_EVEN, words)
    elif ASM:
        if ODD:
            return _run(FP8_ODD, words)
        else:
            return _run(FP8_EVEN, words)
    else:
        return ((words >> (8 if ODD else 0)) & 255).to(tl.uint8).to(DTYPE, bitcast=True).to(tl.float16)


@triton.jit
def _half(codes, ASM: tl.constexpr):
    """Codes as float16; not by the slow conversion of single integers."""
    if ASM and codes.dtype == tl.int8:
        return tl.inline_asm_elementwise(_INT8_ALL, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return codes.to(tl.float16)


@triton.jit
def tile_of_codes(
    query, key, words, query_size, key_scale, value_scale, seen, top, total, even, odd,
    SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`_tile` of codes, by products of float16, which has each of them: (top, total, even, odd), the values' even and
    odd elements. query: float16, divided by query_size [G]."""
    scores = tl.dot(query, tl.trans(_half(key, ASM)), input_precision="ieee")
    scores = capped(scores * query_size[:, None] * key_scale[None, :], SCALE, SOFT_CAP)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    fade = tl.exp2(top - higher)
    p = tl.exp2(scores - higher[:, None])
    total = total * fade + tl.sum(p, 1)
    largest = tl.maximum(tl.max(value_scale, 0), 1e-30)  # so that float16 has what is multiplied
    p = (p * (value_scale / largest)[None, :]).to(tl.float16)
    fade = fade[:, None]
    even = even * fade + largest * tl.dot(p, _codes_at(words, False, DTYPE, ASM), input_precision="ieee")
    odd = odd * fade + largest * tl.dot(p, _codes_at(words, True, DTYPE, ASM), input_precision="ieee")
    return higher, total, even, odd
