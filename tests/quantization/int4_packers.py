"""Codes of four bits, packed as files have them: the inverse of the readers, written from the formats' definitions."""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # code i of a word is the one of output AWQ_ORDER[i]


def words(codes: Tensor) -> Tensor:
    """Codes of 0 to 15 [..., 8 * n] -> int32 [..., n], the first in the lowest bits."""
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8))
    packed = sum(eights[..., i] << 4 * i for i in range(8))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def awq(codes: Tensor) -> Tensor:
    """[n, out] -> int32 [n, out / 8]: of qweight [in, out], and of zeros [groups, out]."""
    return words(codes.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2))


def gptq(codes: Tensor) -> Tensor:
    """[in, out] -> int32 [in / 8, out]."""
    return words(codes.t()).t().contiguous()


def less_one(words_: Tensor) -> Tensor:
    """Zeros as format "gptq" (v1) has them: words minus 0x11111111."""
    return words_ - 0x11111111
