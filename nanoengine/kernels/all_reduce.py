"""Sums over ranks, and the exchange of the draw's winners, in plain torch: the references of `all_reduce_triton`.

Both see all ranks' values at once, which only a test can.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BAD_KEY = 0x7FFFFFFF << 32
"""The key of a row whose logits were not finite: above every other."""


def all_reduce_add(partials: Sequence[Tensor], residual: Tensor | None) -> Tensor:
    """The sum of all ranks' partial sums and the residual stream, each [T, H]: added in float32 in rank order, rounded
    once, so that every rank comes to the same."""
    total = torch.zeros_like(partials[0], dtype=torch.float32)
    for partial in partials:
        total += partial.float()
    return (total if residual is None else total + residual.float()).to(partials[0].dtype)


def pack_keys(scores: Tensor, token_ids: Tensor) -> Tensor:
    """float32 [R], global ids [R] -> int64 [R] whose order is that of the scores; of equals the lowest id is higher."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - token_ids.long())


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [R] -> (scores float32 [R], global ids int64 [R])."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def highest(keys: Sequence[Tensor]) -> Tensor:
    """All ranks' keys, each int64 [R] -> the highest of each row."""
    return torch.stack(list(keys)).amax(0)
