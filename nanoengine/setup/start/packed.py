"""Tensors that a quantised checkpoint holds in pieces, and that become plain ones while they are loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanoengine.setup.start.weight_slices import TensorSlice

Join = Callable[[Sequence[Tensor]], Tensor]


class PackedTensor(ABC):
    """A `TensorSlice` whose values are computed from pieces, on the device that the pieces are copied to.

    stored: bytes of all of its pieces in the files.
    """

    stored: int

    @abstractmethod
    def get_shape(self) -> Sequence[int]: ...

    @abstractmethod
    def get_dtype(self) -> str: ...

    @abstractmethod
    def read(self, index: Any) -> tuple[list[Tensor], Join]:
        """The pieces that the values at `index` need, and what makes the values of them."""

    def __getitem__(self, index: Any, /) -> Tensor:
        pieces, join = self.read(index)
        return join(pieces)


class PackedFormat(ABC):
    """A format of quantised weights that are dequantised while loading.

    Attributes:
        method: `quant_method` of config.json.
        options: the other keys that `quantization_config` may have.
    """

    method: str
    options: frozenset[str]

    def reading(self, config: Mapping[str, Any]) -> PackedFormat:
        """The format as this `quantization_config` has it."""
        return self

    @abstractmethod
    def unpacked(self, tensors: Iterable[tuple[str, TensorSlice]]) -> Iterator[tuple[str, TensorSlice]]:
        """The same tensors, with a `PackedTensor` in place of each that is quantised."""


@dataclass(frozen=True, slots=True)
class InPieces(PackedFormat):
    """A format that has several tensors of the checkpoint for one; its options do not change the values.

    Attributes:
        pieces: endings of the names of a tensor's pieces.
        make: (name without ending, pieces in the order of `pieces`) -> the tensor. Raises `WeightsError`.
    """

    method: str
    options: frozenset[str]
    pieces: tuple[str, ...]
    make: Callable[[str, Sequence[Tensor]], PackedTensor]

    def unpacked(self, tensors: Iterable[tuple[str, TensorSlice]]) -> Iterator[tuple[str, TensorSlice]]:
        """One in place of its pieces, which may be anywhere. Others, and a piece that lacks
        another one, stay as they are."""
        waiting = dict[str, dict[str, TensorSlice]]()
        for name, tensor in tensors:
            ending = next((each for each in self.pieces if name.endswith(each)), "")
            whole = name.removesuffix(ending)
            if not ending or ending in waiting.get(whole, ()):
                yield name, tensor
                continue
            waiting.setdefault(whole, {})[ending] = tensor
            if len(waiting[whole]) == len(self.pieces):
                found = waiting.pop(whole)
                yield whole, self.make(whole, [found[each][...] for each in self.pieces])
        for whole, found in waiting.items():
            yield from ((f"{whole}{ending}", tensor) for ending, tensor in found.items())
