"""Sums over ranks, and the exchange of the draw's winners, in plain torch: the references of `all_reduce_triton`.

Both see all ranks' values at once, which only a test can.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BAD_KEY = 0x7FFFFFFF << 32
"""The key of a row whose logits were not finite: above every other."""

_LOW = 0xFFFFFFFF
_HIGHEST, _LOWEST = 0x7F800000, -0x7F800001  # +inf and -inf, in the keys' order
_NO_KEY = torch.iinfo(torch.int64).min


def all_reduce_add(partials: Sequence[Tensor], residual: Tensor | None) -> Tensor:
    """The sum of all ranks' partial sums and the residual stream, each [T, H]: added in float32 in rank order, rounded
    once, so that every rank comes to the same."""
    total = torch.zeros_like(partials[0], dtype=torch.float32)
    for partial in partials:
        total += partial.float()
    return (total if residual is None else total + residual.float()).to(partials[0].dtype)


def pack_keys(scores: Tensor, token_ids: Tensor, tops: Tensor) -> Tensor:
    """A slice's best of each row as one number, in the order of the scores; of equals the lowest id is higher.

    Args:
        scores: float32 [R]; -inf: no token is left. token_ids: [R], ids in the whole vocabulary.
        tops: [R], the highest raw logit of the slice; NaN and +inf make the row fail.

    Returns:
        int64 [R].
    """
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    below = torch.where(scores == float("-inf"), tops.isfinite().long(), _LOW - token_ids.long())
    keys = (ordered.long() << 32) | below
    return torch.where(tops < float("inf"), keys, BAD_KEY)  # not of NaN


def no_keys(rows: int, device: torch.device) -> Tensor:
    """Keys of a slice without ids."""
    return torch.full((rows,), _NO_KEY, dtype=torch.int64, device=device)


def highest(keys: Sequence[Tensor]) -> Tensor:
    """All ranks' keys, each int64 [R] -> the highest of each row."""
    return torch.stack(list(keys)).amax(0)


def answer(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The highest keys int64 [R] -> token ids int64 [R], 0 where failed, and failed int32 [R]: 0: fine. 1: the raw
    logits were not finite, or none was above -inf. 2: no token is left, or its score is not finite."""
    value, low = keys >> 32, keys & _LOW
    nothing = (value == _HIGHEST) | ((value == _LOWEST) & (low == 1))
    bad = (value > _HIGHEST) | ((value <= _LOWEST) & (low != 1))
    failed = torch.where(bad, 1, torch.where(nothing, 2, 0)).to(torch.int32)
    return torch.where(failed == 0, _LOW - low, 0), failed
