"""Parallel linear layers. A `LinearMethod` decides how a weight is stored and applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from nanoengine.kernels.activation import Activation
from nanoengine.layers.norm import RMSNorm
from nanoengine.layers.sharding import Placement, Shard, ShardSpec, WeightLayer, part_sizes


class LinearMethod(ABC):
    """How a linear layer stores its weight, loads a slice of a checkpoint, and multiplies."""

    @abstractmethod
    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        """Register the parameters that store the [out, in] weight described by `weight`."""

    @abstractmethod
    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        """Load `values`, this rank's slice of a checkpoint tensor, into the parameter `name`."""

    @abstractmethod
    def apply(self, layer: WeightLayer, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        """[T, in on this rank] -> [T, out on this rank]. `out`: the tensor that receives the result."""

    def apply_normed(
        self,
        layer: WeightLayer,
        norm: RMSNorm,
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        gate: Activation | None,
    ) -> tuple[Tensor, Tensor]:
        """Applies the norm, then the weight; returns (result, residual stream). x is added to the stream first.

        With a `gate`, the result is gate(first half) * second half.
        """
        normed, total = layer.ops.add_rms_norm(x, residual, norm.weight, norm.eps)
        y = self.apply(layer, normed, bias)
        return (layer.ops.act_and_mul(y, gate) if gate else y), total

    def apply_added(
        self, layer: WeightLayer, x: Tensor, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The product, to be added to the residual stream: (product, residual), or (sum, None) if it was added."""
        return self.apply(layer, x, bias), residual


class Unquantised(LinearMethod):
    """A weight that is not quantised: one parameter, `weight` [out, in], of the model's dtype."""

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        layer.add_weight("weight", weight)

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        WeightLayer.load_shard(layer, name, shard, values)

    def apply(self, layer: WeightLayer, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        return layer.ops.linear(x, layer.get_parameter("weight"), bias, out=out)

    def apply_normed(
        self,
        layer: WeightLayer,
        norm: RMSNorm,
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
        return layer.ops.linear_add(x, layer.get_parameter("weight"), bias, residual)


class Linear(WeightLayer):
    """A linear layer that is whole on every rank. Base class of the parallel ones."""

    def __init__(
        self,
        weight: ShardSpec,
        bias: ShardSpec | None,
        *,
        place: Placement,
        method: LinearMethod | None = None,
    ) -> None:
        super().__init__(place)
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

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self.method.apply(self, x, self.bias)

    def normed(
        self, norm: RMSNorm, x: Tensor, residual: Tensor | None, *, gate: Activation | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layer after a norm: see `LinearMethod.apply_normed`."""
        return self.method.apply_normed(self, norm, x, residual, self.bias, gate)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer whose result is added to the residual stream: see `LinearMethod.apply_added`."""
        return self.method.apply_added(self, x, self.bias, residual)


class ReplicatedLinear(Linear):
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
    ) -> None:
        fused = part_sizes(parts, out_features, name)
        weight = ShardSpec(shape=(out_features, in_features), parts=fused)
        spec = ShardSpec(shape=(out_features,), parts=fused) if bias else None
        super().__init__(weight, spec, place=place, method=method)


class ColumnParallelLinear(Linear):
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
    ) -> None:
        fused = part_sizes(parts, out_features, name)

        def spec(*shape: int) -> ShardSpec:
            unit, replicate = head_size or 1, head_size is not None
            return ShardSpec(shape=shape, split="even", parts=fused, unit=unit, replicate=replicate)

        super().__init__(
            spec(out_features, in_features),
            spec(out_features) if bias else None,
            place=place,
            method=method,
        )


class RowParallelLinear(Linear):
    """[T, in / ranks] -> [T, out]. Each rank has some of the inputs; the products are summed over ranks."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        head_size: int | None = None,
        place: Placement,
        method: LinearMethod | None = None,
    ) -> None:
        weight = ShardSpec(shape=(out_features, in_features), dim=1, split="even", unit=head_size or 1)
        spec = ShardSpec(shape=(out_features,)) if bias else None
        super().__init__(weight, spec, place=place, method=method)
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.all_reduce(self.method.apply(self, x, self._bias_once))

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp.size == 1:
            return super().added(x, residual)
        out = self.tp.partial_sum(len(x), self.out_features, x.dtype)
        return self.tp.all_reduce_add(self.method.apply(self, x, self._bias_once, out=out), residual)

    @property
    def _bias_once(self) -> Tensor | None:
        """The bias on rank 0, None on the others, so that the sum over ranks has it once."""
        return self.bias if self.tp.rank == 0 else None


def normed(
    layer: nn.Module, norm: RMSNorm, x: Tensor, residual: Tensor | None, *, gate: Activation | None = None
) -> tuple[Tensor, Tensor]:
    """`Linear.normed`, also for a module with which a build context replaced the linear layer."""
    if isinstance(layer, Linear):
        return layer.normed(norm, x, residual, gate=gate)
    hidden, total = norm.ops.add_rms_norm(x, residual, norm.weight, norm.eps)
    y = layer(hidden)
    return (norm.ops.act_and_mul(y, gate) if gate else y), total


def added(
    layer: nn.Module, x: Tensor, residual: Tensor, post_norm: RMSNorm | None = None
) -> tuple[Tensor, Tensor | None]:
    """`Linear.added`, also for a module with which a build context replaced the linear layer.

    With a `post_norm`, the norm of the next layer adds: it adds and normalises in one pass.
    """
    if post_norm is not None:
        return post_norm(layer(x)), residual
    return layer.added(x, residual) if isinstance(layer, Linear) else (layer(x), residual)
