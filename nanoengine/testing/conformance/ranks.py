"""Tensor-parallel ranks as threads of one process, to test a split model without processes or devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

import torch
from torch import Tensor

from nanoengine.api import TensorParallelGroup

T = TypeVar("T")
_SECONDS = 60.0  # so long ranks wait for one that does not call the collective


class _Meeting:
    """Exchanges tensors between the ranks."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size)
        self.laid: list[Tensor] = [torch.empty(0)] * size

    def all(self, rank: int, x: Tensor) -> list[Tensor]:
        self.laid[rank] = x
        self.barrier.wait(_SECONDS)
        found = list(self.laid)
        self.barrier.wait(_SECONDS)  # no rank writes its next tensor before all have read this one
        return found


class ThreadRank(TensorParallelGroup):
    """One rank, which is a thread."""

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
    """`size` ranks that run the same function at the same time."""

    def __init__(self, size: int) -> None:
        self._meeting = _Meeting(size)
        self.groups = [ThreadRank(rank, size, self._meeting) for rank in range(size)]

    def each(self, do: Callable[[int], T]) -> Sequence[T]:
        """Runs `do(rank)` on every rank at the same time. Raises the error of the first rank that failed."""

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
