"""Rotations as values: the frequencies of each kind of scaling (`KINDS`), and what config.json says of one
(`RopeConfig`). Names and formulas are those of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoengine.api import ModelError

__all__ = ["Rope", "RopeConfig"]

ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """A rotation of queries and keys.

    Attributes:
        frequencies: radians per position of each rotated pair, as float32 holds them. () rotates nothing.
        magnitude: factor of what is rotated.
        interleaved: pairs are neighbours, (0, 1), (2, 3) ...; else the halves of what is rotated, (0, n / 2) ...
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0
    interleaved: bool = False

    @property
    def width(self) -> int:
        """How many of a head's first elements are rotated. The others stay as they are."""
        return 2 * len(self.frequencies)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """What config.json says of a rotation.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: a key of `KINDS`.
        partial: the share of a head that is rotated, its first elements. width: their number instead, if not 0.
        interleaved: as of `Rope`.
        max_position: `max_position_embeddings`, where the kind reads it.
        factor, low_freq_factor, high_freq_factor, original_max_position, attention_factor, beta_fast, beta_slow,
            mscale, mscale_all_dim, truncate, short_factor, long_factor: parameters of the kinds that read them.
    """

    theta: float
    kind: str = "default"
    partial: float = 1.0
    width: int = 0
    interleaved: bool = False
    max_position: int = 0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def rope(self, head_size: int, max_model_len: int = 0) -> Rope:
        """The rotation of heads of this size in an engine whose requests have at most `max_model_len` tokens.

        Raises `ModelError` for a size that cannot be rotated.
        """
        width = self.width or int(head_size * self.partial)
        if width % 2 or width < 2:
            part = "" if width == head_size else f", of which {width} are rotated (head_dim, partial_rotary_factor)"
            raise ModelError(f"rotary embedding needs an even head size, not {head_size}{part}")
        try:
            frequencies, magnitude = KINDS[self.kind].frequencies(self, width, max_model_len)
        except ArithmeticError as error:
            raise ModelError(f"config.json: the numbers of rope_type {self.kind} have no result: {error}") from error
        if not math.isfinite(magnitude) or not frequencies.isfinite().all():
            raise ModelError(f"config.json: the numbers of rope_type {self.kind} give rotations that are not finite")
        return Rope(frequencies=tuple(frequencies.tolist()), magnitude=magnitude, interleaved=self.interleaved)

    @property
    def score_factor(self) -> float:
        """Factor of attention scores, beside that of the head size: the square of yarn's magnitude by `mscale_all_dim`.
        DeepSeek's models have it (`LatentAttention`); others have the magnitude alone."""
        return _grown(self.factor, self.mscale_all_dim) ** 2

    def limit(self, max_position: int) -> int:
        """The most positions that the scaled rotation is made for, of `max_position_embeddings` in the file."""
        return max(max_position, KINDS[self.kind].limit(self, max_position))


Frequencies = Callable[[RopeConfig, int, int], tuple[Tensor, float]]
"""(config, rotated width, max_model_len) -> float32 [width / 2] on the CPU, and the magnitude."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of scaling.

    Attributes:
        reads: the keys of config.json that it reads, in addition to those of all kinds.
        frequencies: see `Frequencies`. limit: positions that it is made for, from `max_position_embeddings`.
    """

    reads: tuple[str, ...]
    frequencies: Frequencies
    limit: Callable[[RopeConfig, int], int] = lambda config, max_position: max_position


def inverse_frequencies(config: RopeConfig, head_size: int, device: torch.device, max_model_len: int = 0) -> Tensor:
    """float32 [rotated / 2]: radians per position of each rotated pair.

    They are computed on the CPU, so that they have the same bits on every device. On the meta device, `arange` would
    import sympy, which takes one or two seconds.
    """
    return torch.tensor(config.rope(head_size, max_model_len).frequencies, dtype=torch.float32).to(device)


def _series(theta: float, width: int) -> Tensor:
    """theta ** (2 i / width), float32 [width / 2]."""
    return theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)


def _default(config: RopeConfig, width: int, max_model_len: int) -> tuple[Tensor, float]:
    return 1.0 / _series(config.theta, width), 1.0


def _linear(config: RopeConfig, width: int, max_model_len: int) -> tuple[Tensor, float]:
    """Positions are divided by `factor`."""
    return 1.0 / _series(config.theta, width) / config.factor, 1.0


def _dynamic(config: RopeConfig, width: int, max_model_len: int) -> tuple[Tensor, float]:
    """The base grows with the longest sequence, here that of the engine: cached keys keep their rotation."""
    length = max(max_model_len, config.max_position)
    grown = config.factor * length / config.max_position - (config.factor - 1)
    return 1.0 / _series(config.theta * grown ** (width / (width - 2)), width), 1.0


def _yarn(config: RopeConfig, width: int, max_model_len: int) -> tuple[Tensor, float]:
    """Peng et al., 2023: high frequencies stay, low ones are divided by `factor`, in between the two are blended."""

    def dimension(turns: float) -> float:
        """Where in the series a pair makes so many turns over the original length."""
        ratio = config.original_max_position / (turns * 2 * math.pi)
        return width * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    divided = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    series = _series(config.theta, width)
    frequencies = divided / (config.factor * series) + (1 - divided) / series
    return frequencies, _yarn_magnitude(config)


def _grown(factor: float, scale: float) -> float:
    """Yarn's magnitude of a context that is `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn_magnitude(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _grown(config.factor, config.mscale) / _grown(config.factor, config.mscale_all_dim)
    return _grown(config.factor, 1.0)


def _longrope(config: RopeConfig, width: int, max_model_len: int) -> tuple[Tensor, float]:
    """Ding et al., 2024: each wavelength has a factor of its own, others for sequences beyond the original length.

    transformers chooses by the length of each sequence. Here it is the engine's longest: cached keys keep their
    rotation.
    """
    original = config.original_max_position
    long = max_model_len > original
    factors = config.long_factor if long else config.short_factor
    if len(factors) != width // 2:
        name = "long_factor" if long else "short_factor"
        raise ModelError(
            f"config.json: {name} of rope_type longrope has {len(factors)} numbers; {width} rotated elements need "
            f"{width // 2}"
        )
    magnitude = config.attention_factor
    if magnitude is None:
        factor = config.factor
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _series(config.theta, width)), magnitude


def _llama3(config: RopeConfig, width: int, max_model_len: int) -> tuple[Tensor, float]:
    """The scaling of Llama 3.1.

    Wavelengths above original / low are multiplied by `factor`; those below original / high do not change. Between
    them, the two are interpolated linearly in original / wavelength.
    """
    plain = 1.0 / _series(config.theta, width)
    turns = config.original_max_position * plain / (2 * math.pi)  # in the original context length
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return blend * plain + (1 - blend) * plain / config.factor, 1.0


def _extended(config: RopeConfig, max_position: int) -> int:
    return round(config.original_max_position * config.factor)


KINDS: Mapping[str, Kind] = {
    "default": Kind((), _default),
    "linear": Kind(("factor",), _linear),
    "dynamic": Kind(("factor",), _dynamic, lambda config, max_position: round(max_position * config.factor)),
    "yarn": Kind(
        ("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        _yarn,
        _extended,
    ),
    "longrope": Kind(("short_factor", "long_factor", "factor", ORIGINAL, "attention_factor"), _longrope),
    "llama3": Kind(("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), _llama3),
}
