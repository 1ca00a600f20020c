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
from nanoengine.layers.hf_config import Fields, shown

_ORIGINAL = "original_max_position_embeddings"

# What each type reads, beside the keys of all.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}
ROPE_TYPES = tuple(_KEYS)
_OF_ALL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_NEUTRAL = (("factor", 1.0), ("rope_type", "default"), ("type", "default"))


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


def read_rope(hf: Mapping[str, Any], theta: float = 10000.0) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).

    As in transformers, `rope_scaling` is used where both objects are given; a base that neither gives is `rope_theta`,
    or else `theta`; `original_max_position_embeddings` may stand beside the object, too. Raises `ModelError` as
    `rope_of` does, and where two places contradict each other.
    """
    whole = Fields(hf)
    parameters, scaling = whole.nested("rope_parameters"), whole.nested("rope_scaling")
    used = _with_outer(scaling if scaling.data else parameters, whole)
    found = rope_of(used, whole, "rope_theta", theta)
    if scaling.data:
        check_agreement(parameters, scaling, {**used.data, "rope_theta": found.theta}, found.kind)
    return found


def _with_outer(used: Fields, whole: Fields) -> Fields:
    """The object with the original context length that stands beside it (which types that do not ask leave unused)."""
    if not whole.has(_ORIGINAL):
        return used
    if used.has(_ORIGINAL) and used.get(_ORIGINAL) != whole.get(_ORIGINAL):
        raise contradiction(whole, _ORIGINAL, used, shown(used.get(_ORIGINAL)))
    return Fields({**used.data, _ORIGINAL: whole.get(_ORIGINAL)}, used.prefix)


def check_agreement(parameters: Fields, scaling: Fields, result: Mapping[str, Any], kind: str) -> None:
    """Of two objects that describe one rotation: raises `ModelError` where the first says what is not in the result.

    That it is the default rotation says nothing. `kind`: the result's type, under whichever name it was given.
    """
    result = {**result, "rope_type": kind, "type": kind}
    for name, value in parameters.data.items():
        if value is not None and (name, value) not in _NEUTRAL and value != result.get(name):
            raise contradiction(parameters, name, scaling, shown(result.get(name)))


def rope_of(used: Fields, whole: Fields, base: str, theta: float) -> RopeConfig:
    """The rotation that one object describes.

    Args:
        used: the object, possibly empty. whole: config.json. base: name of the field in `whole` that gives the base
            where the object does not. theta: the base where neither does.

    Raises `ModelError` for a type that is not supported, a key that the type does not read, and two bases.
    """
    names = used.choice("type", ROPE_TYPES, "default"), used.choice("rope_type", ROPE_TYPES, "default")
    kind = names[1] if "rope_type" in used.data else names[0]  # "type" is the name of older files
    if used.has("type") and names[0] != kind:
        raise contradiction(used, "type", used, f"rope_type {kind}")
    for name, value in used.data.items():
        _check_key(used, name, value, kind)
    if base in whole.data:
        theta = whole.float(base)
        if used.has("rope_theta") and used.float("rope_theta") != theta:
            raise contradiction(whole, base, used, f"rope_theta {shown(used.get('rope_theta'))}")
    if used.float("partial_rotary_factor", whole.float("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"config.json: {whole.prefix}partial_rotary_factor other than 1 is not supported")
    theta = used.float("rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=used.float("factor"))
    return _read_llama3(used, whole, theta)


def _read_llama3(used: Fields, whole: Fields, theta: float) -> RopeConfig:
    low, high = used.float("low_freq_factor"), used.float("high_freq_factor")
    if low >= high:
        raise used.wrong("high_freq_factor", high, f"above low_freq_factor, {low}")
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=used.float("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=used.int(_ORIGINAL, whole.get("max_position_embeddings")),
    )


def _check_key(used: Fields, name: str, value: Any, kind: str) -> None:
    """A key that the type does not read would be of another rotation than is meant."""
    idle = name == _ORIGINAL  # says where the scaling begins, for types that ask
    if value is None or idle or name in _OF_ALL or name in _KEYS[kind] or (name, value) in _NEUTRAL:
        return
    raise ModelError(
        f"config.json: {used.prefix}{name} = {shown(value)} means nothing to rope_type {kind}, which reads "
        f"{', '.join(('rope_theta', *_KEYS[kind]))}; rope types: {', '.join(ROPE_TYPES)}"
    )


def contradiction(one: Fields, name: str, other: Fields, said: str) -> ModelError:
    """The error to raise where two places of config.json differ: `name` in one of them, and what the other says."""
    return ModelError(
        f"config.json: {one.prefix}{name} {shown(one.get(name))} contradicts {said} of {other.prefix.rstrip('.')}: "
        "leave out one of them"
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
