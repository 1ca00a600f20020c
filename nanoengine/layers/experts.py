"""The experts of a layer over ranks. How they are stored and applied is an `ExpertsMethod`'s business."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nanoengine.api import Experts, ExpertsInfo, ExpertsMethod, LayerInfo, ModelError, Shard, ShardSpec, WeightLayer
from nanoengine.api.layers import Placement

__all__ = ["UnquantisedExperts"]


class UnquantisedExperts(ExpertsMethod):
    """Weights that are not quantised: one parameter `weight` of the model's dtype for each of both products."""

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        layer.add_weight("weight", weight)

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        WeightLayer.load_shard(layer, name, shard, values)

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
        return experts.down_proj.ops.experts(
            x,
            ids,
            weights,
            experts.gate_up_proj.get_parameter("weight"),
            experts.down_proj.get_parameter("weight"),
            activation=experts.sizes.activation,
            gate_up_bias=experts.gate_up_bias,
            down_bias=experts.down_bias,
            first=experts.first,
            add=add,
            out=out,
        )


class StackedWeights(WeightLayer):
    """One weight of each expert, in a stack, and the biases [experts, outputs], if there are any."""

    bias: Tensor | None

    def __init__(
        self, name: str, weight: ShardSpec, bias: ShardSpec | None, *, method: ExpertsMethod, place: Placement
    ) -> None:
        super().__init__(place, name)
        self.method = method
        method.create(self, weight)
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


class ParallelExperts(Experts):
    """Experts of which each rank has a part of the width, or whole ones.

    Args:
        info: of `experts_info`. method: None: `UnquantisedExperts`.
    """

    def __init__(
        self, info: LayerInfo, sizes: ExpertsInfo, *, place: Placement, method: ExpertsMethod | None = None
    ) -> None:
        super().__init__()
        self.info, self.sizes, self.method = info, sizes, method or UnquantisedExperts()
        count, hidden, width = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
        by_width = info.parallel == "width"
        self.first = 0 if by_width else place.tp.rank * count // place.tp.size
        self._adds_down_bias = not by_width or place.tp.rank == 0  # once in the sum over ranks
        outer = {"dim": 1 if by_width else 0, "split": "even", "parts": (("gate", width), ("up", width)), "join": 1}
        inner = {"dim": 2 if by_width else 0, "split": "even", "join": 1}
        last = {"split": "whole" if by_width else "even", "join": 1}  # a bias, whose outputs are never cut

        def stacked(own: str, shape: tuple[int, ...], cut: dict[str, Any], bias: dict[str, Any]) -> StackedWeights:
            spec = ShardSpec(shape=shape[:2], **bias) if sizes.bias else None
            name = f"{info.name}.{own}"
            return StackedWeights(name, ShardSpec(shape=shape, **cut), spec, method=self.method, place=place)

        self.gate_up_proj: StackedWeights = stacked("gate_up_proj", (count, 2 * width, hidden), outer, outer)
        self.down_proj: StackedWeights = stacked("down_proj", (count, hidden, width), inner, last)

    @property
    def gate_up_bias(self) -> Tensor | None:
        return self.gate_up_proj.bias

    @property
    def down_bias(self) -> Tensor | None:
        return self.down_proj.bias if self._adds_down_bias else None

    def forward(
        self, x: Tensor, ids: Tensor, weights: Tensor, *, add: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        return self.method.apply(self, x, ids, weights, add=add, out=out)


def experts_info(name: str, sizes: ExpertsInfo, ranks: int, *, whole: bool, sources: tuple[str, ...] = ()) -> LayerInfo:
    """What the experts of a layer are to who chooses their method. whole: ranks have whole experts.

    Raises `ModelError` for sizes that cannot be, or cannot be divided over the ranks.
    """
    count, width = sizes.num_experts, sizes.intermediate_size
    for field in ("num_experts", "hidden_size", "intermediate_size"):
        if getattr(sizes, field) < 1:
            raise ModelError(f"{name}: {field} must be at least 1, not {getattr(sizes, field)}")
    if whole and count % ranks:
        raise ModelError(
            f"{name}: {count} experts cannot be divided over tensor_parallel_size={ranks} ranks; without "
            "engine.enable_expert_parallel each rank has a part of every expert"
        )
    if not whole and width % ranks:
        raise ModelError(
            f"{name}: experts of width {width} cannot be divided over tensor_parallel_size={ranks} ranks; "
            "with engine.enable_expert_parallel=true each rank has whole experts"
        )
    return LayerInfo(
        name=name,
        kind="experts",
        shape=(count, 2 * width, sizes.hidden_size),
        parts=(("gate", width), ("up", width), ("down", sizes.hidden_size)),
        parallel="experts" if whole else "width",
        sources=sources,
    )
