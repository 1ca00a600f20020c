"""Copies tensors from mapped files to a GPU, as fast as the disk or the bus allows.

A direct copy from a mapped file to a GPU waits for each page that is not in memory yet, and copies pageable memory
twice. Here threads fill a ring of pinned buffers, piece by piece, while earlier pieces are copied to the device. The
host memory is the size of the ring, for any size of the checkpoint.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

BUFFER_BYTES, NUM_BUFFERS = 4 << 20, 16
_ON_THE_WAY = 3  # most copies that are enqueued at the same time
_THREADS = 8  # one thread reads 2 to 4 GB/s from the page cache


@dataclass(frozen=True, slots=True)
class _Piece:
    """A buffer that is being filled, for `into` on the device. `then`: called when the whole tensor is enqueued."""

    filled: Future[None]
    buffer: Tensor
    into: Tensor
    then: Callable[[], None] | None


class Uploads:
    """Copies CPU tensors to `device`, in the order of `put`, on the current stream. Leaving the context waits for all.

    It also works on a CPU device, without pinned memory; tests use this.
    """

    def __init__(
        self, device: torch.device, *, buffer_bytes: int = BUFFER_BYTES, num_buffers: int = NUM_BUFFERS
    ) -> None:
        self._device, self._cuda, self._limit = device, device.type == "cuda", buffer_bytes
        ring = torch.empty(num_buffers, buffer_bytes, dtype=torch.uint8, pin_memory=self._cuda)
        self._free: list[Tensor] = list(ring)
        self._filling: deque[_Piece] = deque()
        self._sent: deque[tuple[torch.cuda.Event | None, Tensor]] = deque()
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="nanoengine-read")

    def put(self, values: Tensor, take: Callable[[Tensor], None]) -> None:
        """Copies `values` to the device and calls `take` with the copy (same dtype), in stream order, now or later.

        `values` must not change until then, and their last dimension must be dense.
        """
        staged = torch.empty(values.shape, dtype=values.dtype, device=self._device)
        pieces = list(_pieces(values, staged, self._limit))
        for i, (source, into) in enumerate(pieces):
            buffer = self._buffer()
            done = self._pool.submit(_fill, buffer, source)
            self._filling.append(_Piece(done, buffer, into, (lambda: take(staged)) if i == len(pieces) - 1 else None))

    def _buffer(self) -> Tensor:
        while not self._free:
            if self._filling and len(self._sent) < _ON_THE_WAY:
                self._send_oldest()
            else:
                self._await_oldest()
        return self._free.pop()

    def _send_oldest(self) -> None:
        piece = self._filling.popleft()
        piece.filled.result()
        held = piece.buffer[: piece.into.nbytes].view(piece.into.dtype).view(piece.into.shape)
        piece.into.copy_(held, non_blocking=True)
        event = None
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._sent.append((event, piece.buffer))
        if piece.then is not None:
            piece.then()

    def _await_oldest(self) -> None:
        event, buffer = self._sent.popleft()
        if event is not None:
            event.synchronize()
        self._free.append(buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._filling and error is None:
                self._send_oldest()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            while self._sent:
                self._await_oldest()


def _pieces(values: Tensor, into: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching parts of both tensors, of at most `limit` bytes. Split between rows; longer rows are split too."""
    if not values.numel() or not values.dim():
        yield values.reshape(-1), into.view(-1)
        return
    row = values.nbytes // len(values)
    if row > limit and values.dim() > 1:
        for source, target in zip(values, into, strict=True):
            yield from _pieces(source, target, limit)
        return
    step = max(1, limit // row)
    for at in range(0, len(values), step):
        yield values[at : at + step], into[at : at + step]


def _fill(buffer: Tensor, source: Tensor) -> None:
    """Copies with numpy instead of torch: it uses only this thread, and other threads can run."""
    data = source.view(torch.uint8).numpy()
    np.copyto(buffer.numpy()[: data.size].reshape(data.shape), data)
