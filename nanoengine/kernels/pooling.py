"""Pooling of hidden states: sums over spans of tokens, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def span_sums(hidden: Tensor, last: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The sum over the tokens of each span, in float32: [P, H].

    Args:
        hidden: [T, H]. last: int64 [P], the last token of each span, on the device: spans of one token need one launch.
        spans: first and last token of each; on the host.
    """
    sums = hidden.index_select(0, last).float()
    for row, (first, end) in enumerate(spans):
        if first < end:
            torch.sum(hidden[first : end + 1], 0, dtype=torch.float32, out=sums[row])
    return sums
