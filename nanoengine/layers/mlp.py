"""MLPs: the gated one of Llama and similar models, and the plain one of GPT-2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from nanoengine.api import BuildContext, Norm
from nanoengine.kernels.activation import Activation
from nanoengine.layers.block import After, Sublayer, finished
from nanoengine.layers.linear import name_next_norm, normed

__all__ = ["MLP", "GatedMLP", "PlainActivation"]

PlainActivation = Literal["silu", "gelu_tanh", "gelu", "relu"]
"""The activation of an MLP without a gate; the first two are also of gates (`Activation`)."""

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class GatedMLP(Sublayer):
    """down(activation(gate(x)) * up(x)), gate and up in one product. `name` is its dotted path in the model.

    reduce: False: each rank returns its own part of the sum, see `BuildContext.linear`.
    """

    def __init__(
        self,
        name: str,
        hidden: int,
        intermediate: int,
        ctx: BuildContext,
        *,
        bias: bool = False,
        activation: Activation = "silu",
        reduce: bool = True,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.ops = ctx.ops
        self.gate_up_proj = ctx.linear(
            f"{name}.gate_up_proj",
            hidden,
            2 * intermediate,
            bias=bias,
            parallel="column",
            parts=[("gate", intermediate), ("up", intermediate)],
        )
        self.down_proj = ctx.linear(f"{name}.down_proj", intermediate, hidden, bias=bias, parallel="row", reduce=reduce)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down_proj(self.ops.act_and_mul(self.gate_up_proj(hidden), self.activation))

    def joined(
        self, norm: Norm | None, x: Tensor, residual: Tensor | None, *rest: Any, after: After | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if norm is None:
            return super().joined(norm, x, residual, after=after)
        gated, stream = normed(self.gate_up_proj, norm, x, residual, gate=self.activation)  # [T, inter. / ranks]
        return finished(self.down_proj, gated, stream, after)

    def name_next_norm(self, norm: Norm) -> None:
        name_next_norm(self.down_proj, norm)


class MLP(Sublayer):
    """down(activation(up(x))). `name` is its dotted path in the model."""

    def __init__(
        self,
        name: str,
        hidden: int,
        intermediate: int,
        ctx: BuildContext,
        *,
        bias: bool = False,
        activation: PlainActivation = "gelu_tanh",
    ) -> None:
        super().__init__()
        self.activate = _FUNCTIONS[activation]
        self.up_proj = ctx.linear(f"{name}.up_proj", hidden, intermediate, bias=bias, parallel="column")
        self.down_proj = ctx.linear(f"{name}.down_proj", intermediate, hidden, bias=bias, parallel="row")

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        up = self.up_proj(hidden)  # [T, intermediate / ranks]
        return self.down_proj(self.activate(up))

    def joined(
        self, norm: Norm | None, x: Tensor, residual: Tensor | None, *rest: Any, after: After | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if norm is None:
            return super().joined(norm, x, residual, after=after)
        up, stream = normed(self.up_proj, norm, x, residual)
        return finished(self.down_proj, self.activate(up), stream, after)

    def name_next_norm(self, norm: Norm) -> None:
        name_next_norm(self.down_proj, norm)
