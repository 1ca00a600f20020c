"""Loads the weights of a model from safetensors or any other tensors, each rank its own slices."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.api.errors import WeightsError
from nanoengine.api.layers import WeightLayer
from nanoengine.api.model import Model, ModelConfig
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.sharding import FLOAT_DTYPES, Shard, ShardSpec
from nanoengine.layers.sharding import finish_layers, weight_layers
from nanoengine.setup.start.checkpoint import INDEX_FILE, find_checkpoint, some
from nanoengine.setup.start.clock import Dequantised
from nanoengine.setup.start.dummy_weights import dummy_weights
from nanoengine.setup.start.packed import PackedFormat, PackedTensor
from nanoengine.setup.start.upload import Uploads
from nanoengine.setup.start.weight_advice import advice
from nanoengine.setup.start.weight_rules import NUMBER, Resolved, Rules, checkpoint_name, shown_rule
from nanoengine.setup.start.weight_slices import TensorSlice, WholeTensor, misfit, only_names, reading, wanted_shape

__all__ = ["FLOAT_DTYPES", "LoadReport", "NamedTensors", "checkpoint_name", "dummy_weights", "load_weights"]

_log = logging.getLogger(__name__)

_PART = ":"  # between the name of a parameter and the part that it is
_COMPARED = 1 << 22  # elements of two tensors that are compared at a time

NamedTensors = Iterable[tuple[str, Tensor | TensorSlice]]
_Put = Callable[[Tensor, Callable[[Tensor], None]], None]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded: checkpoint tensors used and skipped, bytes read on this rank, seconds.

    `untied`: parameters that the config ties to others and the checkpoint holds with values of their own.
    `dequantised`: the tensors that were packed, of all ranks together.
    """

    num_tensors: int
    skipped: tuple[str, ...]
    num_bytes: int
    seconds: float
    untied: tuple[str, ...] = ()
    dequantised: Dequantised | None = None


