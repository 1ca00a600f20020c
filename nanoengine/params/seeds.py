"""The seed of a request that has none of its own."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def request_seed(engine_seed: int, ordinal: int) -> int:
    """A signed 64-bit seed from the engine's seed and the request's ordinal (splitmix64, Steele et al. 2014)."""
    z = (engine_seed + (ordinal + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z
