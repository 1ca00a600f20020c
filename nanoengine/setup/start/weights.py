"""Loads the weights of a model from safetensors, each rank its own slices; or makes dummy weights."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoengine.api.errors import WeightsError
from nanoengine.api.model import Model, ModelConfig, WeightMap
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.layers.sharding import Shard, WeightLayer, weight_layers
from nanoengine.setup.start.checkpoint import INDEX_FILE, Checkpoint, find_checkpoint, some
from nanoengine.setup.start.upload import Uploads

_log = logging.getLogger(__name__)

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_COMPARED = 1 << 22  # elements of two tensors that are compared at a time

_Put = Callable[[Tensor, Callable[[Tensor], None]], None]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded: numbers of used and skipped tensors, bytes read on this rank, seconds.

    `untied`: parameters that the config ties to others, but that have other values in the checkpoint.
    """

    num_tensors: int
    skipped: tuple[str, ...]
    num_bytes: int
    seconds: float
    untied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Target:
    """What a checkpoint tensor fills: `shard` of `parameter` in `layer`."""

    layer: WeightLayer
    parameter: str
    shard: Shard


@dataclass(slots=True)
class _Problems:
    """The problems of a checkpoint, reported together. `stale`: tensors in the index that are in no file."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    stale: tuple[str, ...] = ()

    def raise_if_any(self, path: Path, tp: TensorParallelGroup) -> None:
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", self.misshapen))
        found = [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds if names]
        if not found:
            return
        if self.missing and self.stale:
            found.append(f"{INDEX_FILE} names {len(self.stale)} that are in no file: it belongs to other files")
        rank = f" (rank {tp.rank} of {tp.size})" if tp.size > 1 else ""
        raise WeightsError(f"the weights in {path} do not fit the model{rank}: " + "; ".join(found))


def load_weights(model: Model, config: ModelConfig, path: str | Path, tp: TensorParallelGroup) -> LoadReport:
    """Fills every parameter from model.safetensors in `path`, or from the files in its index.

    For a GPU, the slices of a rank are copied through pinned buffers and converted to the parameter's dtype there.

    Raises `WeightsError` if a file is missing or damaged, or if tensors are missing, unexpected, of a wrong shape or
    not of a float dtype; the error names them all.
    """
    began, rules, checkpoint = time.perf_counter(), model.weight_map(config), find_checkpoint(Path(path))
    problems, skipped, filled, num_bytes = _Problems(stale=checkpoint.stale), list[str](), set[str](), 0
    sources = _sources(checkpoint, rules, skipped, problems)
    ties = _settled_ties(model, rules, checkpoint, sources)
    targets, tied = _targets(model, replace(rules, ties=ties), tp), {checkpoint_name(name, "", rules) for name in ties}
    known = {file_name: name for name, file_name in sources.items()}
    with _way_to(next(model.parameters()).device) as put:
        for file_name, tensor in checkpoint.slices():
            name = known.get(file_name)
            if name in targets:
                filled.add(name)
                for target in targets[name]:
                    num_bytes += _fill(file_name, tensor, target, problems, put)
            elif name in tied:
                skipped.append(file_name)
            elif name is not None:
                problems.unexpected.append(file_name)
    problems.missing += targets.keys() - filled
    problems.raise_if_any(checkpoint.path, tp)
    untied = tuple(sorted(rules.ties.keys() - ties.keys() - set(ties.values())))
    if untied and tp.rank == 0:
        _log.warning("the config ties %s, but %s has values of its own for it, which are used", some(untied), path)
    return LoadReport(len(filled), tuple(skipped), num_bytes, time.perf_counter() - began, untied)


def _sources(checkpoint: Checkpoint, rules: WeightMap, skipped: list[str], problems: _Problems) -> dict[str, str]:
    """Name after the rules of `rename` -> name in the checkpoint, of all tensors that are not skipped."""
    sources: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name.endswith(rules.skip) or name.startswith(rules.skip_prefixes):
            skipped.append(name)
            continue
        renamed = _renamed(name, rules.rename)
        other = sources.setdefault(renamed, name)
        if other != name:
            problems.unexpected.append(f"{name} in addition to {other} (both are {renamed})")
    return sources


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    old = max((prefix for prefix in rename if name.startswith(prefix)), key=len, default=None)
    return name if old is None else rename[old] + name.removeprefix(old)


def _settled_ties(
    model: Model, rules: WeightMap, checkpoint: Checkpoint, sources: Mapping[str, str]
) -> Mapping[str, str]:
    """The ties that are valid for this checkpoint, as in transformers.

    If it has both tensors and they differ, they are not tied, and a parameter that was shared gets its own memory. If
    it has only the tied one, the other is read from that.
    """
    ties = {}
    for tied, source in rules.ties.items():
        here, there = (sources.get(checkpoint_name(name, "", rules)) for name in (tied, source))
        if here is None or (there is not None and _equal(checkpoint, here, there)):
            ties[tied] = source
        elif there is None:
            ties[source] = tied
        else:
            _give_own_parameter(model, tied)
    return ties


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of the checkpoint have the same shape and values."""
    a, b = (tensor for name in (one, other) for _, tensor in checkpoint.slices(name))
    shape = a.get_shape()
    if not shape or shape != b.get_shape() or not {a.get_dtype(), b.get_dtype()} <= set(FLOAT_DTYPES):
        return False
    step = max(1, _COMPARED // max(1, math.prod(shape[1:])))  # rows
    pairs = ((a[i : i + step], b[i : i + step]) for i in range(0, shape[0], step))
    return all(torch.equal(x, y) if x.dtype == y.dtype else torch.equal(x.double(), y.double()) for x, y in pairs)


def _give_own_parameter(model: Model, name: str) -> None:
    """Gives a parameter that shares the memory of another one its own memory, filled with zeros."""
    if name in dict(model.named_parameters()):  # a shared parameter is listed only with its first name
        return
    owner, _, last = name.rpartition(".")
    layer = model.get_submodule(owner)
    own = torch.zeros_like(layer.get_parameter(last))
    layer.register_parameter(last, torch.nn.Parameter(own, requires_grad=False))


def _targets(model: Model, rules: WeightMap, tp: TensorParallelGroup) -> dict[str, list[_Target]]:
    """Renamed checkpoint name -> what it fills (several targets only if a tied parameter has its own memory)."""
    targets: dict[str, list[_Target]] = {}
    for name, layer, parameter, spec in weight_layers(model):
        for shard in spec.shards(tp.rank, tp.size):
            source = checkpoint_name(rules.ties.get(name, name), shard.part, rules)
            targets.setdefault(source, []).append(_Target(layer, parameter, shard))
    return targets


def checkpoint_name(parameter: str, part: str, rules: WeightMap) -> str:
    """The name of a parameter's part in the checkpoint, after `WeightMap.rename`: the inverse of `fuse`."""
    modules = parameter.split(".")
    if part:
        names = [old for old, new in rules.fuse.items() if len(modules) > 1 and new == (modules[-2], part)]
        if len(names) != 1:
            raise WeightsError(f"the model's WeightMap names {len(names)} sources for part {part!r} of {parameter}")
        modules[-2] = names[0]
    return ".".join(modules)


@contextmanager
def _way_to(device: torch.device) -> Iterator[_Put]:
    """A context with the function that copies values: from the mapped file, for a GPU through pinned buffers."""
    if device.type == "cpu":
        yield lambda values, take: take(values)
        return
    with Uploads(device) as uploads:
        yield uploads.put


def _fill(name: str, tensor: Any, target: _Target, problems: _Problems, put: _Put) -> int:
    """Copies this rank's slice of `tensor` (a safetensors slice) to its target. Returns the number of bytes."""
    shard, shape = target.shard, tuple(tensor.get_shape())
    if shape != shard.shape:
        problems.misshapen.append(f"{name} {list(shape)}, expected {list(shard.shape)}")
    elif tensor.get_dtype() not in FLOAT_DTYPES:
        problems.misshapen.append(f"{name} of dtype {tensor.get_dtype()}, expected one of {', '.join(FLOAT_DTYPES)}")
    elif shard.length:
        values: Tensor = tensor[:] if shard.whole else tensor[shard.source]
        put(values, partial(target.layer.load_shard, target.parameter, shard))
        return values.nbytes
    return 0


_STD = 0.02
# Elements that are hashed at a time. On a CPU they fit in a core's cache, and torch starts no threads for so few. On
# other devices the number of launches counts, about ten each.
_CPU_CHUNK, _CHUNK = 1 << 15, 1 << 24


def dummy_weights(model: Model, seed: int, tp: TensorParallelGroup) -> None:
    """Fills a model with dummy weights: ones or zeros if the layer says so (norms), else uniform with deviation 0.02.

    A value is a hash of (seed, parameter, part, index in the whole tensor), so the shards are slices of the same model
    for any number of ranks.
    """
    scratch = torch.empty(0)  # shared by all tensors, because new memory costs more than the hash
    for name, layer, parameter, spec in weight_layers(model):
        for shard in spec.shards(tp.rank, tp.size):
            shape = tuple(shard.length if d == shard.dim else size for d, size in enumerate(shard.shape))
            device = layer.get_parameter(parameter).device
            if scratch.numel() < math.prod(shape) or scratch.device != device:
                scratch = torch.empty(math.prod(shape), device=device)
            values = scratch[: math.prod(shape)].view(shape)
            if spec.init != "random":
                values.fill_(1.0 if spec.init == "ones" else 0.0)
            elif shard.length:
                _hash_uniform(values, shard, hashlib.sha256(f"{seed}/{name}/{shard.part}".encode()).digest())
            layer.load_shard(parameter, shard, values)


def _hash_uniform(values: Tensor, shard: Shard, key: bytes) -> None:
    """Fills float32 `values`, the shard's slice, with uniform numbers: hashes of 32-bit indices in the whole tensor."""
    low, high = (int.from_bytes(key[i : i + 4], "little", signed=True) for i in (0, 4))
    starts = [shard.start if d == shard.dim else 0 for d in range(values.dim())]
    row = math.prod(shard.shape[1:])  # elements
    columns = torch.zeros((), dtype=torch.int64, device=values.device)
    for d in range(1, values.dim()):
        at = torch.arange(starts[d], starts[d] + values.shape[d], device=values.device)
        columns = columns.unsqueeze(-1) + at * math.prod(shard.shape[d + 1 :])
    rows = torch.arange(starts[0], starts[0] + len(values), device=values.device) * row
    columns, rows = columns.to(torch.int32), rows.to(torch.int32).view(-1, *[1] * columns.dim())  # both wrap around
    chunk = _CPU_CHUNK if values.device.type == "cpu" else _CHUNK
    step = max(1, chunk // max(1, columns.numel()))
    for i in range(0, len(values), step):
        part = values[i : i + step]
        part.copy_(_mix(columns + rows[i : i + step], low, high)).mul_(_STD * math.sqrt(3) / 2**31)


def _mix(x: Tensor, low: int, high: int) -> Tensor:
    """int32 -> int32, in place: two multiplications around a xorshift, in the manner of murmur3's finaliser."""
    x.bitwise_xor_(low).mul_(0x7FEB352D)
    return x.bitwise_xor_(x >> 15).add_(high).mul_(-0x7B935975)
