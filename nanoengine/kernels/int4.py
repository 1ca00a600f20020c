"""Weights of four bits in groups that share a scale, in plain torch: the layout and products.

A value is (code - zero) * scale, with codes and zeros of 0 to 15. Four codes are a word of 16 bits: of each 32
inputs, word j of 8 holds the inputs j, j + 8, j + 16 and j + 24, from its lowest bits up. So one mask over the words
gives 8 neighbouring inputs, in the halves of 32-bit registers, which is what tensor cores take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoengine.kernels.activation import Activation, act_and_mul

UNIT = 32
"""Inputs whose codes are 8 words: a group is a multiple of it."""
TILE = (16, 128)
"""Rows and inputs of a tile: of `in_tiles`."""
SYMMETRIC_ZERO = 8
_CPU_TILE, _GPU_TILE = 1 << 20, 1 << 24  # weights that are dequantised at a time: in the CPU's cache; few launches


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight [out, in].

    Attributes:
        codes: uint8 [out, in / 2].
        scales: float16, bfloat16 or float32 [out, in / group].
        zeros: uint8 [out, in / group]; None: all are 8.
        group: inputs that share a scale and a zero; a multiple of 32 that divides `in`.
        tiled: all three are in the order of `in_tiles`, in these shapes.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    tiled: bool = False

    def __post_init__(self) -> None:
        outputs, inputs = self.shape
        assert self.group % UNIT == 0 and inputs % self.group == 0, (inputs, self.group)
        assert self.scales.shape == (outputs, inputs // self.group), (self.scales.shape, self.shape, self.group)
        assert self.zeros is None or self.zeros.shape == self.scales.shape, self.zeros
        assert all(each.is_contiguous() for each in (self.codes, self.scales, *self._zeros))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.codes, self.scales, *self._zeros))

    @property
    def _zeros(self) -> tuple[Tensor, ...]:
        return () if self.zeros is None else (self.zeros,)

    def rows(self, index: slice) -> Int4Weight:
        """Some of the outputs. They share memory with this."""
        assert not self.tiled
        zeros = None if self.zeros is None else self.zeros[index]
        return Int4Weight(self.codes[index], self.scales[index], zeros, self.group)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes of 0 to 15, any integers [out, in] -> uint8 [out, in / 2]."""
    a, b, c, d = codes.to(torch.uint8).reshape(len(codes), -1, 4, UNIT // 4).unbind(2)
    return torch.stack((a | b << 4, c | d << 4), 3).flatten(1)  # the bytes of a word from the lowest up


def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 [out, in / 2] -> uint8 [out, in]."""
    low, high = packed.reshape(len(packed), -1, UNIT // 4, 2).unbind(3)
    return torch.stack((low & 15, low >> 4, high & 15, high >> 4), 2).flatten(1)


def fits_tiles(weight: Int4Weight) -> bool:
    """Whether `in_tiles` takes it: rows in pairs of tiles, also those of a gate and its ups."""
    outputs, inputs = weight.shape
    return outputs % (4 * TILE[0]) == 0 and weight.group % TILE[1] == 0 and inputs % TILE[1] == 0


def in_tiles(weight: Int4Weight) -> Int4Weight:
    """The same bits in the order in which warps read them: codes [out / 16, in / 128, 16 rows, 64 bytes], scales and
    zeros [out / 16, groups, 8, 2], of which the last two are rows that are 8 apart."""
    rows, inputs = TILE
    codes = weight.codes.view(-1, rows, weight.shape[1] // inputs, inputs // 2).transpose(1, 2)

    def turned(each: Tensor) -> Tensor:
        return each.view(-1, 2, rows // 2, each.shape[1]).permute(0, 3, 2, 1).reshape(each.shape)

    zeros = None if weight.zeros is None else turned(weight.zeros)
    return Int4Weight(codes.reshape(weight.codes.shape), turned(weight.scales), zeros, weight.group, tiled=True)


def in_rows(weight: Int4Weight) -> Int4Weight:
    """A weight in tiles -> row by row."""
    rows, inputs = TILE
    codes = weight.codes.view(-1, weight.shape[1] // inputs, rows, inputs // 2).transpose(1, 2)

    def turned(each: Tensor) -> Tensor:
        return each.view(-1, each.shape[1], rows // 2, 2).permute(0, 3, 2, 1).reshape(each.shape)

    zeros = None if weight.zeros is None else turned(weight.zeros)
    return Int4Weight(codes.reshape(weight.codes.shape), turned(weight.scales), zeros, weight.group)


def dequantise(weight: Int4Weight) -> Tensor:
    """float32 [out, in]. Each value is exact but for the rounding of one product."""
    assert not weight.tiled
    codes = unpack_codes(weight.codes).float().view(*weight.scales.shape, weight.group)
    zeros = SYMMETRIC_ZERO if weight.zeros is None else weight.zeros.float().unsqueeze(2)
    return ((codes - zeros) * weight.scales.float().unsqueeze(2)).flatten(1)


def int4_linear(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x @ dequantise(weight).T + bias, then what usually follows it, as `matvec.matvec`.

    A tile of outputs is dequantised at a time, so that little memory is needed. Everything is done in float32; the
    result is rounded once.

    Args:
        x: [T, in], of any float dtype. bias: [out].
        gate: the first half of the outputs gates the second. add: [T, outputs], added last (the residual stream).
        out: contiguous; where the result goes.
    """
    wide = x.float()
    y = torch.empty(len(x), weight.shape[0], dtype=torch.float32, device=x.device)
    for rows in _tiles(weight):
        part = None if bias is None else bias[rows].float()
        y[:, rows] = F.linear(wide, dequantise(weight.rows(rows)), part)
    if gate:
        y = act_and_mul(y, gate)
    if add is not None:
        y += add.float()
    return y.to(x.dtype) if out is None else out.copy_(y)


def _tiles(weight: Int4Weight) -> Iterator[slice]:
    outputs, inputs = weight.shape
    step = max(1, (_GPU_TILE if weight.codes.is_cuda else _CPU_TILE) // max(1, inputs))
    return (slice(i, min(outputs, i + step)) for i in range(0, outputs, step))
