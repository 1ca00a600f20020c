"""Codes of four bits to values in registers, as the left operand of tensor cores (`wgmma`)."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Two words of 16 bits -> code 0 to 3 of each, as values: a mask makes them the last bits of two floats, $2 takes off
# what these are without a code, and $3 + $4 is the scale, of which $4 is so small that the value is rounded once.
_CUT = """{{
.reg .b32 a, b;
shr.b32 a, $1, {shift};
lop3.b32 a, a, 0x000F000F, {base}, 0xEA;
mov.b32 b, {one};
fma.rn.{kind} a, a, b, $2;
mul.rn.{kind} b, a, $4;
fma.rn.{kind} $0, a, $3, b;
}}"""


def _cuts(**kind: str) -> tuple[gl.constexpr, ...]:
    return tuple(gl.constexpr(_CUT.format(shift=4 * code, **kind)) for code in range(4))


_BF16_0, _BF16_1, _BF16_2, _BF16_3 = _cuts(kind="bf16x2", base="0x43004300", one="0x3F803F80")
_FP16_0, _FP16_1, _FP16_2, _FP16_3 = _cuts(kind="f16x2", base="0x64006400", one="0x3C003C00")


@gluon.jit
def _run(asm: gl.constexpr, words, taken, high, low):
    return gl.inline_asm_elementwise(
        asm, "=r,r,r,r,r", [words, taken, high, low], dtype=taken.dtype, is_pure=True, pack=2
    )


@gluon.constexpr_function
def words_layout(words, gated):
    """Of [64, words] of 16 bits: a thread has those whose codes tensor cores take from it. gated: rows of the gate lie
    above all those of up, which a thread has beside them."""
    across = [[0, 8 << i] for i in range((words // 8).bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    other, warps = ([32, 0], [[8, 0], [16, 0]]) if gated else ([8, 0], [[16, 0], [32, 0]])
    return gl.DistributedLinearLayout([[0, 1], other, *across], lanes, warps, [], [64, words])


@gluon.jit
def halves_of_words(words, GATED: gl.constexpr):
    """Words of 128 inputs of 64 rows, in shared memory -> those of either 64, in registers. GATED: the first half of
    the rows is the gate; of each 16 rows that come out the first 8 are."""
    found = words.load(words_layout(32, GATED))
    if GATED:
        found = gl.permute(gl.reshape(found, [2, 4, 8, 2, 16]), (1, 0, 2, 4, 3))
    else:
        found = gl.permute(gl.reshape(found, [4, 2, 8, 2, 16]), (0, 1, 2, 4, 3))
    left, right = gl.split(gl.reshape(found, [64, 16, 2]))
    like: gl.constexpr = words_layout(16, False)
    return (
        gl.convert_layout(left, like, assert_trivial=True), gl.convert_layout(right, like, assert_trivial=True)
    )  # fmt: skip


@gluon.jit
def values_of(
    words, scale, zero, dtype: gl.constexpr, OF_WORDS: gl.constexpr, OF_VALUES: gl.constexpr, HAS_ZEROS: gl.constexpr
):  # fmt: skip
    """Words [M, W] -> 4 * W values of each row, in order, rounded once to dtype."""
    rows: gl.constexpr = words.shape[0]
    width: gl.constexpr = words.shape[1]
    taken = gl.full([rows], 8.0, gl.float32, layout=gl.SliceLayout(1, OF_WORDS))
    if HAS_ZEROS:
        taken = zero.to(gl.float32)
    taken = (-taken - (128.0 if dtype == gl.bfloat16 else 1024.0)).to(dtype)
    wide = scale.to(gl.float32)
    high = wide.to(dtype)
    low = (wide - high.to(gl.float32)).to(dtype)
    taken = gl.expand_dims(taken, 1).broadcast_to([rows, width])
    high = gl.expand_dims(high, 1).broadcast_to([rows, width])
    low = gl.expand_dims(low, 1).broadcast_to([rows, width])
    if dtype == gl.bfloat16:
        even = gl.join(_run(_BF16_0, words, taken, high, low), _run(_BF16_2, words, taken, high, low))
        odd = gl.join(_run(_BF16_1, words, taken, high, low), _run(_BF16_3, words, taken, high, low))
    else:
        even = gl.join(_run(_FP16_0, words, taken, high, low), _run(_FP16_2, words, taken, high, low))
        odd = gl.join(_run(_FP16_1, words, taken, high, low), _run(_FP16_3, words, taken, high, low))
    both = gl.reshape(gl.join(even, odd), [rows, width // 8, 8, 2, 2])
    both = gl.reshape(gl.permute(both, (0, 1, 3, 4, 2)), [rows, 4 * width])
    return gl.convert_layout(both, OF_VALUES, assert_trivial=True)
