"""Device tables that the host writes to in small pieces: all writes of a step are one upload and one kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Key = str | tuple[str, str]  # of a table: its name, or (processor, column)
Shapes = dict[Key, tuple[tuple[int, ...], torch.dtype]]

ALIGNMENT = 4  # words; kernels read pointers that are multiples of 16 bytes faster


class TableBuffer:
    """Tables of 4- and 8-byte elements in one int32 tensor, and the pending writes to them.

    So all that the host writes in a step is one upload and one kernel. Writes take effect in their order; those of a
    launch that raised before they did are sent with the next one's.

    Attributes:
        words: int32 [N], all tables. tables: zeroed views of it. first: the first word of each table.
        pending: (int64 [K], int32 [K]) of each write: words and their values.
    """

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        """Raises `OverflowError` for more words than an int32 can count."""
        self.first: dict[Key, int] = {}
        size = 0
        for key, (shape, dtype) in shapes.items():
            assert dtype.itemsize in (4, 8), dtype
            self.first[key] = size = -(-size // ALIGNMENT) * ALIGNMENT
            size += math.prod(shape) * dtype.itemsize // 4
        if size >= 1 << 31:
            raise OverflowError(f"{size} words are more than an int32 can count")
        self.words = torch.zeros(size, dtype=torch.int32, device=device)
        self.tables = {key: self._view(key, shape, dtype) for key, (shape, dtype) in shapes.items()}
        self._dtypes = {key: np.dtype(str(dtype).removeprefix("torch.")) for key, (_, dtype) in shapes.items()}
        self._overlap = False
        self.pending: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]] = []

    def _view(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape) * dtype.itemsize // 4
        return self.words[self.first[key] :][:count].view(dtype).view(shape)

    def write(self, key: Key, index: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> None:
        """table.flatten()[index] = values, converted to the table's dtype."""
        self.write_each((key,), index, (values,))

    def write_each(self, keys: Sequence[Key], index: npt.NDArray[np.int64], values: Sequence[npt.NDArray[Any]]) -> None:
        """The same for several tables of one dtype, at the same places: values of each of them."""
        given = np.array(values, dtype=self._dtypes[keys[0]])
        if given.itemsize == 8:
            index = (2 * index[:, None] + np.arange(2)).ravel()
        words = np.array([self.first[key] for key in keys])[:, None] + index
        self.pending.append((words.ravel(), given.view(np.int32).ravel()))

    def will_overlap(self) -> None:
        """Pending writes, and those up to the next `clear_pending`, may go to the same places: the last one counts."""
        self._overlap = True

    def pending_writes(self) -> npt.NDArray[np.int32]:
        """[2, K]: words to be written, each once, and their values."""
        if not self.pending:
            return np.zeros((2, 0), dtype=np.int32)
        words, values = (np.concatenate(parts) for parts in zip(*self.pending, strict=True))
        if self._overlap:
            words, last = np.unique(words[::-1], return_index=True)
            values = values[::-1][last]
        out = np.empty((2, len(words)), dtype=np.int32)
        out[0], out[1] = words, values
        return out

    def clear_pending(self) -> None:
        """The pending writes have taken effect, or will before whatever is launched from here on."""
        self.pending, self._overlap = [], False
