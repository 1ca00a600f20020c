"""Triton: what the kernels of paged attention share when they read a row's blocks."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

Scales = tuple[Tensor, Tensor]
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def blocks_of(table, start, end, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Block ids, int64 [TILE] or a scalar, of keys from `start`, a multiple of TILE; dummy block from `end` on."""
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table + start // BLOCK_SIZE).to(tl.int64)
    else:  # spelled out: the compiler wants one type of whatever it sees returned
        keys = start + tl.arange(0, TILE)
        return tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0).to(tl.int64)


@triton.jit
def prefetch_keys(
    cache, table, kv_head, begin, end,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Asks for K or V of AHEAD keys from `begin` on, one request a 128-byte line, to be in L2 soon."""
    line: tl.constexpr = 128 // (cache.dtype.element_ty.primitive_bitwidth // 8)
    keys = begin + tl.arange(0, AHEAD)
    block = tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0).to(tl.int64)
    at = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + keys % BLOCK_SIZE) * D
    for first in tl.static_range(0, D, line):
        ptrs = (cache + at + first).to(tl.int64)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [ptrs], tl.int32, is_pure=False, pack=1)


@triton.jit
def capped(scores, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """Scaled, perhaps capped scores in units of log2 e, so that exp2 does the softmax."""
    if SOFT_CAP > 0:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)): right at both infinities
        tanh = 1 - 2 / (1 + tl.exp2(scores * (2 * LOG2E * SCALE / SOFT_CAP)))
        return tanh * (SOFT_CAP * LOG2E)
    return scores * (SCALE * LOG2E)


@triton.jit
def scaled(codes, scales, at, mask, dtype: tl.constexpr, SCALED: tl.constexpr):
    """(codes in the dtype of products, their scales): what is scaled is the product of codes. Not SCALED: as they are.

    at: of a token's scale; mask: those behind a row's end may be anything."""
    if SCALED:
        return codes.to(dtype), tl.load(scales + at, mask=mask, other=0.0)
    else:  # spelled out: Triton 3.6 wants one type of whatever it sees returned
        return codes, 1.0


def rows_of(x: Tensor) -> Tensor:
    """`x` with each token's heads in one piece; a view where they are already, as in a slice of a fused projection."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
