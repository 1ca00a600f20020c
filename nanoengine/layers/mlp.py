"""The gated MLP of Llama and its kin: down(silu(gate(x)) * up(x)), gate and up in one product."""

from __future__ import annotations

from torch import Tensor, nn

from nanoengine.api import BuildContext


class GatedMLP(nn.Module):
    """[T, hidden] -> [T, hidden]. `name` is its dotted path in the model."""

    def __init__(self, name: str, hidden: int, intermediate: int, ctx: BuildContext, *, bias: bool = False) -> None:
        super().__init__()
        self.ops = ctx.ops
        self.gate_up_proj = ctx.linear(
            f"{name}.gate_up_proj",
            hidden,
            2 * intermediate,
            bias=bias,
            parallel="column",
            parts=[("gate", intermediate), ("up", intermediate)],
        )
        self.down_proj = ctx.linear(f"{name}.down_proj", intermediate, hidden, bias=bias, parallel="row")

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(x)  # [T, 2 intermediate / ranks]
        out: Tensor = self.down_proj(self.ops.silu_and_mul(gate_up))
        return out