@dataclass(slots=True)
class _Problems:
    """The problems of a checkpoint, reported together."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    misruled: list[str] = field(default_factory=list)

    def raise_if_any(self, where: Path | None, tp: TensorParallelGroup, stale: tuple[str, ...], help_: str) -> None:
        """`stale`: tensors in the index that are in no file. `help_`: the rules that may be missing."""
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "misshapen": self.misshapen,
            "sent nowhere by the WeightMap": self.misruled,
        }
        found = [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names]
        if not found:
            return
        if self.missing and stale:
            found.append(f"{INDEX_FILE} names {len(stale)} that are in no file: it belongs to other files")
        if help_:
            found.append(help_)
        rank = f" (rank {tp.rank} of {tp.size})" if tp.size > 1 else ""
        which = "the given weights" if where is None else f"the weights in {where}"
        raise WeightsError(f"{which} do not fit the model{rank}: " + "; ".join(found))


def load_weights(
    model: Model,
    config: ModelConfig,
    source: str | Path | NamedTensors,
    tp: TensorParallelGroup,
    packed: PackedFormat | None = None,
    skip: tuple[str, ...] = (),
) -> LoadReport:
    """Fills every parameter, then calls `finish` of every layer.

    Args:
        source: named tensors in any order; or the folder of a checkpoint: model.safetensors, or the files in its index.
        packed: the format of tensors that are dequantised on the way; None: all are plain.
        skip: name suffixes to skip, in addition to those of the map.

    For a GPU, the slices of a rank are copied through pinned buffers and converted to the parameter's dtype there.

    Raises `WeightsError` if a file is missing or damaged, or if tensors are missing, unexpected, of a wrong shape or
    not of a float dtype; the error names them all, and the rules that the model's `WeightMap` may lack.
    """
    began, stale, where = time.perf_counter(), tuple[str, ...](), None
    if isinstance(source, str | Path):
        checkpoint = find_checkpoint(Path(source))
        source, stale, where = checkpoint.slices(), checkpoint.stale, checkpoint.path
    weights = model.weight_map(config)
    loading = _Loading(model, Rules(replace(weights, skip=(*weights.skip, *skip)) if skip else weights), tp)
    slices = ((name, WholeTensor(each) if isinstance(each, Tensor) else each) for name, each in source)
    with _way_to(next(model.parameters()).device) as loading.put:
        for name, tensor in slices if packed is None else packed.unpacked(slices):
            loading.take(name, tensor)
        untied = loading.settle_ties()
    loading.check(where, stale)
    finish_layers(model)
    if untied and tp.rank == 0:
        held = "what was given" if where is None else where
        _log.warning("the config ties %s, but %s has values of its own for it, which are used", some(untied), held)
    return LoadReport(
        len(loading.used),
        tuple(loading.skipped),
        loading.num_bytes,
        time.perf_counter() - began,
        tuple(sorted(untied)),
        Dequantised.of(packed.method, loading.unpacked) if packed is not None and loading.unpacked else None,
    )


@dataclass(slots=True)
class _Parameter:
    """A parameter of this rank, and what was filled: part -> indices in the stack; None is the whole part."""

    layer: WeightLayer
    name: str
    spec: ShardSpec
    shards: Mapping[str, Shard]
    filled: dict[str, set[int | None]] = field(default_factory=dict)

    def open(self) -> Iterator[tuple[str, int | None]]:
        """(part, index) of what is still missing."""
        for part in self.shards:
            got = self.filled.get(part, set())
            if not got and not self.spec.optional:
                yield part, None
            elif got and None not in got:
                yield from ((part, index) for index in range(self.spec.shape[0]) if index not in got)


class _Loading:
    """Fills one model from one stream of tensors."""

    def __init__(self, model: Model, rules: Rules, tp: TensorParallelGroup) -> None:
        self.rules, self._tp, self.problems = rules, tp, _Problems()
        self.put: _Put = _at_once
        self.skipped, self.used, self.num_bytes = list[str](), set[str](), 0
        self.unpacked = list[tuple[int, int]]()  # of each packed tensor the bytes in files, and in the model's dtype
        self._lost = list[tuple[str, tuple[int, ...]]]()  # unexpected: name behind `rename`, shape
        self._by_name = {name: (layer, own) for name, layer, own, _ in weight_layers(model, shared=True)}
        self._parameters = {
            name: self._parameter(layer, own) for name, layer, own, spec in weight_layers(model) if not spec.made
        }
        self._of_parts = defaultdict[str, list[str]](list)  # name -> parts that are parameters of their own
        for name, _, part in (name.partition(_PART) for name in self._parameters if _PART in name):
            self._of_parts[name].append(part)
        ties = rules.weights.ties
        self._held = dict[str, tuple[str, TensorSlice, Resolved]]()  # of parameters that may be tied: until all came
        self._may_tie = {*ties, *ties.values()}
        self._names = dict[str, str]()  # name behind `rename` -> in the checkpoint

    def _parameter(self, layer: WeightLayer, name: str) -> _Parameter:
        spec = layer.specs[name]
        return _Parameter(layer, name, spec, {shard.part: shard for shard in self._shards(spec)})

    def _shards(self, spec: ShardSpec) -> tuple[Shard, ...]:
        return spec.shards(self._tp.rank, self._tp.size)

    def take(self, name: str, tensor: TensorSlice) -> None:
        """Loads one tensor, or keeps it for `settle_ties`."""
        if self.rules.skips(name):
            self.skipped.append(name)
            return
        renamed = self.rules.renamed(name)
        if (other := self._names.setdefault(renamed, name)) != name:
            self.problems.unexpected.append(f"{name} in addition to {other} (both are {renamed})")
            return
        found = self.rules.resolve(name)
        if found.parameter in self._may_tie:
            whole: TensorSlice = tensor if isinstance(tensor, WholeTensor | PackedTensor) else _held(tensor)
            if (other := self._held.setdefault(found.parameter, (name, whole, found))[0]) != name:
                self.problems.unexpected.append(f"{name} in addition to {other} (both are {found.parameter})")
        else:
            self._fill(name, tensor, found)

    def settle_ties(self) -> list[str]:
        """Fills the parameters that the map ties, and returns those that are not tied in this checkpoint.

        As in transformers: if it has both tensors and they differ, they are not tied, and a parameter that was shared
        gets its own memory. If it has only the tied one, the other is read from that.
        """
        held, untied, use, same = self._held, list[str](), dict[str, str](), set[str]()
        for tied, source in self.rules.weights.ties.items():
            if tied in held and source in held and not _equal(held[tied][1], held[source][1]):
                untied.append(tied)
                self._give_own_parameter(tied)
            elif source in held:
                use[tied] = source
                same |= {tied} & held.keys()
            elif tied in held:
                use[source] = tied
        for parameter in sorted(self._may_tie):
            name, tensor, found = held.get(use.get(parameter, parameter), (None, None, None))
            if name is not None and tensor is not None and found is not None and parameter in self._parameters:
                self._fill(name, tensor, Resolved(parameter, found.index, found.rule, found.pattern))
        self.skipped += [held[name][0] for name in same]
        wanted = {use.get(parameter, parameter) for parameter in self._parameters.keys() & self._may_tie}
        for parameter in held.keys() - wanted - same:
            self._unexpected(held[parameter][0], held[parameter][1])
        return untied

    def _give_own_parameter(self, name: str) -> None:
        """Gives a parameter that shares memory with another one its own memory, filled with zeros."""
        if name in self._parameters or name not in self._by_name:
            return
        layer, own = self._by_name[name]
        layer.register_parameter(own, nn.Parameter(torch.zeros_like(layer.get_parameter(own)), requires_grad=False))
        self._parameters[name] = self._parameter(layer, own)

    def _fill(self, name: str, tensor: TensorSlice, found: Resolved) -> None:
        """Loads this rank's slices of a tensor into the parameter that it belongs to."""
        if found.parameter not in self._parameters and found.parameter in self._of_parts:
            whole = replace(found.rule, parts=())
            for part in found.parts or self._of_parts[found.parameter]:
                self._fill(name, tensor, replace(found, parameter=f"{found.parameter}{_PART}{part}", rule=whole))
            return
        target = self._parameters.get(found.parameter)
        if target is None:
            self._unexpected(name, tensor)
            return
        spec, stacked = target.spec, found.index is not None
        sizes = dict(spec.parts)
        wrong = self._misruled(found, target)
        if wrong:
            self.problems.misruled.append(f"{name} by the rule {shown_rule(found.pattern, found.rule)}: {wrong}")
            for part in (found.parts or sizes or ("",)) if _is_quantised(target) else ():
                target.filled.setdefault(part, set()).add(found.index)  # it is there
            return
        parts = [(part, sizes[part]) for part in found.parts or sizes]
        shape, wanted = list(tensor.get_shape()), wanted_shape(spec, parts, found.rule, stacked=stacked)
        if not shape and wanted == [1]:
            shape, tensor = wanted, WholeTensor(tensor[...].reshape(1))
        self.used.add(name)
        for part in [part for part, _ in parts] or [""]:
            got = target.filled.setdefault(part, set())
            if found.index in got or (got and None in {*got, found.index}):
                self.problems.unexpected.append(f"{name}, the second to fill {_shown(found.parameter, part)}")
                return
            got.add(found.index)
        if shape != wanted:
            turned = "" if shape != _turned(wanted) else f" (transpose={not found.rule.transpose} would fit)"
            self.problems.misshapen.append(f"{name} {shape}, expected {wanted}{turned}")
        elif tensor.get_dtype() not in spec.dtypes:
            dtypes = ", ".join(spec.dtypes)
            self.problems.misshapen.append(f"{name} of dtype {tensor.get_dtype()}, expected one of {dtypes}")
        else:
            if isinstance(tensor, PackedTensor):
                made = math.prod(shape) * target.layer.get_parameter(target.name).element_size()
                self.unpacked.append((tensor.stored, made))
            self._send(tensor, target, parts, found)

    def _misruled(self, found: Resolved, target: _Parameter) -> str:
        """The reason why a rule does not fit its parameter, or ""."""
        spec, known = target.spec, [part for part, _ in target.spec.parts]
        if unknown := [part for part in found.parts if part not in known]:
            has = f"has the parts {', '.join(known)}" if known else "has no parts"
            return f"{found.parameter} {has}, not {', '.join(unknown)}"
        if found.index is not None and (len(spec.shape) < 2 or found.index >= spec.shape[0]):
            return f"{found.parameter} {list(spec.shape)} has no index {found.index}"
        if _is_quantised(target) and not only_names(found.rule):
            return f"it changes values or their order, and {target.layer.name} is quantised: that is not supported"
        return misfit(spec, [each for each in spec.parts if each[0] in (found.parts or known)], found.rule)

    def _send(self, tensor: TensorSlice, target: _Parameter, parts: list[tuple[str, int]], found: Resolved) -> None:
        """Copies this rank's slices. If several parts need the same slice, it is read once."""
        takers = defaultdict[tuple[tuple[int, int], ...], list[Callable[[Tensor], None]]](list)
        for part in [part for part, _ in parts] or [""]:
            shard = target.shards[part] if found.index is None else target.shards[part].at(found.index)
            if shard.size:
                read = reading(target.spec, shard, parts, found.rule, stacked=found.index is not None)
                load = partial(target.layer.load_shard, target.name, shard)
                takers[tuple((each.start, each.stop) for each in read.index)].append(_then(read.then, load))
        for index, takes in takers.items():
            whole = all(at == (0, size) for at, size in zip(index, tensor.get_shape(), strict=True))
            self._put(tensor, ... if whole else tuple(slice(*each) for each in index), takes)

    def _put(self, tensor: TensorSlice, index: Any, takes: Sequence[Callable[[Tensor], None]]) -> None:
        """Copies what is at `index` and gives it to `takes`. Pieces are copied one by one, and joined on the device."""
        pieces, join = tensor.read(index) if isinstance(tensor, PackedTensor) else ([tensor[index]], None)
        self.num_bytes += sum(each.nbytes for each in pieces)
        copied = list[Tensor]()

        def last(values: Tensor) -> None:
            _all(takes, values if join is None else join([*copied, values]))

        for each in pieces:
            (self.put if each.device.type == "cpu" else _at_once)(each, last if each is pieces[-1] else copied.append)

    def _unexpected(self, name: str, tensor: TensorSlice) -> None:
        self.problems.unexpected.append(name)
        self._lost.append((self.rules.renamed(name), tuple(tensor.get_shape())))

    def check(self, where: Path | None, stale: tuple[str, ...]) -> None:
        """Raises `WeightsError` that names everything that is wrong."""
        open_ = [
            (name, part, index, target) for name, target in self._parameters.items() for part, index in target.open()
        ]
        for name, part, index, target in open_:
            name, _, own = name.partition(_PART)
            source = self.rules.sources(name, part or own)[0]
            source = source if index is None else source.replace(NUMBER, str(index))
            if source not in self.problems.missing[-len(target.shards) :]:
                self.problems.missing.append(source)
        asked = ((name.partition(_PART), part, target.spec) for name, part, _, target in open_)
        help_ = advice([(name, part or own, spec) for (name, _, own), part, spec in asked], self._lost)
        self.problems.raise_if_any(where, self._tp, stale, help_)


