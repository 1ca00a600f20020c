"""Products with weights of four bits on a CPU, by the kernels in C, which round the inputs to signed bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.cpu import Library
from nanoengine.kernels.int4 import SYMMETRIC_ZERO, Int4Weight, unpack_codes


@dataclass(frozen=True, slots=True)
class Int4Tiles:
    """A weight as the kernels read it. tiles: uint8, of `Library.pack_codes`. outputs: of the weight."""

    library: Library
    tiles: Tensor
    outputs: int


def int4_tiles(library: Library, weight: Int4Weight) -> Int4Tiles:
    """The weight for `int4_linear`. Its values are code * scale - zero * scale, in float32."""
    scales = weight.scales.float()
    zeros = torch.full_like(scales, SYMMETRIC_ZERO) if weight.zeros is None else weight.zeros.float()
    return Int4Tiles(library, library.pack_codes(unpack_codes(weight.codes), scales, -zeros * scales), len(scales))


def int4_linear(
    x: Tensor,
    weight: Int4Tiles,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `int4.int4_linear`, of inputs rounded to the nearest of 255 values in each 32 of them.

    norm: [in]; x is normalised by its root mean square times this before. eps: added to the mean square.
    """
    tiles, outputs = weight.tiles, weight.outputs
    y = weight.library.product(x, tiles, "I4", outputs, bias, norm=norm, eps=eps, gate=gate, add=add)
    return y if out is None else out.copy_(y)
