"""The random bits of the draw, in plain torch. Integer arithmetic throughout: the same bits on every device.

A row's key comes from Philox4x32-10, once; a token's noise bits come from that key and the token's global id by a
32-bit mix, once a vocabulary entry. Hence the noise of a token depends on (seed, sample index, position, id) and on
nothing else: not on the batch, the slot, the rank, or which other tokens are looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
DOMAIN_DRAW = 0x64726177
"""Fourth counter word of the token draw ("draw"). Another use of the same seed takes another word."""

# Multipliers and Weyl increments of Philox4x32: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
# 1, 2, 3", SC 2011.
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# The 32-bit finaliser of MurmurHash3 (Appleby), with the second key word put in between its two multiplications.
_MIX_A, _MIX_B = 0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. Four counter words and two key words, each int64 holding 0 .. 2**32 - 1 -> four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of two words may pass 2**63 and wrap to a negative int64; its 64 bits are right all the same,
        # and masking after the (arithmetic) shift takes the copies of the sign away.
        product0, product1 = c0 * _M0, c2 * _M1
        high0, high1 = (product0 >> 32) & WORD, (product1 >> 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & WORD, high0 ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + _W0) & WORD, (k1 + _W1) & WORD
    return c0, c1, c2, c3


def draw_keys(seeds: Tensor, positions: Tensor, sample_index: Tensor) -> Tensor:
    """The key of each row's draw.

    Args:
        seeds: int64 [R]. positions: int64 [R]; absolute position of the token to be drawn. sample_index: int64 [R].

    Returns:
        int32 [R, 2]: the bits of the first two words of Philox4x32-10 with key (seed low, seed high) and counter
        (position low, position high, sample index, `DOMAIN_DRAW`).
    """
    counter = (positions & WORD, (positions >> 32) & WORD, sample_index & WORD, torch.full_like(positions, DOMAIN_DRAW))
    first, second, _, _ = philox4x32(counter, (seeds & WORD, (seeds >> 32) & WORD))
    return torch.stack((_as_int32(first), _as_int32(second)), dim=-1)


def noise_bits(keys: Tensor, ids: Tensor) -> Tensor:
    """32 noise bits of each token: a bijection of the id, picked by the key.

    Args:
        keys: int32 [R, 2], from `draw_keys`.
        ids: int32 [V] or [R, V]; *global* vocabulary ids.

    Returns:
        int32 [R, V], to be read as unsigned.
    """
    h = ids ^ keys[:, :1]
    shifted = torch.empty_like(h)
    _xor_shift_(h, 16, shifted)
    h.mul_(_MIX_A).bitwise_xor_(keys[:, 1:])
    _xor_shift_(h, 13, shifted)
    h.mul_(_MIX_B)
    _xor_shift_(h, 16, shifted)
    return h


def uniform(bits: Tensor) -> Tensor:
    """int32 bits, read as unsigned -> float32 in [2**-33, 1 - 2**-24]: bits * 2**-32, rounded once.

    The conversion keeps 24 significant bits, so that small values, which make the largest noise, stay finely spaced.
    """
    return bits.view(torch.uint32).to(torch.float32).mul_(2.0**-32).clamp_(2.0**-33, 1 - 2.0**-24)


def log_exponential(bits: Tensor) -> Tensor:
    """log(-log1p(-u)), float32: the Gumbel noise of `bits` with its sign turned (so that it can be subtracted)."""
    return uniform(bits).neg_().log1p_().neg_().log_()


def _as_int32(word: Tensor) -> Tensor:
    """int64 holding 0 .. 2**32 - 1 -> int32 of the same bits."""
    return (word - ((word >> 31) << 32)).to(torch.int32)


def _xor_shift_(h: Tensor, bits: int, scratch: Tensor) -> None:
    """h ^= h >> bits, the shift filling with zeros (torch's fills with the sign)."""
    torch.bitwise_right_shift(h, bits, out=scratch)
    h.bitwise_xor_(scratch.bitwise_and_((1 << (32 - bits)) - 1))