def _is_quantised(target: _Parameter) -> bool:
    """Whether a parameter is codes, or scales and the like that a method keeps beside them."""
    label, own = getattr(getattr(target.layer, "method", None), "label", ""), target.name.partition(_PART)[0]
    return target.spec.dtypes != FLOAT_DTYPES or (bool(label) and own not in ("weight", "bias"))


def _turned(shape: list[int]) -> list[int]:
    """The shape of the transposed tensor."""
    return [*shape[:-2], *reversed(shape[-2:])]


def _shown(parameter: str, part: str) -> str:
    return f"part {part} of {parameter}" if part else parameter


def _held(tensor: TensorSlice) -> TensorSlice:
    """The mapped values of a slice: they can be read after the file is closed."""
    return WholeTensor(tensor[...])


def _equal(a: TensorSlice, b: TensorSlice) -> bool:
    """Whether two tensors have the same shape and values."""
    shape = tuple(a.get_shape())
    if not shape or shape != tuple(b.get_shape()) or not {a.get_dtype(), b.get_dtype()} <= set(FLOAT_DTYPES):
        return False
    step = max(1, _COMPARED // max(1, math.prod(shape[1:])))  # rows
    pairs = ((a[i : i + step], b[i : i + step]) for i in range(0, shape[0], step))
    return all(torch.equal(x, y) if x.dtype == y.dtype else torch.equal(x.double(), y.double()) for x, y in pairs)


def _all(takes: Sequence[Callable[[Tensor], None]], values: Tensor) -> None:
    for take in takes:
        take(values)


def _then(first: Callable[[Tensor], Tensor], then: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    return lambda values: then(first(values))


def _at_once(values: Tensor, take: Callable[[Tensor], None]) -> None:
    take(values)


@contextmanager
def _way_to(device: torch.device) -> Iterator[_Put]:
    """A context with the function that copies values: from the mapped file, for a GPU through pinned buffers."""
    if device.type == "cpu":
        yield _at_once
        return
    with Uploads(device) as uploads:
        yield uploads.put
