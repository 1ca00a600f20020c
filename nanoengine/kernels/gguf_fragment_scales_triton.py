"""What a thread does with the scales in a tile of `gguf_fragments`. Tensors have one element a thread.

c: sums of a group's codes with x, two columns of a row; e: of its second half (Q6_K), or of its upper four bits (Q8_0).
s and r: the sums of x itself, of a group, or of its halves. BASE: what was added to each code.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import triton
import triton.language as tl

from nanoengine.kernels.gguf_fragment_parts_triton import split4, words_at


@triton.jit
def _half(word):
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _byte(word, AT: tl.constexpr):
    return ((word >> 8 * AT) & 255).to(tl.float32)


@triton.jit
def _signed(word, AT: tl.constexpr):
    return ((word << 24 - 8 * AT) >> 24).to(tl.float32)


@triton.jit
def scales(ptr, row, t, mask, KIND: tl.constexpr, ONE: tl.constexpr):
    """Words of a row's scales; ptr: to those of the tile. ONE: only those of groups 2 * t and 2 * t + 1 (all, of Q4_K
    and Q5_K)."""
    if (KIND == "Q4_K") or (KIND == "Q5_K"):
        return split4(words_at(ptr + row * 4, mask))
    elif KIND == "Q6_K":
        d = tl.load((ptr + 64).to(tl.pointer_type(tl.uint16)) + row, mask=mask, other=0).to(tl.int32)
        if ONE:
            return tl.load(ptr + row * 4 + t, mask=mask, other=0), d
        else:
            w0, w1, w2, w3 = split4(words_at(ptr + row * 4, mask))
            return w0, w1, w2, w3, d
    elif (KIND == "Q4_1") or (KIND == "Q5_1"):
        if ONE:
            at = (ptr + row * 8 + 2 * t)[:, None] + tl.arange(0, 2)[None, :]
            return tl.split(tl.load(at, mask=mask[:, None], other=0))
        else:
            w0, w1, w2, w3 = split4(words_at(ptr + row * 8, mask))
            w4, w5, w6, w7 = split4(words_at(ptr + row * 8 + 4, mask))
            return w0, w1, w2, w3, w4, w5, w6, w7
    else:
        if ONE:
            return (tl.load(ptr + row * 4 + t, mask=mask, other=0),)
        else:
            return split4(words_at(ptr + row * 4, mask))


@triton.jit
def _fields(words):
    """Of Q4_K and Q5_K: d, that of minima; scales of groups 0 to 3, 4 to 7; minima so."""
    w0, w1, w2, w3 = words
    late = (w3 & 0x0F0F0F0F) | ((w1 >> 2) & 0x30303030)
    late_mins = ((w3 >> 4) & 0x0F0F0F0F) | ((w2 >> 2) & 0x30303030)
    return _half(w0), _half(w0 >> 16), w1 & 0x3F3F3F3F, late, w2 & 0x3F3F3F3F, late_mins


@triton.jit
def _centred(c, e, s, KIND: tl.constexpr, BASE: tl.constexpr):
    """Sums with codes as they are multiplied by a scale, of the types that have one scale a group, and no minimum."""
    if KIND == "Q8_0":
        return (c - BASE * s) + 16.0 * (e - (BASE + 8.0) * s)
    else:
        return c - (BASE + (8.0 if KIND == "Q4_0" else 16.0)) * s


@triton.jit
def add_two_groups(y, words, t, c0, c1, e0, e1, sums, KIND: tl.constexpr, BASE: tl.constexpr):
    """y and groups 2 * t and 2 * t + 1 of a row, which are its columns; words by `scales`, ONE."""
    s0, s1, r0, r1 = sums
    if (KIND == "Q4_K") or (KIND == "Q5_K"):
        d, least, early, late, early_mins, late_mins = _fields(words)
        at = t % 2 * 16
        scale = tl.where(t >= 2, late, early) >> at
        mins = tl.where(t >= 2, late_mins, early_mins) >> at
        y += d * (_byte(scale, 0) * (c0 - BASE * s0) + _byte(scale, 1) * (c1 - BASE * s1))
        return y - least * (_byte(mins, 0) * s0 + _byte(mins, 1) * s1)
    elif KIND == "Q6_K":
        word, d = words
        base: tl.constexpr = BASE + 32.0
        first = _signed(word, 0) * (c0 - base * s0) + _signed(word, 1) * (e0 - base * r0)
        return y + _half(d) * (first + _signed(word, 2) * (c1 - base * s1) + _signed(word, 3) * (e1 - base * r1))
    elif (KIND == "Q4_1") or (KIND == "Q5_1"):
        w0, w1 = words
        y += _half(w0) * (c0 - BASE * s0) + _half(w0 >> 16) * s0
        return y + _half(w1) * (c1 - BASE * s1) + _half(w1 >> 16) * s1
    else:
        y += _half(words[0]) * _centred(c0, e0, s0, KIND, BASE)
        return y + _half(words[0] >> 16) * _centred(c1, e1, s1, KIND, BASE)


@triton.jit
def add_group(y0, y1, words, c0, c1, e0, e1, sums, J: tl.constexpr, KIND: tl.constexpr, BASE: tl.constexpr):
    """y and group J of a row, of two tokens, which are its columns; words by `scales`."""
    s0, s1, r0, r1 = sums
    if (KIND == "Q4_K") or (KIND == "Q5_K"):
        d, least, early, late, early_mins, late_mins = _fields(words)
        scale = d * _byte(early if J < 4 else late, J % 4)
        low = least * _byte(early_mins if J < 4 else late_mins, J % 4) + BASE * scale
        return (y0 + scale * c0) - low * s0, (y1 + scale * c1) - low * s1
    elif KIND == "Q6_K":
        d, word = _half(words[4]), words[J // 2]
        first, second = d * _signed(word, J % 2 * 2), d * _signed(word, J % 2 * 2 + 1)
        base: tl.constexpr = BASE + 32.0
        y0 = (y0 + first * (c0 - base * s0)) + second * (e0 - base * r0)
        return y0, (y1 + first * (c1 - base * s1)) + second * (e1 - base * r1)
    elif (KIND == "Q4_1") or (KIND == "Q5_1"):
        scale = _half(words[J])
        low = _half(words[J] >> 16) - BASE * scale
        return (y0 + scale * c0) + low * s0, (y1 + scale * c1) + low * s1
    else:
        scale = _half(words[J // 2] >> J % 2 * 16)
        return y0 + scale * _centred(c0, e0, s0, KIND, BASE), y1 + scale * _centred(c1, e1, s1, KIND, BASE)
