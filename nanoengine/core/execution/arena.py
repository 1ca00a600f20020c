"""Tables in one piece of device memory: all that the host writes to them in a step is one upload and one kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.api.errors import ConfigError

_ALIGNMENT = 4  # words; kernels read pointers that are multiples of 16 bytes faster

Ints = npt.NDArray[np.int64]


def staged(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array on the device, without waiting for what the device is at: a copy from pageable memory would."""
    here = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        here = here.pin_memory()  # from torch's cache; kept until the copy is done
    return here.to(device, non_blocking=True)


class Arena:
    """Tables of 4- and 8-byte elements over one int32 tensor, and the writes to them that wait to be sent.

    `reserve` first, for each; then `make` and `view`; then `write` and `flush`. Writes take effect in their order, at
    `flush`: what was written before something raised is sent by the next one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.words = torch.empty(0, dtype=torch.int32, device=device)
        self._size = 0
        self._offsets: list[Ints] = []
        self._values: list[npt.NDArray[np.int32]] = []
        self._overlap = False

    def reserve(self, count: int, itemsize: int) -> int:
        """Room for a table of `count` elements; returns its first word. `ConfigError` for more than indices reach."""
        assert itemsize in (4, 8), itemsize
        first = -(-self._size // _ALIGNMENT) * _ALIGNMENT
        self._size = first + count * itemsize // 4
        if self._size >= 1 << 31:
            raise ConfigError(
                "the tables of so many slots take more than 8 GiB: lower engine.max_num_seqs, engine.spare_slots or "
                "engine.max_model_len, or raise engine.block_size"
            )
        return first

    def make(self) -> None:
        """All tables, zeroed."""
        self.words = torch.zeros(self._size, dtype=torch.int32, device=self.device)

    def view(self, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The table that `reserve` made room for."""
        count = int(np.prod(shape)) * dtype.itemsize // 4
        return self.words[first : first + count].view(dtype).view(shape)

    @property
    def pending(self) -> bool:
        return bool(self._offsets)

    def write(self, first: int, index: Ints, values: npt.NDArray[Any]) -> None:
        """table.flatten()[index] = values, of the table's own dtype."""
        if values.dtype.itemsize == 8:
            index = (2 * index[:, None] + np.arange(2)).ravel()
        self._offsets.append(first + index)
        self._values.append(np.ascontiguousarray(values).view(np.int32))

    def will_overlap(self) -> None:
        """What is pending and what comes until the next `flush` may go to the same places: the last one counts."""
        self._overlap = True

    def waiting(self) -> npt.NDArray[np.int32]:
        """[2, K]: the words that wait to be written, each once, and their values."""
        if not self._offsets:
            return np.zeros((2, 0), dtype=np.int32)
        offsets, values = np.concatenate(self._offsets), np.concatenate(self._values)
        if self._overlap:
            offsets, last = np.unique(offsets[::-1], return_index=True)
            values = values[::-1][last]
        return np.stack((offsets, values), dtype=np.int32, casting="unsafe")

    def forget(self) -> None:
        """They were sent."""
        self._offsets, self._values, self._overlap = [], [], False

    def flush(self, kernels: Any) -> None:
        """Send what is pending. `kernels`: the module whose `scatter` does it."""
        if self._offsets:
            kernels.scatter(self.words, staged(self.waiting().ravel(), self.device))
            self.forget()
