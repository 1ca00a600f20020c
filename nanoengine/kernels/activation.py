"""Pointwise functions of layers in plain torch: the reference of `activation_triton`."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu_tanh", "swiglu_clamped"]
"""What a gate goes through: x * sigmoid(x), or the tanh approximation of GELU (Hendrycks and Gimpel, 2016).

"swiglu_clamped" (GPT-OSS): x * sigmoid(1.702 x) with x at most 7; what it gates is clamped to 7 either way, plus one.
"""


def act_and_mul(gate_up: Tensor, activation: Activation = "silu") -> Tensor:
    """[T, 2 I], gate in the first half -> activation(gate) * up, [T, I], in float32 and rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1.0
        return (gate * torch.sigmoid(1.702 * gate) * up).to(gate_up.dtype)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (active * up).to(gate_up.dtype)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in float32, rounded once; -inf stays (masked and padding columns)."""
    capped = torch.tanh(logits.float() / cap).mul_(cap).to(logits.dtype)
    return torch.where(logits == float("-inf"), logits, capped)
