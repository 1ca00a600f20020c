"""Makes dummy weights, for benchmarks and tests."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from nanoengine.api.model import Model
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.sharding import Shard
from nanoengine.layers.quantised import DUMMY_DEVIATION
from nanoengine.layers.sharding import finish_layers, weight_layers

# Elements that are hashed at a time. On a CPU they fit in a core's cache, and torch starts no threads for so few. On
# other devices the number of launches counts, about ten each.
_CPU_CHUNK, _CHUNK = 1 << 15, 1 << 24


def dummy_weights(model: Model, seed: int, tp: TensorParallelGroup) -> None:
    """Fills a model with dummy weights: ones or zeros if the layer says so (norms), else uniform with deviation 0.02.

    A value is a hash of (seed, parameter, part, index in the whole tensor), so the shards are slices of the same model
    for any number of ranks. Calls `finish` of every layer.
    """
    scratch = torch.empty(0)  # shared by all tensors, because new memory costs more than the hash
    for name, layer, parameter, spec in weight_layers(model):
        for shard in () if spec.made else spec.shards(tp.rank, tp.size):
            shape = tuple(each.stop - each.start for each in shard.source)
            device = layer.get_parameter(parameter).device
            if scratch.numel() < math.prod(shape) or scratch.device != device:
                scratch = torch.empty(math.prod(shape), device=device)
            values = scratch[: math.prod(shape)].view(shape)
            if spec.init != "random":
                values.fill_(1.0 if spec.init == "ones" else 0.0)
            elif shard.size:
                _hash_uniform(values, shard, hashlib.sha256(f"{seed}/{name}/{shard.part}".encode()).digest())
            layer.load_shard(parameter, shard, values)
    finish_layers(model)


def _hash_uniform(values: Tensor, shard: Shard, key: bytes) -> None:
    """Fills float32 `values`, the shard's slice, with uniform numbers: hashes of 32-bit indices in the whole tensor."""
    low, high = (int.from_bytes(key[i : i + 4], "little", signed=True) for i in (0, 4))
    starts = [each.start for each in shard.source]
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
        part.copy_(_mix(columns + rows[i : i + step], low, high)).mul_(DUMMY_DEVIATION * math.sqrt(3) / 2**31)


def _mix(x: Tensor, low: int, high: int) -> Tensor:
    """int32 -> int32, in place: two multiplications around a xorshift, in the manner of murmur3's finaliser."""
    x.bitwise_xor_(low).mul_(0x7FEB352D)
    return x.bitwise_xor_(x >> 15).add_(high).mul_(-0x7B935975)
