"""The blocks of a GGUF file, decoded in registers: one small function for each type.

Kernels read a row in planes: the same bytes as its blocks, but first the codes of all of them, then their other fields.
In blocks of 18 or 210 bytes no thread could load more than two at once.

A tile is [N, U, 16]: rows of the weight, units along them, lanes. A unit is 32 weights: the low halves of 16 bytes and
the high ones (of Q8_0 two runs of 16 bytes). So each of the two results of `decode` is of 16 consecutive weights, whose
scale is one, and x is read by wide loads.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.gguf import BLOCK_TYPES

PLANES = {
    "Q4_0": ((2, 18), (0, 2)),
    "Q4_1": ((4, 20), (0, 4)),
    "Q5_0": ((6, 22), (2, 6), (0, 2)),
    "Q5_1": ((8, 24), (4, 8), (0, 4)),
    "Q8_0": ((2, 34), (0, 2)),
    "Q4_K": ((16, 144), (0, 16)),
    "Q5_K": ((48, 176), (16, 48), (0, 16)),
    "Q6_K": ((0, 128), (128, 192), (192, 208), (208, 210)),
}
"""Bytes of a block, from and to, that are in each plane of a row: codes, further bits of them, scales."""


def planar(blocks: Tensor, kind: str) -> Tensor:
    """The rows in planes: uint8 [..., bytes of a row], of the same shape."""
    size = BLOCK_TYPES[kind].size
    fields = blocks.reshape(-1, blocks.shape[-1] // size, size)
    rows = [fields[:, :, start:stop].reshape(len(fields), -1) for start, stop in PLANES[kind]]
    return torch.cat(rows, dim=1).view(blocks.shape)


@triton.jit
def weight_index(units, lanes, KIND: tl.constexpr):
    """(weight of a row that is a lane's low one, distance to its high one): units [U, 1], lanes [1, 16]."""
    if KIND == "Q6_K":
        return units // 4 * 128 + units % 4 * 16 + lanes, 64
    elif (KIND == "Q4_K") or (KIND == "Q5_K"):
        return units // 2 * 64 + units % 2 * 16 + lanes, 32
    else:
        return units * 32 + lanes, 16


@triton.jit
def decode(rows, units, lanes, mask, UNITS: tl.constexpr, KIND: tl.constexpr):
    """Rows: uint8 pointers [N, 1, 1]; units [1, U, 1]; lanes [1, 1, 16]; mask [N, U, 1] -> float32 [N, U, 16] twice.

    Where the mask is False, both are 0. UNITS: in a row.
    """
    if KIND == "Q4_0":
        return _q4(rows, units, lanes, mask, UNITS, False)
    elif KIND == "Q4_1":
        return _q4(rows, units, lanes, mask, UNITS, True)
    elif KIND == "Q5_0":
        return _q5(rows, units, lanes, mask, UNITS, False)
    elif KIND == "Q5_1":
        return _q5(rows, units, lanes, mask, UNITS, True)
    elif KIND == "Q8_0":
        return _q8_0(rows, units, lanes, mask, UNITS)
    elif KIND == "Q4_K":
        return _q4_k(rows, units, lanes, mask, UNITS)
    elif KIND == "Q5_K":
        return _q5_k(rows, units, lanes, mask, UNITS)
    else:
        tl.static_assert(KIND == "Q6_K")
        return _q6_k(rows, units, lanes, mask, UNITS)


@triton.jit
def _half(ptrs, mask):
    """The float16 at a byte pointer, as float32."""
    return tl.load(ptrs.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _word(ptrs, mask):
    """The two bytes at a byte pointer: int32."""
    return tl.load(ptrs.to(tl.pointer_type(tl.uint16)), mask=mask, other=0).to(tl.int32)


@triton.jit
def _bytes(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0).to(tl.int32)


@triton.jit
def _signed(ptrs, mask):
    """The int8 at a byte pointer, as float32."""
    return tl.load(ptrs.to(tl.pointer_type(tl.int8)), mask=mask, other=0).to(tl.float32)


@triton.jit
def _scaled(low_codes, high_codes, scale, low, high_scale, high_low):
    """Both results, `high_codes` being 16 times as large: so no code is shifted."""
    return low_codes.to(tl.float32) * scale + low, high_codes.to(tl.float32) * (high_scale * 0.0625) + high_low


# Codes are loaded behind scales: then Triton lays tiles out for the wide loads of codes.
@triton.jit
def _q4(rows, units, lanes, mask, UNITS: tl.constexpr, HAS_MIN: tl.constexpr):
    scales = rows + UNITS * 16 + units * (4 if HAS_MIN else 2)
    scale = _half(scales, mask)
    low = _half(scales + 2, mask) if HAS_MIN else -8.0 * scale
    codes = _bytes(rows + units * 16 + lanes, mask)
    return _scaled(codes & 15, codes & 240, scale, low, scale, low)


@triton.jit
def _q5(rows, units, lanes, mask, UNITS: tl.constexpr, HAS_MIN: tl.constexpr):
    fifth = rows + UNITS * 16 + units * 4
    low_bits, high_bits = (_word(fifth, mask) << 4) >> lanes, (_word(fifth + 2, mask) << 8) >> lanes
    scales = rows + UNITS * 20 + units * (4 if HAS_MIN else 2)
    scale = _half(scales, mask)
    low = _half(scales + 2, mask) if HAS_MIN else -16.0 * scale
    codes = _bytes(rows + units * 16 + lanes, mask)
    return _scaled((codes & 15) | (low_bits & 16), (codes & 240) | (high_bits & 256), scale, low, scale, low)


@triton.jit
def _q8_0(rows, units, lanes, mask, UNITS: tl.constexpr):
    scale = _half(rows + UNITS * 32 + units * 2, mask)
    codes = rows + units * 32 + lanes
    return _signed(codes, mask) * scale, _signed(codes + 16, mask) * scale


@triton.jit
def _k_scales(block, group, mask):
    """Scale and negated minimum of groups `group` and `group + 1` of the eight of a block of Q4_K or Q5_K."""
    pair = block + group % 4
    low, mid, high = _word(pair + 4, mask), _word(pair + 8, mask), _word(pair + 12, mask)
    late = group >= 4  # their fields are split
    scales = tl.where(late, (high & 0x0F0F) | ((low >> 2) & 0x3030), low & 0x3F3F)
    mins = tl.where(late, ((high >> 4) & 0x0F0F) | ((mid >> 2) & 0x3030), mid & 0x3F3F)
    scale, min_scale = _half(block, mask), -_half(block + 2, mask)
    return (
        scale * (scales & 255).to(tl.float32),
        min_scale * (mins & 255).to(tl.float32),
        scale * (scales >> 8).to(tl.float32),
        min_scale * (mins >> 8).to(tl.float32),
    )


@triton.jit
def _q4_k(rows, units, lanes, mask, UNITS: tl.constexpr):
    scale, low, high_scale, high_low = _k_scales(rows + UNITS * 16 + units // 8 * 16, units % 8 // 2 * 2, mask)
    codes = _bytes(rows + units * 16 + lanes, mask)
    return _scaled(codes & 15, codes & 240, scale, low, high_scale, high_low)


@triton.jit
def _q5_k(rows, units, lanes, mask, UNITS: tl.constexpr):
    group = units % 8 // 2 * 2
    scale, low, high_scale, high_low = _k_scales(rows + UNITS * 20 + units // 8 * 16, group, mask)
    bits = _bytes(rows + UNITS * 16 + units // 8 * 32 + units % 2 * 16 + lanes, mask) >> group
    codes = _bytes(rows + units * 16 + lanes, mask)
    low_codes, high_codes = (codes & 15) | ((bits << 4) & 16), (codes & 240) | ((bits << 7) & 256)
    return _scaled(low_codes, high_codes, scale, low, high_scale, high_low)


@triton.jit
def _q6_k(rows, units, lanes, mask, UNITS: tl.constexpr):
    scale = _half(rows + UNITS * 26 + units // 8 * 2, mask)
    scales = rows + UNITS * 24 + units // 4 * 8 + units % 4
    low, high = scale * _signed(scales, mask), scale * _signed(scales + 4, mask)
    bits = _bytes(rows + UNITS * 16 + units // 4 * 32 + units % 2 * 16 + lanes, mask) >> (units % 4 // 2 * 2)
    codes = _bytes(rows + units * 16 + lanes, mask)
    low_codes, high_codes = (codes & 15) | ((bits << 4) & 48), (codes & 240) | ((bits << 4) & 768)
    return _scaled(low_codes, high_codes, low, -32.0 * low, high, -32.0 * high)
