"""What a layer is: a name, what it is made of, and a method that stores and applies its weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.sharding import Shard, ShardSpec
from nanoengine.kernels.ops import Activation, Ops

if TYPE_CHECKING:
    from nanoengine.api.experts import ExpertsMethod

LayerKind = Literal["linear", "embedding", "head", "experts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """What is known of a layer when its method is chosen.

    Attributes:
        name: dotted path of the layer in the model.
        kind: what made it: `linear`, `embedding`, `lm_head` or `experts` of the build context.
        shape: of the whole weight, all ranks together: [out, in]; of experts [experts, out, in] of gate and up.
        parts: (name, outputs) of what is fused; () where nothing is. Of experts: "gate", "up" and "down".
        parallel: "column", "row", "replicated"; "vocabulary" of embeddings and heads; of experts "width": each rank has
            a part of every expert, or "experts": whole ones.
        sources: names of the checkpoint's modules that fill it by the model's `WeightMap`, behind its `rename`, one a
            part; `{}` stands for the index of an expert.
    """

    name: str
    kind: LayerKind
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...] = ()
    parallel: str = "replicated"
    sources: tuple[str, ...] = ()


class Placement(Protocol):
    """The rank, dtype and device for which a layer is made. A `BuildContext` is one."""

    tp: TensorParallelGroup
    dtype: torch.dtype
    device: torch.device
    ops: Ops


class WeightLayer(nn.Module):
    """A layer that knows how its parameters are split. The weight loader and dummy weights use `name` and `specs`.

    Attributes:
        name: dotted path in the model, from the build context. A layer without a name gets its path when the model is
            built.
        tp: the tensor-parallel group. ops: the operations to compute with. specs: parameter -> how it is split.
    """

    def __init__(self, place: Placement, name: str = "") -> None:
        super().__init__()
        self.name = name
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

    def finish(self) -> None:
        """Called once after all parameters of the model were loaded, before the first step."""


class Norm(WeightLayer, ABC):
    """A normalisation over the last dimension. A norm of a plugin's own subclasses it.

    Attributes:
        rms: it is x / sqrt(mean(x^2) + eps) * weight, with parameters `weight` and `eps`: what a product may fuse.
    """

    rms: ClassVar[bool] = False
    weight: Tensor
    eps: float

    @abstractmethod
    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """[..., dim] twice -> (the sum, normalised; the sum). Without a residual the sum is x itself."""

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., dim] -> normalised x; with a residual, (normalised x + residual, x + residual)."""
        normed, total = self.add(x, residual)
        return normed if residual is None else (normed, total)

    if TYPE_CHECKING:
        __call__ = forward


class Layer(nn.Module, ABC):
    """A module that maps one tensor to one: what a build context makes."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[T, ...] -> [T, ...]."""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...


class Linear(Layer):
    """A linear layer, [T, in] -> [T, out]. A module that wraps one is a subclass that overrides `forward`: then no
    fused product bypasses it.

    Attributes:
        info: name, shape and parts of the layer.
    """

    info: LayerInfo

    def normed(
        self, norm: Norm, x: Tensor, residual: Tensor | None, *, gate: Activation | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layer after a norm: returns (result, residual stream). x is added to the stream first.

        With a `gate`, the result is gate(first half) * second half.
        """
        hidden, total = norm.add(x, residual)
        y = self(hidden)
        return (norm.ops.act_and_mul(y, gate) if gate else y), total

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product, to be added to the residual stream: (product, residual), or (sum, None) if it was added."""
        return self(x), residual


class LinearMethod(ABC):
    """How a layer stores its weight, loads slices of a checkpoint, and multiplies. One instance per layer.

    Attributes:
        label: what the weight is, for the start report: "fp8, blocks of 128". "": it is plain.
    """

    label: str = ""

    @abstractmethod
    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        """Register the parameters that store the [out, in] weight described by `weight`, by `layer.add_weight`.

        A tensor "q_proj.scale" of the checkpoint fills part "q" of the parameter "scale" of "qkv_proj"; if there is
        none, the whole parameter "scale:q". `nanoengine.layers.quantised` has functions that make specs of `weight`.
        """

    @abstractmethod
    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        """Load `values`, this rank's slice of a checkpoint tensor, into the parameter `name`."""

    def finish(self, layer: WeightLayer) -> None:  # noqa: B027 - most have nothing to do
        """Called once after all parameters were loaded, e.g. to repack or transpose them."""

    @abstractmethod
    def apply(self, layer: WeightLayer, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        """[T, in on this rank] -> [T, out on this rank]. `out`: the tensor that receives the result."""

    def rows(self, layer: WeightLayer, ids: Tensor) -> Tensor:
        """Rows of the weight, int [T] -> [T, in], of the model's dtype. Only methods of embeddings need it."""
        raise NotImplementedError(f"{type(self).__name__} has no rows()")

    def apply_normed(
        self,
        layer: WeightLayer,
        norm: Norm,
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        gate: Activation | None,
    ) -> tuple[Tensor, Tensor]:
        """Applies the norm, then the weight; returns (result, residual stream). x is added to the stream first.

        With a `gate`, the result is gate(first half) * second half. `norm`: one with `rms`.
        """
        normed, total = norm.add(x, residual)
        y = self.apply(layer, normed, bias)
        return (layer.ops.act_and_mul(y, gate) if gate else y), total

    def apply_added(
        self, layer: WeightLayer, x: Tensor, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The product, to be added to the residual stream: (product, residual), or (sum, None) if it was added."""
        return self.apply(layer, x, bias), residual


ChooseMethod = Callable[[LayerInfo], "LinearMethod | ExpertsMethod | None"]
"""The method of a layer, of experts an `ExpertsMethod`; None: the plain one, whose weights are of the model's dtype."""
