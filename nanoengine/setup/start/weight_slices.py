"""What of a checkpoint's tensor a rank reads for its share of a parameter, and what is done to it on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nanoengine.api.sharding import Shard, ShardSpec
from nanoengine.api.weights import WeightRule

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorSlice(Protocol):
    """A tensor that is read when it is indexed, as safetensors' are."""

    def get_shape(self) -> Sequence[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: Any, /) -> Tensor: ...


class WholeTensor:
    """A tensor as a `TensorSlice`."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> Sequence[int]:
        return tuple(self._tensor.shape)

    def get_dtype(self) -> str:
        return _NAMES.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, index: Any, /) -> Tensor:
        found = self._tensor[index]
        return found if not found.dim() or found.stride(-1) == 1 else found.contiguous()


@dataclass(frozen=True, slots=True)
class Reading:
    """index: of what is read. then: makes of it the values of the shard's `source`."""

    index: tuple[slice, ...]
    then: Callable[[Tensor], Tensor]


def only_names(rule: WeightRule) -> bool:
    """Whether the rule takes values as they are, and in their order."""
    return rule == WeightRule(rule.to, rule.parts)


def wanted_shape(spec: ShardSpec, parts: Sequence[tuple[str, int]], rule: WeightRule, *, stacked: bool) -> list[int]:
    """The shape of a checkpoint's tensor that holds these parts of a parameter."""
    shape = list(spec.shape)
    if parts:
        shape[spec.joined] = sum(size for _, size in parts)
    shape = shape[1:] if stacked else shape
    return [*shape[:-2], shape[-1], shape[-2]] if rule.transpose and len(shape) > 1 else shape


def misfit(spec: ShardSpec, parts: Sequence[tuple[str, int]], rule: WeightRule) -> str:
    """Why a rule's numbers do not fit the parts it names; "" if they do."""
    if rule.interleaved and len({size for _, size in parts}) != 1:
        return "only parts of one size can be interleaved"
    for name, size in parts or (("", spec.shape[spec.joined]),):
        which = f"part {name} of {size}" if name else f"{size}"
        if size % rule.groups:
            return f"{which} outputs is no multiple of groups={rule.groups}"
        if rule.permute and size % len(rule.permute):
            return f"{which} outputs is no multiple of permute's {len(rule.permute)}"
    return ""


def reading(
    spec: ShardSpec, shard: Shard, parts: Sequence[tuple[str, int]], rule: WeightRule, *, stacked: bool
) -> Reading:
    """How a rank gets its shard from a tensor that holds `parts`, of which the shard's is one."""
    if only_names(rule) and not stacked and len(parts) < 2:
        return Reading(shard.source, _as_it_is)
    outputs = max(spec.joined - stacked, 0)  # the dimension that the rule's steps are about
    index = list(shard.source[stacked:])
    dims = len(index)
    lanes = _lanes(index[outputs], shard.shape[stacked:][outputs], shard.part, parts, rule)
    index[outputs] = lanes.read
    swap = rule.transpose and dims > 1
    if swap:
        index[-1], index[-2] = index[-2], index[-1]

    def then(values: Tensor) -> Tensor:
        values = values.transpose(-1, -2) if swap else values
        values = lanes.take(values, outputs)
        if rule.scale != 1.0:
            values = values.to(torch.promote_types(values.dtype, torch.float32)) * rule.scale
        return values.unsqueeze(0) if stacked else values

    return Reading(tuple(index), then)


def _as_it_is(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True)
class _Lanes:
    """Outputs `cut` of a part, when `read` is what was read of the tensor's.

    group, at, width: of each `group` outputs that were read the part's are `width`, from `at` on.
    """

    read: slice
    group: int
    at: int
    width: int
    permute: tuple[int, ...]
    cut: slice

    def take(self, values: Tensor, dim: int) -> Tensor:
        """[..., outputs read, ...] -> [..., outputs of the shard, ...]."""
        if self.width != self.group:
            values = _grouped(values, dim, self.group).narrow(dim + 1, self.at, self.width).flatten(dim, dim + 1)
        if self.permute:
            order = torch.tensor(self.permute, device=values.device)
            values = _grouped(values, dim, len(order)).index_select(dim + 1, order).flatten(dim, dim + 1)
        return values.narrow(dim, self.cut.start, self.cut.stop - self.cut.start)


def _grouped(values: Tensor, dim: int, size: int) -> Tensor:
    """[..., n, ...] -> [..., n / size, size, ...]."""
    return values.reshape(*values.shape[:dim], -1, size, *values.shape[dim + 1 :])


def _lanes(share: slice, size: int, part: str, parts: Sequence[tuple[str, int]], rule: WeightRule) -> _Lanes:
    """`share`: the outputs of a part of `size` that are wanted; whole groups of them are read."""
    if share.stop <= share.start:
        return _Lanes(slice(0, 0), 1, 0, 1, (), slice(0, 0))
    before = 0
    for name, each in parts:
        if name == part:
            break
        before += each
    total = sum(each for _, each in parts) or size
    step = len(rule.permute) or 1
    groups = size if rule.interleaved else rule.groups
    if groups == 1:
        first, last = share.start // step * step, -(-share.stop // step) * step
        cut = slice(share.start - first, share.stop - first)
        return _Lanes(slice(before + first, before + last), 1, 0, 1, rule.permute, cut)
    width, group = size // groups, total // groups
    unit = math.lcm(width, step)  # whole groups and whole permutations
    first, last = share.start // unit * unit, -(-share.stop // unit) * unit
    read = slice(first // width * group, last // width * group)
    cut = slice(share.start - first, share.stop - first)
    return _Lanes(read, group, before // groups, width, rule.permute, cut)
