"""Blocks of a GGUF file on a CPU: in the order that the kernels in C read, which round inputs to signed bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.api import Norm
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.cpu import Library
from nanoengine.kernels.cpu.library import LANES
from nanoengine.kernels.gguf import BLOCK_TYPES
from nanoengine.kernels.ops import Ops
from nanoengine.plugins.quantizations.gguf_stores import Store


class Tiles(Store):
    """As many bytes as the blocks have (of K types 1 to 3% more), in tiles of 16 outputs."""

    note = ", inputs rounded to int8"

    def __init__(self, weight: Tensor, kind: str, library: Library) -> None:
        self._library = library
        super().__init__(weight, kind)

    def kept(self, blocks: Tensor, kind: str) -> Tensor:
        """uint8 [out, bytes of a row] of the tiles; the last tile is whole in the tensor's memory."""
        tiles = self._library.pack(blocks, kind, BLOCK_TYPES[kind].width(blocks.shape[1]))
        return tiles.view(-1, tiles.shape[1] // LANES)[: len(blocks)]

    def linear(self, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        y = self._library.product(x, self.weight, self.kind, len(self.weight), bias)
        return y if out is None else out.copy_(y)

    def norm_linear(
        self, x: Tensor, residual: Tensor | None, norm: Norm, bias: Tensor | None, gate: Activation | None, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        return self._library.norm_product(
            x, residual, self.weight, self.kind, len(self.weight), bias, norm=norm.weight, eps=norm.eps, gate=gate
        )

    def linear_add(
        self, x: Tensor, residual: Tensor, bias: Tensor | None, next_norm: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return self._library.product(x, self.weight, self.kind, len(self.weight), bias, add=residual), None

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        inputs = self._library.inputs(self.weight.shape[1] * LANES, self.kind)
        return self._library.rows(ids, self.weight, self.kind, inputs, dtype)
