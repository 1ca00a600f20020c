"""The tensor-parallel group as the layers see it. One rank: every collective is the identity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


class SingleRank(TensorParallelGroup):
    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x
