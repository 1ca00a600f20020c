"""Sums of few rows that ranks write into each other's memory, in front of a norm; see `all_reduce_norm_triton`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoengine.kernels.all_reduce_norm_triton import Inboxes, all_reduce_norm

WORDS, COPIES = 256 << 10, 1 << 20
"""Bytes of a rank's part of an inbox."""
_MAX_ROWS = 64
_SENT_ROWS = 2


@dataclass(frozen=True, slots=True)
class PushedSums:
    """One rank's view of the inboxes. `entered`: as in `DistributedGroup`."""

    words: Inboxes
    copies: Inboxes
    entered: Callable[[], None]

    def of(self, residual: Tensor) -> PushedSum | None:
        """As `TensorParallelGroup.pushed_sum`."""
        rows, width = residual.shape
        fits = residual.nbytes <= self.copies.capacity and 8 * _SENT_ROWS * width <= self.words.capacity
        return PushedSum(self, residual) if 0 < rows <= _MAX_ROWS and fits else None


class PushedSum:
    """As `api.parallel.PushedSum`."""

    def __init__(self, sums: PushedSums, residual: Tensor) -> None:
        self._sums, self._residual = sums, residual
        self._made: tuple[Tensor, Tensor] | None = None

    def begin(self) -> Inboxes:
        """The inboxes of words; all ranks have come to this sum."""
        self._made = self._make()
        return self._sums.words

    def _make(self) -> tuple[Tensor, Tensor]:
        made = torch.empty_like(self._residual), torch.empty_like(self._residual)
        self._sums.entered()  # after everything that may run out of memory
        return made

    def end(self, parts: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        sent = self._made is not None
        out, normed = self._made or self._make()
        inboxes = self._sums.words if sent else self._sums.copies
        all_reduce_norm(inboxes, parts, self._residual, norm_weight, eps, sent=sent, out=out, normed=normed)
        return out, normed
