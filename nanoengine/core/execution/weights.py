"""Weights into a model: from safetensors, each rank reading its own slices, complete or an error; or made up."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoengine.core.errors import WeightsError
from nanoengine.core.execution.model import Model, ModelConfig, WeightMap
from nanoengine.core.execution.parallel import TensorParallelGroup
from nanoengine.core.execution.upload import Uploads
from nanoengine.layers.sharding import Shard, WeightLayer, weight_layers

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_SHOWN = 5  # names listed of each kind of problem

_Put = Callable[[Tensor, Callable[[Tensor], None]], None]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded: checkpoint tensors used and passed over, bytes read on this rank, seconds."""

    num_tensors: int
    skipped: tuple[str, ...]
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Target:
    """Where one checkpoint tensor goes: `shard` of `parameter` in `layer`."""

    layer: WeightLayer
    parameter: str
    shard: Shard


@dataclass(slots=True)
class _Problems:
    """Everything wrong with a checkpoint, told at once."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def raise_if_any(self, path: Path, tp: TensorParallelGroup) -> None:
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", self.misshapen))
        told = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]
        if told:
            rank = f" (rank {tp.rank} of {tp.size})" if tp.size > 1 else ""
            raise WeightsError(f"the weights in {path} do not fit the model{rank}: " + "; ".join(told))


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def load_weights(model: Model, config: ModelConfig, path: str | Path, tp: TensorParallelGroup) -> LoadReport:
    """Fills every parameter from `path`'s model.safetensors, or the files its index names.

    On a GPU a rank's slices travel through pinned buffers, and are converted to the parameter's dtype there.

    Raises `WeightsError` if a file is absent or damaged, or naming all tensors that are missing, unexpected, misshapen
    or of a dtype that is no float.
    """
    began, path = time.perf_counter(), Path(path)
    rules = model.weight_map(config)
    targets, tied = _targets(model, rules, tp), {checkpoint_name(name, "", rules) for name in rules.ties}
    problems, filled, skipped, num_bytes = _Problems(), set[str](), [], 0
    with _way_to(next(model.parameters()).device) as put:
        for name, tensor in _tensors(path):
            if name.endswith(rules.skip) or name.startswith(rules.skip_prefixes) or name in tied:
                skipped.append(name)
            elif name not in targets:
                problems.unexpected.append(name)
            else:
                filled.add(name)
                for target in targets[name]:
                    num_bytes += _fill(name, tensor, target, problems, put)
    problems.missing += targets.keys() - filled
    problems.raise_if_any(path, tp)
    return LoadReport(len(filled), tuple(skipped), num_bytes, time.perf_counter() - began)


def _targets(model: Model, rules: WeightMap, tp: TensorParallelGroup) -> dict[str, list[_Target]]:
    """checkpoint name -> what it fills (more than one only where a tie has a parameter of its own)."""
    targets: dict[str, list[_Target]] = {}
    for name, layer, parameter, spec in weight_layers(model):
        for shard in spec.shards(tp.rank, tp.size):
            source = checkpoint_name(rules.ties.get(name, name), shard.part, rules)
            targets.setdefault(source, []).append(_Target(layer, parameter, shard))
    return targets


def checkpoint_name(parameter: str, part: str, rules: WeightMap) -> str:
    """The checkpoint's name of a parameter's part: the rules of `WeightMap`, read backwards."""
    modules = parameter.split(".")
    if part:
        names = [old for old, new in rules.fuse.items() if len(modules) > 1 and new == (modules[-2], part)]
        if len(names) != 1:
            raise WeightsError(f"the model's WeightMap names {len(names)} sources for part {part!r} of {parameter}")
        modules[-2] = names[0]
    name = ".".join(modules)
    for old, new in rules.rename.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


@contextmanager
def _way_to(device: torch.device) -> Iterator[_Put]:
    """How values reach their parameter: on a CPU from the mapped file, on a GPU by way of pinned buffers."""
    if device.type == "cpu":
        yield lambda values, take: take(values)
        return
    with Uploads(device) as uploads:
        yield uploads.put


def _fill(name: str, tensor: Any, target: _Target, problems: _Problems, put: _Put) -> int:
    """Sends this rank's slice of `tensor` (a safetensors slice) to its place; returns its bytes."""
    shard, shape = target.shard, tuple(tensor.get_shape())
    if shape != shard.shape:
        problems.misshapen.append(f"{name} {list(shape)}, wanted {list(shard.shape)}")
    elif tensor.get_dtype() not in FLOAT_DTYPES:
        problems.misshapen.append(f"{name} of dtype {tensor.get_dtype()}, wanted one of {', '.join(FLOAT_DTYPES)}")
    elif shard.length:
        values: Tensor = tensor[:] if shard.whole else tensor[shard.source]
        put(values, partial(target.layer.load_shard, target.parameter, shard))
        return values.nbytes
    return 0


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, safetensors slice) of every tensor, file by file."""
    for file, names in _files(path).items():
        try:
            with safe_open(path / file, framework="pt", device="cpu") as opened:
                for name in opened.keys() if names is None else names & set(opened.keys()):
                    yield name, opened.get_slice(name)
        except FileNotFoundError as error:
            raise WeightsError(f"{path / INDEX_FILE} names {file}, which is not there") from error
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path / file} cannot be read, it may be incomplete: {error}") from error


def _files(path: Path) -> Mapping[str, set[str] | None]:
    """file -> the tensors to take from it (None: all)."""
    if (path / INDEX_FILE).is_file():
        try:
            weight_map = json.loads((path / INDEX_FILE).read_text())["weight_map"]
            files: dict[str, set[str] | None] = {file: set() for file in sorted(set(weight_map.values()))}
            for name, file in weight_map.items():
                names = files[file]
                assert names is not None
                names.add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path / INDEX_FILE} is no safetensors index: {error!r}") from error
        return files
    if (path / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    raise WeightsError(f"no {SINGLE_FILE} or {INDEX_FILE} in {path}; other weight formats are not read")


_STD = 0.02
# Elements hashed at a time: on a CPU they stay in a core's cache, and torch starts no threads for so few; elsewhere
# what counts is the number of launches, ten or so each.
_CPU_CHUNK, _CHUNK = 1 << 15, 1 << 24


def dummy_weights(model: Model, seed: int, tp: TensorParallelGroup) -> None:
    """Made-up weights: ones or zeros where a layer says so (norms), else uniform with standard deviation 0.02.

    A value is a hash of (seed, parameter, part, index in the whole tensor), so that the shards of any number of ranks
    are slices of one and the same model.
    """
    scratch = torch.empty(0)  # one for all tensors: touching fresh memory costs more than the hash
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
    """Fills float32 `values`, the shard's slice, with uniform numbers hashed from 32-bit indices into the whole."""
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
