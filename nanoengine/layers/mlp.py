"""The gated MLP of Llama and similar models: down(activation(gate(x)) * up(x)), gate and up in one product."""

from __future__ import annotations

from torch import Tensor, nn

from nanoengine.api import BuildContext
from nanoengine.kernels.activation import Activation
from nanoengine.layers.linear import added, normed
from nanoengine.layers.norm import RMSNorm


class GatedMLP(nn.Module):
    """The MLP with the norm before it. `name` is its dotted path in the model."""

    def __init__(
        self,
        name: str,
        hidden: int,
        intermediate: int,
        ctx: BuildContext,
        *,
        bias: bool = False,
        activation: Activation = "silu",
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_up_proj = ctx.linear(
            f"{name}.gate_up_proj",
            hidden,
            2 * intermediate,
            bias=bias,
            parallel="column",
            parts=[("gate", intermediate), ("up", intermediate)],
        )
        self.down_proj = ctx.linear(f"{name}.down_proj", intermediate, hidden, bias=bias, parallel="row")

    def forward(
        self, norm: RMSNorm, x: Tensor, residual: Tensor | None, post_norm: RMSNorm | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[T, hidden] -> [T, hidden]: (x, residual stream) -> (result, residual stream).

        x and the result still have to be added to the residual stream; if the stream is None, x is the stream.
        `post_norm` normalises the result before it is added.
        """
        gated, residual = normed(self.gate_up_proj, norm, x, residual, gate=self.activation)  # [T, inter. / ranks]
        return added(self.down_proj, gated, residual, post_norm)
