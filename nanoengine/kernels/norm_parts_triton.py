"""A root-mean-square norm between two products takes no launch: `matmul.Scaled`, in tiles of outputs x tokens."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_scale(squares_ptr, t, rows, SQUARES: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, eps):
    """What normalises each of the tokens t, [1, BLOCK_T]. SQUARES: parts of each one's sum of squares; PARTS: the next
    power of two."""
    part = tl.arange(0, PARTS)[:, None]
    squares = tl.load(squares_ptr + part * rows + t, mask=(part < SQUARES) & (t < rows), other=0.0)
    return tl.reshape(tl.rsqrt(tl.sum(squares, 0) / K + eps), t.shape)


@triton.jit
def prepare_norm(y, weight, scaled_ptrs, sum_ptrs, t, mask, rows):
    """For the norm behind a product: y [BLOCK_N, BLOCK_T] times the norm's weight (float32), and each token's sum of
    squares."""
    wide = tl.where(mask, y.to(tl.float32), 0.0)
    tl.store(scaled_ptrs, (wide * weight).to(y.dtype), mask=mask)
    tl.store(sum_ptrs, tl.reshape(tl.sum(wide * wide, 0), t.shape), mask=t < rows)
