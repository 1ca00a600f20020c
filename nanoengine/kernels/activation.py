"""Gated activation in plain torch: the reference of `activation_triton`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 I], gate in the first half -> silu(gate) * up, [T, I], in float32 and rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
