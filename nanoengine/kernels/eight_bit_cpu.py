"""Products with INT8 weights on a CPU, by the kernels in C, which round the inputs to signed bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.cpu import Library
from nanoengine.kernels.cpu.library import LANES
from nanoengine.kernels.eight_bit import EightBit

BLOCK = 32


@dataclass(frozen=True, slots=True)
class EightBitTiles:
    """`eight_bit`'s products, of weights that `packed` has made; their inputs are rounded to the nearest of 255 values
    in each 32 of them."""

    library: Library

    @staticmethod
    def takes(w: EightBit) -> bool:
        """Whether there is a kernel for it: INT8, inputs that stay as they are, and scales of whole blocks."""
        whole = w.weight.shape[1] % BLOCK == 0 and w.columns % BLOCK == 0 and w.weight.shape[1] % w.columns == 0
        return w.weight.dtype == torch.int8 and w.inputs == "plain" and w.rows == 1 and whole

    def packed(self, w: EightBit) -> EightBit:
        """The weight in the kernels' order: int8 [out, bytes], with its scales inside."""
        tiles = self.library.pack_codes(w.weight, w.scale).view(torch.int8)
        return replace(w, weight=tiles.view(-1, tiles.shape[1] // LANES)[: len(w.weight)], scale=w.scale[:0])

    def product(
        self, w: EightBit, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        y = self.library.product(x, w.weight, "I8", len(w.weight), bias, add=add)
        return y if out is None else out.copy_(y)

    def product_added(
        self, w: EightBit, x: Tensor, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return self.product(w, x, bias, add=residual), None

    def norm_product(
        self,
        w: EightBit,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        bias: Tensor | None,
        *,
        gate: Activation | None = None,
    ) -> tuple[Tensor, Tensor]:
        outputs, norm = len(w.weight), norm_weight
        return self.library.norm_product(x, residual, w.weight, "I8", outputs, bias, norm=norm, eps=eps, gate=gate)
