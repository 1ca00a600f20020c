"""Rotary position embedding (Su et al., 2021), in the half-split form of Llama and its kin, with its scalings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.api import ModelError
from nanoengine.layers.hf_config import Fields

ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary frequencies.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: "default"; "linear": positions divided by `factor`; "llama3": long wavelengths divided by `factor`.
        factor, low_freq_factor, high_freq_factor, original_max_position: of the scalings.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


def read_rope(hf: Mapping[str, Any]) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).

    Raises `ModelError` if neither gives a theta, if both do and differ, or if the type is not served.
    """
    whole, new, old = Fields(hf), hf.get("rope_parameters"), hf.get("rope_theta")
    if new is None and old is None:
        raise ModelError("config.json has neither rope_parameters.rope_theta nor rope_theta: there is no safe default")
    if new is None:
        scaling = Fields(hf.get("rope_scaling") or {}, "rope_scaling.").data
        fields = Fields({**scaling, "rope_theta": whole.float("rope_theta")}, "rope_scaling.")
    else:
        fields = Fields(new, "rope_parameters.")
        if old is not None and fields.float("rope_theta") != whole.float("rope_theta"):
            raise ModelError(
                f"config.json: rope_theta {old} contradicts rope_parameters.rope_theta {new['rope_theta']}"
            )
    if fields.float("partial_rotary_factor", whole.float("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("config.json: partial_rotary_factor other than 1 is not served")
    # "type" is the name of older files
    kind = fields.choice("rope_type" if "rope_type" in fields.data else "type", ROPE_TYPES, "default")
    theta = fields.float("rope_theta")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=fields.float("factor"))
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=fields.float("factor"),
        low_freq_factor=fields.float("low_freq_factor"),
        high_freq_factor=fields.float("high_freq_factor"),
        original_max_position=fields.int("original_max_position_embeddings"),
    )


def inverse_frequencies(config: RopeConfig, head_size: int, device: torch.device) -> Tensor:
    """float32 [head_size / 2]: radians per position of each rotated pair.

    They are computed on the CPU: the same bits for every device, and no second or two at start, which torch takes to
    import sympy for `arange` on the meta device.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    found = 1.0 / (config.theta**exponents)
    if config.kind == "linear":
        found = found / config.factor
    if config.kind == "llama3":
        found = _llama3(found, config)
    return found.to(device)


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: wavelengths beyond original / low are stretched by `factor`, those below original / high are kept,
    and between them the two are blended linearly in original / wavelength."""
    turns = config.original_max_position * plain / (2 * math.pi)  # over the original context
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return blend * plain + (1 - blend) * plain / config.factor


class RotaryEmbedding(nn.Module):
    """Angles of a step's positions, computed once and shared by all layers."""

    def __init__(self, config: RopeConfig, head_size: int, device: torch.device) -> None:
        super().__init__()
        if head_size % 2:
            raise ModelError(f"rotary embedding needs an even head size, not {head_size}")
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inverse_frequencies(config, head_size, device), persistent=False)

    def forward(self, positions: Tensor) -> Angles:
        """int64 [T]."""
        return Angles(positions, self.inv_freq)


class Angles:
    """A step's rotations. Layers that do not rotate by themselves share one table, made when first asked for."""

    def __init__(self, positions: Tensor, inv_freq: Tensor) -> None:
        self.positions, self.inv_freq = positions, inv_freq

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos, sin, float32 [T, 1, head_size]; sin is negative in its first half, see `apply_rope`."""
        angles = self.positions.float().unsqueeze(-1) * self.inv_freq  # [T, head_size / 2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [T, heads, head_size]: (a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b. In float32."""
    swapped = x.view(*x.shape[:-1], 2, -1).flip(-2).view(x.shape)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
