"""The tensor-parallel group as the layers see it. One rank: every collective is the identity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TensorParallelGroup(ABC):
    """rank, size and the collectives that layers use."""

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks."""

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n * size], rank order along the last dimension."""

    @abstractmethod
    def highest(self, keys: Tensor) -> Tensor:
        """int64 [R] -> the highest of all ranks' keys in each place."""

    def minimum(self, value: int) -> int:
        """The lowest of all ranks' values. For the start and what else is rare: it waits for the device."""
        assert self.size == 1, "several ranks have to compare"
        return value

    def agree(self, yes: bool) -> bool:
        """Whether all ranks say yes."""
        return bool(self.minimum(int(yes)))

    def begin_forward(self) -> None:  # noqa: B027 - most have nothing to do
        """A forward pass starts, or the capture of one. Every rank calls it."""

    def partial_sum(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Where to write [rows, width] that goes to `all_reduce_add` next; None: anywhere."""
        return None

    def all_reduce_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum over ranks, to be added to the residual stream: (sum, residual), or (all added up, None)."""
        return self.all_reduce(x), residual


class ShapesOnly(TensorParallelGroup):
    """Rank 0 of `size` without the others: what a rank's layers look like."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.size, dim=-1)

    def highest(self, keys: Tensor) -> Tensor:
        return keys


class SingleRank(TensorParallelGroup):
    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def highest(self, keys: Tensor) -> Tensor:
        return keys


def padded_length(total: int, size: int) -> int:
    """Length of each rank's piece when `total` is filled up to a multiple of `size`."""
    return -(-total // size)
