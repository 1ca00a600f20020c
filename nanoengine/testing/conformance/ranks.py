"""Tensor-parallel ranks as threads of one process: what a model does when it is split, without processes or devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

import torch
from torch import Tensor

from nanoengine.api import TensorParallelGroup

T = TypeVar("T")
_SECONDS = 60.0  # until ranks that wait for one that called no collective give up


class _Meeting:
    """Where the ranks lay down their tensors and look at the others'."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size)
        self.laid: list[Tensor] = [torch.empty(0)] * size

    def all(self, rank: int, x: Tensor) -> list[Tensor]:
        self.laid[rank] = x
        self.barrier.wait(_SECONDS)
        found = list(self.laid)
        self.barrier.wait(_SECONDS)  # nobody lays down the next one before all have looked
        return found


class ThreadRank(TensorParallelGroup):
    """One rank, a thread."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._meeting.all(self.rank, x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._meeting.all(self.rank, x), dim=-1)

    def highest(self, keys: Tensor) -> Tensor:
        return torch.stack(self._meeting.all(self.rank, keys)).amax(0)

    def minimum(self, value: int) -> int:
        return min(int(each) for each in self._meeting.all(self.rank, torch.tensor(value)))


class Ranks:
    """`size` ranks that do the same thing at the same time."""

    def __init__(self, size: int) -> None:
        self._meeting = _Meeting(size)
        self.groups = [ThreadRank(rank, size, self._meeting) for rank in range(size)]

    def each(self, do: Callable[[int], T]) -> Sequence[T]:
        """`do(rank)` on every rank at once. Raises what the first of them raised; the others are let go."""

        def run(rank: int) -> T:
            try:
                return do(rank)
            except BaseException:
                self._meeting.barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.groups)) as pool:
            futures = [pool.submit(run, rank) for rank in range(len(self.groups))]
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise next((e for e in errors if not isinstance(e, BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]
