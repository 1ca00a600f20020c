"""How parameters are cut over tensor-parallel ranks: pure arithmetic, and the layer base class that knows its cuts."""

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
        part: which part of a fused parameter the tensor fills; "" where nothing is fused.
        shape: of the whole tensor in the checkpoint.
        dim: the dimension that is cut, and along which parts are joined.
        start, length: this rank's share along `dim`. offset: where it begins in the parameter along `dim`.
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
    """What a parameter is made of, for every rank.

    Attributes:
        shape: of the whole parameter, all parts joined.
        dim: the dimension that is cut, and along which parts are joined.
        split: "whole": every rank holds all of it. "even": in `unit`s, as many on each rank. "padded": in equal
            pieces, the last ones filled up (vocabularies).
        parts: (name, size along `dim`) of what is fused; each is cut by itself. () for a plain parameter.
        unit: what is never cut apart (the head size).
        replicate: a part with fewer units than ranks stands on several ranks (KV heads).
        init: what dummy weights put there.
    """

    shape: tuple[int, ...]
    dim: int = 0
    split: Split = "whole"
    parts: tuple[tuple[str, int], ...] = ()
    unit: int = 1
    replicate: bool = False
    init: Init = "random"

    def shards(self, rank: int, size: int) -> tuple[Shard, ...]:
        """One shard a part, in order. Raises `ModelError` with the numbers where units do not divide over ranks."""
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
    """(start, length) of a rank's share of `total` elements, cut only between units of `unit` elements.

    With `replicate`, fewer units than ranks put each unit on size / units neighbouring ranks. Raises `ModelError`.
    """
    units, rest = divmod(total, unit)
    if rest:
        raise ModelError(f"{total} is no multiple of the head size {unit}")
    if units % size == 0:
        return rank * total // size, total // size
    if replicate and units < size and size % units == 0:
        return rank * units // size * unit, unit
    what = f"{units} heads of size {unit}" if unit > 1 else f"a width of {total}"
    raise ModelError(f"{what} cannot be divided over tensor_parallel_size={size} ranks")


def heads_per_rank(heads: int, size: int, *, replicate: bool = False) -> int:
    """Attention heads on each rank; KV heads fewer than ranks are replicated. Raises `ModelError`."""
    try:
        return even_share(heads, 1, 0, size, replicate=replicate)[1]
    except ModelError as error:
        kind = "KV" if replicate else "attention"
        raise ModelError(f"{heads} {kind} heads cannot be divided over tensor_parallel_size={size} ranks") from error


class Placement(Protocol):
    """Which rank's share of a layer is made, of what dtype, where. A `BuildContext` is one."""

    tp: TensorParallelGroup
    dtype: torch.dtype
    device: torch.device
    ops: Ops


class WeightLayer(nn.Module):
    """A layer that knows how its parameters are cut. The loader and the dummy weights go by `specs`."""

    def __init__(self, place: Placement) -> None:
        super().__init__()
        self.tp, self.ops = place.tp, place.ops
        self._dtype, self._device = place.dtype, place.device
        self.specs: dict[str, ShardSpec] = {}

    def add_weight(self, name: str, spec: ShardSpec, dtype: torch.dtype | None = None) -> None:
        """Register this rank's share of a parameter. Padding is zero; the rest is filled by the loader."""
        shape = spec.local_shape(self.tp.rank, self.tp.size)
        make = torch.zeros if spec.split == "padded" else torch.empty
        values = make(shape, dtype=dtype or self._dtype, device=self._device)
        self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        self.specs[name] = spec

    def load_shard(self, name: str, shard: Shard, values: Tensor) -> None:
        """Take one part of a parameter: `values` is the checkpoint tensor's `shard.source`, of any float dtype."""
        self.get_parameter(name).data[shard.target].copy_(values)


def weight_layers(model: nn.Module) -> Iterator[tuple[str, WeightLayer, str, ShardSpec]]:
    """(full name, layer, parameter's name in it, spec) of every parameter, one that layers share only once.

    A parameter that stands outside any `WeightLayer` (a plugin's plain `nn.Linear`) is whole on every rank.
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
    """The parts, checked to add up to `total`. Raises `ModelError` naming the layer."""
    if parts and sum(size for _, size in parts) != total:
        raise ModelError(f"{where}: parts {list(parts)} do not add up to {total} outputs")
    return tuple(parts)
