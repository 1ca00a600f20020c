"""Tensors from mapped files to a GPU, at the speed of the slower of disk and bus.

Copying to a GPU straight from a file's mapping stops at each page that is not in memory yet, and pageable memory is
copied twice. Here threads fill a ring of pinned buffers, piece by piece, while earlier pieces are on their way to the
device. Host memory stays at the ring's size, whatever the checkpoint's.
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
_ON_THE_WAY = 3  # copies enqueued before the oldest is awaited
_THREADS = 8  # a page cache gives a thread 2 to 4 GB/s


@dataclass(frozen=True, slots=True)
class _Piece:
    """`buffer` being filled with what goes to `into`; `then`: what is called once all of its tensor is enqueued."""

    filled: Future[None]
    buffer: Tensor
    into: Tensor
    then: Callable[[], None] | None


class Uploads:
    """Copies CPU tensors to `device`, in the order of `put`, on the current stream; `with` waits for the last.

    On a CPU device it works all the same, without pinned memory, which tests use.
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
        """`take` is given `values` on the device, of the same dtype, in stream order; later, or before this returns.

        `values` must stay as they are until then; their last dimension must be dense.
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
    """Parts of both of at most `limit` bytes, cut between rows, or within rows that are longer."""
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
    """numpy's copy, not torch's: it stays on this thread, and lets the others run."""
    data = source.view(torch.uint8).numpy()
    np.copyto(buffer.numpy()[: data.size].reshape(data.shape), data)
