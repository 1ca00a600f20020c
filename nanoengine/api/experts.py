"""The experts of a layer: what they are, a method that stores and applies them, and which tokens are real."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from nanoengine.api.layers import LayerInfo, WeightLayer
from nanoengine.api.sharding import Shard, ShardSpec
from nanoengine.kernels.ops import Activation, RealTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsInfo:
    """What the experts of a layer are: each is a gated MLP, down(activation(gate(x)) * up(x)).

    Attributes:
        num_experts, hidden_size: as usual. intermediate_size: of one expert.
        activation: of the gate. bias: gate, up and down have one.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False


class RunningStep:
    """What layers may know of the step that runs. The engine fills it in before the first step.

    Attributes:
        real: which of the step's tokens are real; captured steps are padded with others. None: all are real.
    """

    real: RealTokens | None = None


class ExpertsMethod(ABC):
    """How experts store their weights, load slices of a checkpoint, and are applied. One instance per layer.

    It serves two layers of stacked weights: `gate_up_proj` [experts, 2 * intermediate, hidden], with the parts "gate"
    and "up", and `down_proj` [experts, hidden, intermediate].

    Attributes:
        label: what the weights are, as in `LinearMethod`.
    """

    label: str = ""

    @abstractmethod
    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        """Register the parameters that store the weight described by `weight`. Called for `gate_up_proj` first."""

    @abstractmethod
    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        """Load `values`, this rank's slice of a checkpoint tensor, into the parameter `name`."""

    def finish(self, layer: WeightLayer) -> None:  # noqa: B027 - most have nothing to do
        """Called once for each of both after all parameters were loaded, e.g. to repack or transpose them."""

    @abstractmethod
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
        """`Experts.forward`."""


class Experts(nn.Module, ABC):
    """What `ctx.experts` returns. What wraps it has the same `forward`.

    Attributes:
        info: name, shapes and checkpoint sources. sizes: what the experts are.
        first: the number of this rank's first expert.
        gate_up_proj, down_proj: the stacked weights.
    """

    info: LayerInfo
    sizes: ExpertsInfo
    first: int
    gate_up_proj: WeightLayer
    down_proj: WeightLayer

    @property
    @abstractmethod
    def gate_up_bias(self) -> Tensor | None:
        """[experts, outputs] of this rank; None: there is none."""

    @property
    @abstractmethod
    def down_bias(self) -> Tensor | None:
        """[experts, hidden] that this rank adds; None: there is none, or another rank adds it."""

    @abstractmethod
    def forward(
        self, x: Tensor, ids: Tensor, weights: Tensor, *, add: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of each token's experts, [T, hidden] -> [T, hidden]. With several ranks it is this rank's
        part of the sum, which the caller hands to `tp.all_reduce`.

        Args:
            ids: int32 [T, k], each token's experts; one that does not exist adds nothing. weights: float32 [T, k].
            add: [T, hidden], added to the result. out: the tensor that receives it.
        """
