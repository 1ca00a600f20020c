"""The tensor-parallel group that layers use. With one rank, every collective returns its input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TensorParallelGroup(ABC):
    """Rank, size and the collectives that layers use."""

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks."""

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n * size], in rank order along the last dimension."""

    @abstractmethod
    def highest(self, keys: Tensor) -> Tensor:
        """int64 [R] -> int64 [R], the maximum over ranks, element by element."""

    def minimum(self, value: int) -> int:
        """The minimum over ranks. It waits for the device, so use it at the start and in rare cases only."""
        assert self.size == 1, "a group of several ranks must override this"
        return value

    def agree(self, yes: bool) -> bool:
        """Whether `yes` is true on all ranks. It waits for the device."""
        return bool(self.minimum(int(yes)))

    def begin_forward(self) -> None:  # noqa: B027 - most have nothing to do
        """Called by the engine, on every rank, before a forward pass and before the capture of one."""

    def partial_sum(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """A buffer [rows, width] for the tensor that is passed to `all_reduce_add` next. None: use any memory."""
        return None

    def all_reduce_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum `x` over ranks. Returns (sum, residual), or (sum + residual, None) if one kernel does both."""
        return self.all_reduce(x), residual

    def inboxes(self, like: Tensor) -> Callable[[], Any] | None:
        """For a product that ends with its sum over ranks, of the shape and dtype of `like`: what gives where to write,
        as its kernel takes it. All ranks call that, when all memory is there. None: use `all_reduce_add`."""
        return None


class ShapesOnly(TensorParallelGroup):
    """Rank 0 of a group whose other ranks do not exist: used to learn the shapes of a rank's layers."""

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
    """Length of each rank's part when `total` is padded to a multiple of `size`."""
    return -(-total // size)


def vocab_slice(vocab_size: int, tp: TensorParallelGroup) -> tuple[int, int]:
    """First id of this rank's slice of the vocabulary, and the id behind its last."""
    width = padded_length(vocab_size, tp.size)
    return min(tp.rank * width, vocab_size), min((tp.rank + 1) * width, vocab_size)
