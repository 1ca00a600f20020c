"""Bit masks over the vocabulary: one pass that writes only what a mask removes."""

# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _mask_bits_kernel(logits_ptr, words_ptr, stride, words_stride, count, start, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = start + column
    words = tl.load(words_ptr + row * words_stride + (ids >> 5), mask=column < count, other=-1)
    removed = ((words >> (ids & 31)) & 1) == 0
    tl.store(logits_ptr + row * stride + column, float("-inf"), mask=(column < count) & removed)


def mask_bits_(logits: Tensor, words: Tensor, start: int = 0) -> Tensor:
    """As `bitmask.mask_bits_`. Rows may be strided; a row is contiguous."""
    rows, count = logits.shape
    assert (count == 0 or logits.stride(1) == 1) and words.stride(1) == 1, (logits.stride(), words.stride())
    if rows and count:
        _mask_bits_kernel[(rows, triton.cdiv(count, _BLOCK))](
            logits, words, logits.stride(0), words.stride(0), count, start, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return logits
