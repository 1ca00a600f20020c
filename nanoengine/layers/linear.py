"""Parallel linear layers. A `LinearMethod` decides how a weight is stored and applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from nanoengine.api import (
    LayerInfo,
    Linear,
    LinearMethod,
    Norm,
    Shard,
    ShardSpec,
    WeightLayer,
)
from nanoengine.api.layers import Placement
from nanoengine.api.sharding import part_sizes
from nanoengine.kernels.activation import Activation

__all__ = ["Unquantised", "added", "name_next_norm", "normed"]


class Unquantised(LinearMethod):
    """A weight that is not quantised: one parameter, `weight` [out, in], of the model's dtype."""

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        layer.add_weight("weight", weight)

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        WeightLayer.load_shard(layer, name, shard, values)

    def apply(self, layer: WeightLayer, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        return layer.ops.linear(x, layer.get_parameter("weight"), bias, out=out)

    def rows(self, layer: WeightLayer, ids: Tensor) -> Tensor:
        return layer.ops.embedding(ids, layer.get_parameter("weight"))

    def apply_normed(
        self,
        layer: WeightLayer,
        norm: Norm,
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        gate: Activation | None,
    ) -> tuple[Tensor, Tensor]:
        weight = layer.get_parameter("weight")
        return layer.ops.norm_linear(x, residual, norm.weight, norm.eps, weight, bias, gate=gate)

    def apply_added(
        self, layer: WeightLayer, x: Tensor, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        weight, norm = layer.get_parameter("weight"), next_norm(layer)
        if norm is None:
            return layer.ops.linear_add(x, weight, bias, residual)
        return layer.ops.linear_add(x, weight, bias, residual, next_norm=norm.weight, eps=norm.eps)


class ParallelLinear(Linear, WeightLayer):
    """Base class of the linear layers that have a weight.

    Args:
        info: name, shape and parts. weight, bias: how they are split. method: None: `Unquantised`.
    """

    def __init__(
        self,
        info: LayerInfo,
        weight: ShardSpec,
        bias: ShardSpec | None,
        *,
        place: Placement,
        method: LinearMethod | None = None,
    ) -> None:
        WeightLayer.__init__(self, place, info.name)
        self.info = info
        self._next: tuple[Norm, ...] = ()
        self.method = method or Unquantised()
        self.method.create(self, weight)
        self.bias: Tensor | None
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.add_weight("bias", bias)

    def load_shard(self, name: str, shard: Shard, values: Tensor) -> None:
        if name == "bias":
            super().load_shard(name, shard, values)
        else:
            self.method.load(self, name, shard, values)

    def finish(self) -> None:
        self.method.finish(self)

    @property
    def next_norm(self) -> Norm | None:
        """The norm through which the stream is read after `added`, if the model named it: it saves that norm a pass
        where the product can prepare it. A hint: results are right whatever is read next."""
        return self._next[0] if self._next else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self.method.apply(self, x, self.bias)

    def normed(
        self, norm: Norm, x: Tensor, residual: Tensor | None, *, gate: Activation | None = None
    ) -> tuple[Tensor, Tensor]:
        if norm.rms:
            return self.method.apply_normed(self, norm, x, residual, self.bias, gate)
        return super().normed(norm, x, residual, gate=gate)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.method.apply_added(self, x, self.bias, residual)


class ReplicatedLinear(ParallelLinear):
    """[T, in] -> [T, out]. The weight is whole on every rank and may have fused parts."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        parts: Sequence[tuple[str, int]] = (),
        place: Placement,
        method: LinearMethod | None = None,
        sources: tuple[str, ...] = (),
    ) -> None:
        info = linear_info(name, in_features, out_features, parts, "replicated", sources)
        weight = ShardSpec(shape=info.shape, parts=info.parts)
        spec = ShardSpec(shape=(out_features,), parts=info.parts) if bias else None
        super().__init__(info, weight, spec, place=place, method=method)


class ColumnParallelLinear(ParallelLinear):
    """[T, in] -> [T, out / ranks]. Each rank has some of the outputs of every part (q, k, v; gate, up)."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        parts: Sequence[tuple[str, int]] = (),
        head_size: int | None = None,
        place: Placement,
        method: LinearMethod | None = None,
        sources: tuple[str, ...] = (),
    ) -> None:
        info = linear_info(name, in_features, out_features, parts, "column", sources)

        def spec(*shape: int) -> ShardSpec:
            unit, replicate = head_size or 1, head_size is not None
            return ShardSpec(shape=shape, split="even", parts=info.parts, unit=unit, replicate=replicate)

        bias_spec = spec(out_features) if bias else None
        super().__init__(info, spec(*info.shape), bias_spec, place=place, method=method)


class RowParallelLinear(ParallelLinear):
    """[T, in / ranks] -> [T, out]. Each rank has some of the inputs; the products are summed over ranks.

    reduce: False: the layer does not sum. Each rank returns its own part of the sum; the caller may add several of them
    before it calls `tp.all_reduce`.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        parts: Sequence[tuple[str, int]] = (),
        head_size: int | None = None,
        reduce: bool = True,
        place: Placement,
        method: LinearMethod | None = None,
        sources: tuple[str, ...] = (),
    ) -> None:
        info = linear_info(name, in_features, out_features, parts, "row", sources)
        weight = ShardSpec(shape=info.shape, dim=1, join=0, split="even", parts=info.parts, unit=head_size or 1)
        spec = ShardSpec(shape=(out_features,), parts=info.parts) if bias else None
        super().__init__(info, weight, spec, place=place, method=method)
        self.out_features, self.reduce = out_features, reduce

    def forward(self, x: Tensor) -> Tensor:
        out = self.method.apply(self, x, self._bias_once)
        return self.tp.all_reduce(out) if self.reduce else out

    def normed(
        self, norm: Norm, x: Tensor, residual: Tensor | None, *, gate: Activation | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.tp.size == 1:
            return super().normed(norm, x, residual, gate=gate)
        return Linear.normed(self, norm, x, residual, gate=gate)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp.size == 1:
            return super().added(x, residual)
        if not self.reduce:
            return self(x), residual
        plain = type(self.method) is Unquantised and self.bias is None  # which only one rank would add
        inboxes = self.tp.inboxes(residual) if plain else None
        if inboxes is not None:
            weight, next_norm = self.get_parameter("weight"), next_norm_weight(self)
            total = self.ops.linear_over_ranks(x, weight, residual, inboxes, next_norm=next_norm)
            if total is not None:
                return total, None
        out = self.tp.partial_sum(len(x), self.out_features, x.dtype)
        return self.tp.all_reduce_add(self.method.apply(self, x, self._bias_once, out=out), residual)

    @property
    def _bias_once(self) -> Tensor | None:
        """The bias, in one of the ranks' sums."""
        return self.bias if self.tp.rank == 0 else None


def linear_info(
    name: str,
    in_features: int,
    out_features: int,
    parts: Sequence[tuple[str, int]],
    parallel: str,
    sources: tuple[str, ...] = (),
) -> LayerInfo:
    """The `LayerInfo` of a linear layer. Raises `ModelError` for parts that do not add up."""
    fused = part_sizes(parts, out_features, name)
    shape = (out_features, in_features)
    return LayerInfo(name=name, kind="linear", shape=shape, parts=fused, parallel=parallel, sources=sources)


def normed(
    layer: nn.Module, norm: Norm, x: Tensor, residual: Tensor | None, *, gate: Activation | None = None
) -> tuple[Tensor, Tensor]:
    """`Linear.normed`, also for a module with which a build context replaced the linear layer."""
    if isinstance(layer, Linear):
        return layer.normed(norm, x, residual, gate=gate)
    return Linear.normed(cast(Linear, layer), norm, x, residual, gate=gate)


def next_norm(layer: WeightLayer) -> Norm | None:
    """`ParallelLinear.next_norm`; None: the layer has none."""
    return layer.next_norm if isinstance(layer, ParallelLinear) else None


def next_norm_weight(layer: WeightLayer) -> Tensor | None:
    """Of `next_norm`."""
    norm = next_norm(layer)
    return None if norm is None else norm.weight


def name_next_norm(layer: nn.Module, norm: Norm) -> None:
    """Names `ParallelLinear.next_norm`, where the layer and the norm are such."""
    if isinstance(layer, ParallelLinear) and norm.rms:
        layer._next = (norm,)  # in a tuple: no part of this layer


def added(layer: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """`Linear.added`, also for a module with which a build context replaced the linear layer."""
    return layer.added(x, residual) if isinstance(layer, Linear) else (layer(x), residual)
