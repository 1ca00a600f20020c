"""The draw's random bits in Triton, bit for bit those of `philox`; and its noise, exact and in haste.

Device functions (`draw_key`, `token_bits`, `log_exponential`, `noise_log2`) for kernels to call, and `draw_keys` and
`noise_bits`, which run them over tensors as their namesakes in `philox` do.
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import libdevice

from nanoengine.kernels import philox

NATIVE: bool = not knobs.runtime.interpret
"""Compiled, not interpreted: the device's own log1p, log and exp are there, which are those of torch."""

_M0, _M1 = tl.constexpr(philox._M0), tl.constexpr(philox._M1)
_W0, _W1 = tl.constexpr(philox._W0), tl.constexpr(philox._W1)
_DOMAIN = tl.constexpr(philox.DOMAIN_DRAW)
_MIX_A, _MIX_B = tl.constexpr(philox._MIX_A & philox.WORD), tl.constexpr(philox._MIX_B & philox.WORD)
_PER_LN2 = tl.constexpr(1.4426950408889634)
_TINY = tl.constexpr(2.0**20)
_BELOW_ONE = tl.constexpr(2.0**-32 * (1 - 2.0**-23))
HASTE = 0.11
"""Bound of the error of `noise_log2`. It errs to this side only where u is next to 1, else by less than 0.002."""


@triton.jit
def draw_key(seed, position, sample_index):
    """Key words (uint32, uint32) of a draw; arguments int64, scalars or blocks."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2 = position.to(tl.uint32), (position >> 32).to(tl.uint32), sample_index.to(tl.uint32)
    c3 = c0 * 0 + _DOMAIN
    m0, m1 = (c0 * 0 + _M0).to(tl.uint32), (c0 * 0 + _M1).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        low0, low1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1


@triton.jit
def token_bits(key0, key1, ids):
    """uint32 noise bits of the global vocabulary ids (int32 block) under a key."""
    return mix_bits(ids.to(tl.uint32) ^ key0, key1)


@triton.jit
def mix_bits(h, key1):
    """`token_bits` of h = id ^ key0, for ids that are cheaper made with the key in them."""
    h = (h ^ (h >> 16)) * _MIX_A
    # (h ^ key1) ^ ((h ^ key1) >> 13), the key's part of it being the same for all
    h = (h ^ (h >> 13) ^ (key1 ^ (key1 >> 13))) * _MIX_B
    return h ^ (h >> 16)


@triton.jit
def log_exponential(bits, NATIVE: tl.constexpr):
    """log(-log1p(-u)) of uint32 bits, float32, as `philox.log_exponential`."""
    u = tl.minimum(tl.maximum(bits.to(tl.float32) * 2.0**-32, 2.0**-33), 1 - 2.0**-24)
    if NATIVE:
        return libdevice.log(-libdevice.log1p(-u))
    rest = 1.0 - u  # rounded; log1p(-u) = log(rest) * u / (1 - rest) takes the rounding out again
    rounded = 1.0 - rest
    return tl.log(tl.where(rounded == 0, u, -tl.log(rest) * (u / tl.where(rounded == 0, 1.0, rounded))))


@triton.jit
def noise_log2(bits, NATIVE: tl.constexpr):
    """log2(-log1p(-u)) - log2(ln 2) at two look-ups of the device's log table, wrong by less than `HASTE`.

    -log2(1 - u) loses its leading digits where u is small; there -log1p(-u) is u. The upper clamp is left out and u = 1
    kept away from by 2**-23 instead, which makes the largest error.
    """
    f = tl.maximum(bits.to(tl.float32), 0.5)
    rest = 1.0 - f * _BELOW_ONE
    small = f * (2.0**-32 * _PER_LN2)
    if NATIVE:
        return libdevice.fast_log2f(tl.where(f < _TINY, small, -libdevice.fast_log2f(rest)))
    return tl.log2(tl.where(f < _TINY, small, -tl.log2(rest)))


@triton.jit
def _draw_keys_kernel(seeds, positions, sample_index, out, rows, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = r < rows
    key0, key1 = draw_key(
        tl.load(seeds + r, here, 0), tl.load(positions + r, here, 0), tl.load(sample_index + r, here, 0)
    )
    tl.store(out + 2 * r, key0.to(tl.int32, bitcast=True), here)
    tl.store(out + 2 * r + 1, key1.to(tl.int32, bitcast=True), here)


@triton.jit
def _noise_bits_kernel(keys, ids, ids_stride, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    key0 = tl.load(keys + 2 * row).to(tl.uint32, bitcast=True)
    key1 = tl.load(keys + 2 * row + 1).to(tl.uint32, bitcast=True)
    bits = token_bits(key0, key1, tl.load(ids + row * ids_stride + column, here, 0))
    tl.store(out + row * width + column, bits.to(tl.int32, bitcast=True), here)


def draw_keys(seeds: Tensor, positions: Tensor, sample_index: Tensor) -> Tensor:
    """`philox.draw_keys`: int64 [R] each -> int32 [R, 2]."""
    out = torch.empty((len(seeds), 2), dtype=torch.int32, device=seeds.device)
    if len(seeds):
        _draw_keys_kernel[(triton.cdiv(len(seeds), 128),)](seeds, positions, sample_index, out, len(seeds), BLOCK=128)
    return out


def noise_bits(keys: Tensor, ids: Tensor) -> Tensor:
    """`philox.noise_bits`: int32 [R, 2] contiguous, int32 [V] or [R, V] contiguous -> int32 [R, V]."""
    rows, width = len(keys), ids.shape[-1]
    out = torch.empty((rows, width), dtype=torch.int32, device=keys.device)
    if rows and width:
        grid = (triton.cdiv(width, 1024), rows)
        _noise_bits_kernel[grid](keys, ids, width if ids.dim() == 2 else 0, out, width, BLOCK=1024)
    return out
