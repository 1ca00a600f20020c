"""How parameters are split over tensor-parallel ranks, and the base class of layers whose parameters are split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from nanoengine.api import ModelError, TensorParallelGroup
from nanoengine.api.parallel import padded_length
from nanoengine.kernels.ops import Ops

Split = Literal["whole", "even", "padded"]
Init = Literal["random", "ones", "zeros"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's share of one checkpoint tensor, and its place in the rank's parameter.

    Attributes:
        part: the part of a fused parameter that the tensor fills; "" if nothing is fused.
        shape: shape of the whole tensor in the checkpoint.
        dim: the dimension that is split, and along which parts are joined.
        start, length: this rank's share along `dim`. offset: its start in the parameter along `dim`.
    """

    part: str
    shape: tuple[int, ...]
    dim: int
    start: int
    length: int
    offset: int

    @property
    def source(self) -> tuple[slice, ...]:
        """Index into the checkpoint's tensor."""
        return self._index(self.start)

    @property
    def target(self) -> tuple[slice, ...]:
        """Index into this rank's parameter."""
        return self._index(self.offset)

    @property
    def whole(self) -> bool:
        return self.length == self.shape[self.dim]

    def _index(self, start: int) -> tuple[slice, ...]:
        return tuple(
            slice(start, start + self.length) if d == self.dim else slice(None) for d in range(len(self.shape))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """How a parameter is split over the ranks.

    Attributes:
        shape: shape of the whole parameter, with all parts joined.
        dim: the dimension that is split, and along which parts are joined.
        split: "whole": every rank has all of it. "even": each rank has the same number of units. "padded": equal
            lengths, the last ones padded (vocabularies).
        parts: (name, size along `dim`) of each fused part; each is split separately. () for a plain parameter.
        unit: number of elements along `dim` that stay together (the head size).
        replicate: a part with fewer units than ranks is on several ranks (KV heads).
        init: how dummy weights are made.
    """

    shape: tuple[int, ...]
    dim: int = 0
    split: Split = "whole"
    parts: tuple[tuple[str, int], ...] = ()
    unit: int = 1
    replicate: bool = False
    init: Init = "random"

    def shards(self, rank: int, size: int) -> tuple[Shard, ...]:
        """One shard per part, in order. Raises `ModelError` if the units cannot be divided over the ranks."""
        out, offset = [], 0
        for part, total in self.parts or (("", self.shape[self.dim]),):
            start, length = self._share(total, rank, size)
            shape = (*self.shape[: self.dim], total, *self.shape[self.dim + 1 :])
            out.append(Shard(part=part, shape=shape, dim=self.dim, start=start, length=length, offset=offset))
            offset += length
        return tuple(out)

    def local_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of one rank's parameter."""
        if self.split == "padded":
            length = padded_length(self.shape[self.dim], size)
        else:
            length = sum(shard.length for shard in self.shards(rank, size))
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

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


def heads_per_rank(heads: int, size: int, *, replicate: bool = False) -> int:
    """Number of heads on each rank. With `replicate`, fewer heads than ranks are replicated. Raises `ModelError`."""
    try:
        return even_share(heads, 1, 0, size, replicate=replicate)[1]
    except ModelError as error:
        kind = "KV" if replicate else "attention"
        raise ModelError(f"{heads} {kind} heads cannot be divided over tensor_parallel_size={size} ranks") from error


class Placement(Protocol):
    """The rank, dtype and device for which a layer is made. A `BuildContext` is one."""

    tp: TensorParallelGroup
    dtype: torch.dtype
    device: torch.device
    ops: Ops


class WeightLayer(nn.Module):
    """A layer that knows how its parameters are split. The weight loader and dummy weights use `specs`."""

    def __init__(self, place: Placement) -> None:
        super().__init__()
        self.tp, self.ops = place.tp, place.ops
        self._dtype, self._device = place.dtype, place.device
        self.specs: dict[str, ShardSpec] = {}

    def add_weight(self, name: str, spec: ShardSpec, dtype: torch.dtype | None = None) -> None:
        """Register this rank's share of a parameter. Padding is zero; the loader fills the rest."""
        shape = spec.local_shape(self.tp.rank, self.tp.size)
        make = torch.zeros if spec.split == "padded" else torch.empty
        values = make(shape, dtype=dtype or self._dtype, device=self._device)
        self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        self.specs[name] = spec

    def load_shard(self, name: str, shard: Shard, values: Tensor) -> None:
        """Load one part of a parameter. `values`: the checkpoint tensor's `shard.source`, of any float dtype."""
        self.get_parameter(name).data[shard.target].copy_(values)


def weight_layers(model: nn.Module) -> Iterator[tuple[str, WeightLayer, str, ShardSpec]]:
    """(full name, layer, parameter's name in the layer, spec) of every parameter. A shared parameter is given once.

    A parameter that is not in a `WeightLayer` (a plugin's plain `nn.Linear`) is whole on every rank.
    """
    for name, parameter in model.named_parameters():
        prefix, _, last = name.rpartition(".")
        owner = model.get_submodule(prefix)
        if not isinstance(owner, WeightLayer):
            owner = _PlainWeights(last, parameter)
        yield name, owner, last, owner.specs[last]


class _PlainWeights(WeightLayer):
    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.register_parameter(name, parameter)
        self.specs = {name: ShardSpec(shape=tuple(parameter.shape))}


def part_sizes(parts: Sequence[tuple[str, int]], total: int, where: str) -> tuple[tuple[str, int], ...]:
    """Returns the parts if their sizes add up to `total`. Raises `ModelError` that names the layer."""
    if parts and sum(size for _, size in parts) != total:
        raise ModelError(f"{where}: parts {list(parts)} do not add up to {total} outputs")
    return tuple(parts)
