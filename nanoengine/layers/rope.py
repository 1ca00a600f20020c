"""Rotary position embedding (Su et al., 2021), in the half-split form of Llama and similar models, with scalings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.api import ModelError, Rotation
from nanoengine.layers.hf_config import Fields, shown

_ORIGINAL = "original_max_position_embeddings"

# The keys that each type reads, in addition to those that all types read.
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
        factor, low_freq_factor, high_freq_factor, original_max_position: parameters of the scalings.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


def read_rope(hf: Mapping[str, Any], theta: float = 10000.0) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4).

    As in transformers: if both objects are given, `rope_scaling` is used. If neither has the base, it is `rope_theta`,
    else `theta`. `original_max_position_embeddings` may also be next to the object. Raises `ModelError` as `rope_of`
    does, and if two places contradict each other.
    """
    whole = Fields(hf)
    parameters, scaling = whole.nested("rope_parameters"), whole.nested("rope_scaling")
    used = _with_outer(scaling if scaling.data else parameters, whole)
    found = rope_of(used, whole, "rope_theta", theta)
    if scaling.data:
        check_agreement(parameters, scaling, {**used.data, "rope_theta": found.theta}, found.kind)
    return found


def _with_outer(used: Fields, whole: Fields) -> Fields:
    """The object, with the original context length that is next to it. Types that do not need it ignore it."""
    if not whole.has(_ORIGINAL):
        return used
    if used.has(_ORIGINAL) and used.get(_ORIGINAL) != whole.get(_ORIGINAL):
        raise contradiction(whole, _ORIGINAL, used, shown(used.get(_ORIGINAL)))
    return Fields({**used.data, _ORIGINAL: whole.get(_ORIGINAL)}, used.prefix)


def check_agreement(parameters: Fields, scaling: Fields, result: Mapping[str, Any], kind: str) -> None:
    """Checks two objects that describe one rotation. Raises `ModelError` if `parameters` contradicts `result`.

    The type "default" in `parameters` contradicts nothing. `kind`: the type in the result, given as "type" or
    "rope_type".
    """
    result = {**result, "rope_type": kind, "type": kind}
    for name, value in parameters.data.items():
        if value is not None and (name, value) not in _NEUTRAL and value != result.get(name):
            raise contradiction(parameters, name, scaling, shown(result.get(name)))


def rope_of(used: Fields, whole: Fields, base: str, theta: float) -> RopeConfig:
    """The rotation that one object describes.

    Args:
        used: the object; may be empty. whole: config.json.
        base: name of the field in `whole` that has the base, if the object has none.
        theta: the base if neither has one.

    Raises `ModelError` for a type that is not supported, a key that the type does not read, and two different bases.
    """
    names = used.choice("type", ROPE_TYPES, "default"), used.choice("rope_type", ROPE_TYPES, "default")
    kind = names[1] if "rope_type" in used.data else names[0]  # older files use "type"
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
    """Raises `ModelError` for a key that the type does not read: the file probably means another type."""
    idle = name == _ORIGINAL  # types that do not need it ignore it
    if value is None or idle or name in _OF_ALL or name in _KEYS[kind] or (name, value) in _NEUTRAL:
        return
    raise ModelError(
        f"config.json: {used.prefix}{name} = {shown(value)} is not a key of rope_type {kind}, which reads "
        f"{', '.join(('rope_theta', *_KEYS[kind]))}; rope types: {', '.join(ROPE_TYPES)}"
    )


def contradiction(one: Fields, name: str, other: Fields, value: str) -> ModelError:
    """The error for two places of config.json that differ: `name` in `one`, and `value` in `other`."""
    return ModelError(
        f"config.json: {one.prefix}{name} {shown(one.get(name))} contradicts {value} of {other.prefix.rstrip('.')}: "
        "leave out one of them"
    )


def inverse_frequencies(config: RopeConfig, head_size: int, device: torch.device) -> Tensor:
    """float32 [head_size / 2]: radians per position of each rotated pair.

    They are computed on the CPU, so that they have the same bits on every device. On the meta device, `arange` would
    import sympy, which takes one or two seconds.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    found = 1.0 / (config.theta**exponents)
    if config.kind == "linear":
        found = found / config.factor
    if config.kind == "llama3":
        found = _llama3(found, config)
    return found.to(device)


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    """The scaling of Llama 3.1.

    Wavelengths above original / low are multiplied by `factor`; those below original / high do not change. Between
    them, the two are interpolated linearly in original / wavelength.
    """
    turns = config.original_max_position * plain / (2 * math.pi)  # in the original context length
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return blend * plain + (1 - blend) * plain / config.factor


class RotaryEmbedding(nn.Module):
    """Computes the angles of a step's positions once for all layers."""

    def __init__(self, config: RopeConfig, head_size: int, device: torch.device) -> None:
        super().__init__()
        if head_size % 2:
            raise ModelError(f"rotary embedding needs an even head size, not {head_size}")
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inverse_frequencies(config, head_size, device), persistent=False)

    def forward(self, positions: Tensor) -> Angles:
        """positions int64 [T] -> their rotations."""
        return Angles(positions, self.inv_freq)


class Angles:
    """A step's rotations. Layers without a fused kernel share one table, which is made when it is first used."""

    def __init__(self, positions: Tensor, inv_freq: Tensor) -> None:
        self.positions, self.inv_freq = positions, inv_freq
        self.rotation = Rotation(inv_freq=inv_freq)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [T, 1, head_size]; sin is negative in its first half, see `apply_rope`."""
        angles = self.positions.float().unsqueeze(-1) * self.inv_freq  # [T, head_size / 2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [T, heads, head_size]: (a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b. In float32."""
    swapped = x.view(*x.shape[:-1], 2, -1).flip(-2).view(x.shape)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
