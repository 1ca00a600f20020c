"""Host memory that a GPU reads and writes in place, with a turn for each of the last steps; and memory that is copied
to the GPU beside a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.kernels.device import current_stream

TURNS = 32  # a power of two: kernels take a turn modulo it


class HostRing:
    """Turns of int32 memory, pinned for a GPU, taken by steps one after the other.

    A turn is taken again `TURNS` turns later. At most two steps are in flight, with up to five turns each where they
    capture graphs, so its last owner is done by then, and nothing is allocated, or waited for.

    Attributes:
        values: int32 [TURNS, ...]. views: the same as numpy arrays, one a turn. turn: the one that was taken last.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.values = torch.zeros((TURNS, *shape), dtype=torch.int32, pin_memory=device.type == "cuda")
        self.views: list[npt.NDArray[np.int32]] = list(self.values.numpy())
        self.turn = 0

    def next(self) -> npt.NDArray[np.int32]:
        """Take a turn."""
        self.turn = (self.turn + 1) % TURNS
        return self.views[self.turn]

    def send(self, count: int, into: Tensor) -> None:
        """Copy the first `count` words of the turn into the front of a tensor on the device, without waiting."""
        into[:count].copy_(self.values[self.turn, :count], non_blocking=True)


class AnswerRing(HostRing):
    """What the last steps drew, by their turns of another ring: int32 [TURNS, 3, W], as `step_inputs.Answer` says."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__((3, width), device)
        self._device = device
        self._arrived = [torch.cuda.Event() for _ in self.views]  # type: ignore[no-untyped-call]

    def launched(self, turn: int) -> tuple[npt.NDArray[np.int32], torch.cuda.Event]:
        """[3, W] of the step that is launched by now, and the event behind which it is there."""
        self._arrived[turn].record(current_stream(self._device))
        return self.views[turn], self._arrived[turn]


class CopiedBeside:
    """int32 memory, pinned for a GPU, that is copied there: on a stream of its own, beside what runs, if `beside`.

    Attributes:
        host: numpy array. there: the same on the device.
    """

    def __init__(self, shape: Sequence[int], value: int, device: torch.device, *, beside: bool = True) -> None:
        """value: of all elements at first. beside: else the copy is on the current stream."""
        on_gpu = device.type == "cuda"
        self.there = torch.full(shape, value, dtype=torch.int32, device=device)
        self._sent = torch.full(shape, value, dtype=torch.int32, pin_memory=on_gpu)
        self.host: npt.NDArray[np.int32] = self._sent.numpy()
        self.stream: torch.cuda.Stream | None = None
        if on_gpu and beside:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.stream.wait_stream(torch.cuda.current_stream(device))  # which fills `there`
            self.there.record_stream(self.stream)  # its memory is no one else's before the last copy is done
        self._device = device
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def send(self, rows: int) -> None:
        """Copy the first rows, without waiting. What is launched from here on finds them. Nothing that reads or
        writes `there` may be running."""
        here = current_stream(self._device)
        if here is None or self.stream is None:
            self.there[:rows].copy_(self._sent[:rows], non_blocking=True)
            return
        torch.cuda.set_stream(self.stream)
        try:
            self.there[:rows].copy_(self._sent[:rows], non_blocking=True)
        finally:
            torch.cuda.set_stream(here)
        self._copied.record(self.stream)
        here.wait_event(self._copied)
