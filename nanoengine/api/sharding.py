"""How a parameter is split over tensor-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nanoengine.api.errors import ModelError
from nanoengine.api.parallel import padded_length

Split = Literal["whole", "even", "padded"]
Init = Literal["random", "ones", "zeros"]
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""The names that safetensors has for dtypes of plain weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's share of one part of a parameter, and its place in the rank's own parameter.

    Attributes:
        part: the part of a fused parameter; "" if nothing is fused.
        shape: shape of the whole part, with the shares of all ranks.
        source: index of the rank's share in the whole part: a slice with start and stop for each dimension.
        target: index of the same values in the rank's parameter.
    """

    part: str
    shape: tuple[int, ...]
    source: tuple[slice, ...]
    target: tuple[slice, ...]

    @property
    def whole(self) -> bool:
        """Whether the rank has all of the part."""
        return self.size == math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of elements that the rank has."""
        return math.prod(each.stop - each.start for each in self.source)

    def at(self, index: int) -> Shard:
        """The share of element `index` of the first dimension (one expert of a stack), of shape [1, ...].

        It is empty if another rank has the element.
        """
        first, place = self.source[0], self.target[0]
        held = int(first.start <= index < first.stop)
        at = place.start + index - first.start if held else place.start
        return replace(
            self,
            shape=(1, *self.shape[1:]),
            source=(slice(0, held), *self.source[1:]),
            target=(slice(at, at + held), *self.target[1:]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """How a parameter is split over the ranks.

    Attributes:
        shape: shape of the whole parameter, with all parts joined.
        dim: the dimension that is split over the ranks.
        split: "whole": every rank has all of it. "even": each rank has the same number of units. "padded": equal
            lengths, the last ones padded (vocabularies).
        parts: (name, size along `join`) of each fused part. () for a plain parameter.
        join: the dimension along which parts are joined. None: `dim`; then each part is split separately.
        unit: number of elements along `dim` that stay together (the head size).
        replicate: a part with fewer units than ranks is on several ranks (KV heads).
        init: how dummy weights are made.
        made: the checkpoint has no tensor for it; its `LinearMethod` fills it, in `load` or `finish`.
        optional: the checkpoint may have no tensor for it; then it keeps what its `LinearMethod` put there.
        dtypes: those that the checkpoint's tensor may have, by the names of safetensors, e.g. ("I32",).
    """

    shape: tuple[int, ...]
    dim: int = 0
    split: Split = "whole"
    parts: tuple[tuple[str, int], ...] = ()
    join: int | None = None
    unit: int = 1
    replicate: bool = False
    init: Init = "random"
    made: bool = False
    optional: bool = False
    dtypes: tuple[str, ...] = FLOAT_DTYPES

    def shards(self, rank: int, size: int) -> tuple[Shard, ...]:
        """One shard per part, in order. Raises `ModelError` if the units cannot be divided over the ranks."""
        out, offset, join = [], 0, self.joined
        for part, total in self.parts or (("", self.shape[join]),):
            shape = (*self.shape[:join], total, *self.shape[join + 1 :])
            start, length = self._share(shape[self.dim], rank, size)
            source = [slice(0, each) for each in shape]
            source[self.dim] = slice(start, start + length)
            target = [slice(0, each.stop - each.start) for each in source]
            target[join] = slice(offset, offset + target[join].stop)
            offset = target[join].stop
            out.append(Shard(part=part, shape=shape, source=tuple(source), target=tuple(target)))
        return tuple(out)

    @property
    def joined(self) -> int:
        """The dimension along which parts are joined."""
        return self.dim if self.join is None else self.join

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of one rank's parameter."""
        shape = [each.stop for each in self.shards(rank, size)[-1].target]
        if self.split == "padded":
            shape[self.dim] = padded_length(self.shape[self.dim], size)
        return tuple(shape)

    def _share(self, total: int, rank: int, size: int) -> tuple[int, int]:
        if self.split == "whole":
            return 0, total
        if self.split == "padded":
            length = padded_length(total, size)
            start = min(rank * length, total)
            return start, min(length, total - start)
        return even_share(total, self.unit, rank, size, replicate=self.replicate)


def even_share(total: int, unit: int, rank: int, size: int, *, replicate: bool) -> tuple[int, int]:
    """(start, length) of a rank's share of `total` elements, split only between units of `unit` elements.

    With `replicate`, if there are fewer units than ranks, each unit is on size / units consecutive ranks. Raises
    `ModelError`.
    """
    units, rest = divmod(total, unit)
    if rest:
        raise ModelError(f"{total} is not a multiple of the head size {unit}")
    if units % size == 0:
        return rank * total // size, total // size
    if replicate and units < size and size % units == 0:
        return rank * units // size * unit, unit
    what = f"{units} heads of size {unit}" if unit > 1 else f"a width of {total}"
    raise ModelError(f"{what} cannot be divided over tensor_parallel_size={size} ranks")


def part_sizes(parts: Sequence[tuple[str, int]], total: int, where: str) -> tuple[tuple[str, int], ...]:
    """Returns the parts if their names differ and their sizes add up to `total`.

    Raises `ModelError` that names the layer.
    """
    if parts and sum(size for _, size in parts) != total:
        raise ModelError(f"{where}: parts {list(parts)} do not add up to {total} outputs")
    if len({name for name, _ in parts}) != len(parts) or any(not name for name, _ in parts):
        raise ModelError(f"{where}: each part needs a name of its own, not {[name for name, _ in parts]}")
    return tuple(parts)
