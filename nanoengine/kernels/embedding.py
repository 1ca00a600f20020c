"""Rows of an embedding in plain torch: the twin of `embedding_triton`, and what any way to find rows shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, weight: Tensor, *, first: int | None = None, out: Tensor | None = None) -> Tensor:
    """As `ops.Ops.embedding`."""
    rows = partial(F.embedding, weight=weight)
    y = rows(ids) if first is None else rows_of_part(rows, ids, first, len(weight))
    return y if out is None else out.copy_(y)


def rows_of_part(rows: Callable[[Tensor], Tensor], ids: Tensor, first: int, count: int) -> Tensor:
    """What `rows` finds in a part of an embedding, `count` ids from `first` on; 0 for ids outside of it."""
    local = ids - first
    elsewhere = (local < 0) | (local >= count)
    return rows(local.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0.0)
