"""The gated MLP of Llama and its kin: down(activation(gate(x)) * up(x)), gate and up in one product."""

from __future__ import annotations

from torch import Tensor, nn

from nanoengine.api import BuildContext
from nanoengine.kernels.activation import Activation
from nanoengine.layers.linear import added, normed
from nanoengine.layers.norm import RMSNorm


class GatedMLP(nn.Module):
    """The MLP between its norm and the residual stream. `name` is its dotted path in the model."""

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
        """x and the residual stream it is to be added to (None: it is the stream), [T, hidden] -> the same again.

        `post_norm` normalises the result before it joins the stream.
        """
        gated, residual = normed(self.gate_up_proj, norm, x, residual, gate=self.activation)  # [T, inter. / ranks]
        return added(self.down_proj, gated, residual, post_norm)
