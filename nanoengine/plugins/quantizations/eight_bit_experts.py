"""The method of experts whose weights have eight bits: each is stored and multiplied as `EightBitLinear` does it."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

from torch import Tensor

from nanoengine.api import Experts, ExpertsMethod, LayerInfo, ModelError, Shard, ShardSpec, WeightLayer
from nanoengine.kernels import eight_bit
from nanoengine.kernels.eight_bit import EightBit
from nanoengine.layers.quantised import divided
from nanoengine.plugins.quantizations.eight_bit import (
    Scheme,
    add_scale,
    blocks_of_parts,
    of_outputs,
    quantised_rows,
    stored_as,
    takes_triton,
)


class EightBitExperts(ExpertsMethod):
    """Codes [experts, out, in] of gate and up, and of down, with a scale for each output or block of an expert."""

    def __init__(self, layer: LayerInfo, scheme: Scheme) -> None:
        """Raises `ModelError` for scales that experts cannot have here."""
        if scheme.scales == "tensor" or scheme.inputs == "tensor" or scheme.bound is not None:
            raise ModelError(
                f"{layer.name}: experts are not supported in this format ({scheme}); they are with a scale for each "
                "output or block, and inputs that are quantised by token or group, or not at all"
            )
        self.scheme, self.label = scheme, f"{scheme} (experts)"
        self._weights = dict[str, EightBit]()
        self._kernels: ModuleType = eight_bit

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        scheme = self.scheme
        layer.add_weight("weight", stored_as(weight, scheme), scheme.dtype)
        name = scheme.scale_names[0]
        found = blocks_of_parts(layer, name, weight, *scheme.scales) if isinstance(scheme.scales, tuple) else {}
        for own, spec in (found or {name: replace(self._scales(layer, weight), made=scheme.online)}).items():
            add_scale(layer, own, spec, float("nan"))

    def _scales(self, layer: WeightLayer, weight: ShardSpec) -> ShardSpec:
        count, outputs, _ = weight.shape
        if isinstance(self.scheme.scales, tuple):
            rows, columns = self.scheme.scales
            one = replace(weight, shape=weight.shape[1:], dim=max(weight.dim - 1, 0), join=0)
            one = divided(layer, one if weight.dim else replace(one, split="whole"), outputs=rows, inputs=columns)
            return replace(weight, shape=(count, *one.shape), parts=one.parts, unit=one.unit)
        each = replace(weight, shape=(count, outputs, 1))
        return replace(each, split="whole") if weight.dim == 2 else each

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        if name != "weight" or values.dtype == self.scheme.dtype:
            WeightLayer.load_shard(layer, name, shard, values)
            return
        codes, scale = quantised_rows(values.flatten(0, 1), self.scheme.dtype)  # online, or dummy weights
        WeightLayer.load_shard(layer, name, shard, codes.view(values.shape))
        if self.scheme.online:
            into = layer.get_parameter(self.scheme.scale_names[0]).data
            into[shard.target[:2]] = scale.view(*values.shape[:2], 1)

    def finish(self, layer: WeightLayer) -> None:
        weight, spec = layer.get_parameter("weight").data, layer.specs["weight"]
        rows, columns = self.scheme.scales if isinstance(self.scheme.scales, tuple) else (1, weight.shape[2])
        name = self.scheme.scale_names[0]
        if name in layer.specs:
            scale = layer.get_parameter(name).data
        else:
            scale, rows = (
                of_outputs([layer.get_parameter(f"{name}:{part}").data for part, _ in spec.parts], rows, spec),
                1,
            )
        self._weights[layer.name.rpartition(".")[2]] = EightBit(weight, scale, rows, columns, self.scheme.inputs)
        if takes_triton(layer, weight):
            from nanoengine.kernels import eight_bit_experts_triton

            self._kernels = eight_bit_experts_triton

    def apply(
        self,
        experts: Experts,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        add: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        y: Tensor = self._kernels.experts(
            x,
            ids,
            weights,
            self._weights["gate_up_proj"],
            self._weights["down_proj"],
            activation=experts.sizes.activation,
            gate_up_bias=experts.gate_up_bias,
            down_bias=experts.down_bias,
            first=experts.first,
            add=add,
            out=out,
        )
        return y
