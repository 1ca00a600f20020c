"""Memory that the GPUs of a host can read of each other, and small collectives that use it.

Products of few rows end with their sum over ranks, through inboxes that ranks write into (`inboxes_triton`). Others
are written into the rank's buffer (`partial`), and one kernel on each rank reads the buffers of all
(`all_reduce_triton`). Larger sums use NCCL. The GPUs must be able to access each other's memory (NVLink or PCIe peer
access); multicast is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from nanoengine.kernels.inboxes_triton import Inboxes

_BUFFERS = 3
_ALIGN = 256
_CAPACITY = {2: 8 << 20}
_CAPACITY_OF_MORE = 1 << 20
"""Up to so many bytes, one kernel is faster than NCCL's ring. With two ranks both move the same number of bytes; with
more, one kernel reads size - 1 times as many."""
_WORDS, _COPIES = 128 << 10, 2 << 20
"""Bytes of a rank's part of an inbox: a row of 16,384 words; 256 rows of 4,096 copies, at most `capacity`."""


class SymmetricMemory:
    """One rank's view of the memory. All ranks make it together, and use it in the same order.

    There are three buffers, so that no rank writes where another rank may still read. Each sum synchronises the ranks
    once, before it reads. A buffer is written again only after a later synchronisation. The first sum of a forward pass
    uses the third buffer, and the others alternate, so this does not depend on the graph that ran before.
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        max_rows: int,
        entered: Callable[[], None] = lambda: None,
        *,
        pushes: bool = True,
    ) -> None:
        """`max_rows`: most keys of `highest`. `entered`, `pushes`: as in `DistributedGroup`. Raises torch's errors if
        GPUs cannot access each other's memory."""
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symmetric

        from nanoengine.kernels import all_reduce_triton
        from nanoengine.kernels.inboxes_triton import PLACES, Inboxes

        self._kernels, self._entered = all_reduce_triton, entered
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.capacity = _CAPACITY.get(size, _CAPACITY_OF_MORE)
        self._half = max_rows
        signal_bytes = size * all_reduce_triton.MAX_PROGRAMS * 4
        starts, copies = [0], min(_COPIES, self.capacity)
        inboxes = (2 * size * _WORDS, 2 * size * copies, size * PLACES * 4) if pushes else ()
        for part in (_BUFFERS * self.capacity, 2 * max_rows * 8, signal_bytes, signal_bytes, *inboxes):
            starts.append(starts[-1] + -(-part // _ALIGN) * _ALIGN)
        self._memory = symmetric.empty(starts[-1], dtype=torch.uint8, device=device)
        self._memory.zero_()
        self._handle = symmetric.rendezvous(self._memory, group.group_name)
        every = [self._handle.get_buffer(peer, (starts[-1],), torch.uint8) for peer in range(size)]
        torch.cuda.synchronize(device)
        dist.barrier(group)  # no rank may signal before all signals are zero
        addresses = torch.tensor([each.data_ptr() for each in every], dtype=torch.int64)

        def peers(data: int, signals: int) -> Any:
            return all_reduce_triton.Peers(
                rank=rank,
                size=size,
                data=(addresses + data).to(device),
                signals=(addresses + signals).to(device),
                turns=torch.zeros(all_reduce_triton.MAX_PROGRAMS, dtype=torch.int32, device=device),
            )

        self._sums, self._keys = peers(0, starts[2]), peers(starts[1], starts[3])
        self._turn = 0
        self.inboxes: Inboxes | None = None
        if pushes:
            words, tiles, signals = ((addresses + start).to(device) for start in starts[4:7])
            turns = torch.zeros(PLACES, dtype=torch.int32, device=device)
            self.inboxes = Inboxes(rank, size, words, tiles, signals, turns, (_WORDS, copies))

    def begin_forward(self) -> None:
        self._turn = 0

    def partial(self, rows: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """A tensor [rows, width] in the next buffer; None if it is too large."""
        size = rows * width * dtype.itemsize
        if not 0 < size <= self.capacity or (width * dtype.itemsize) % 16:
            return None
        start = self._buffer * self.capacity
        return self._memory[start : start + size].view(dtype).view(rows, width)

    def fits_inboxes(self, like: Tensor) -> bool:
        """Whether a product like this may be summed through `inboxes`."""
        if self.inboxes is None or like.dim() != 2 or not like.is_contiguous():
            return False
        words, copies = self.inboxes.capacity
        return 8 * like.shape[1] <= words and like.nbytes <= copies

    def all_reduce_add(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The sum over ranks and the residual stream; None if x is too large. x need not be from `partial`."""
        buffer = self.partial(math.prod(x.shape[:-1]), x.shape[-1], x.dtype)
        if buffer is None:
            return None
        if x.data_ptr() != buffer.data_ptr():
            buffer.copy_(x.view(buffer.shape))
        offset = self._buffer * self.capacity // x.element_size()
        like = buffer.view(x.shape)
        out = torch.empty_like(like)
        self._entered()  # after everything that may run out of memory
        self._turn += 1
        return self._kernels.all_reduce_add(self._sums, offset, like, residual, out)

    def highest(self, keys: Tensor) -> Tensor:
        """int64 [R] -> int64 [R], the maximum over ranks, element by element."""
        out = torch.empty_like(keys)
        self._entered()
        return self._kernels.highest(self._keys, keys, self._half, out)

    @property
    def _buffer(self) -> int:
        """The index of the next buffer: 2 first, then 0 and 1 alternately."""
        return 2 if self._turn == 0 else (self._turn - 1) % 2
