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

    def __init__(self, library: Library) -> None:
        self._library = library

    def keep(self, blocks: Tensor, kind: str) -> Tensor:
        """uint8 [out, bytes of a row] of the tiles; the last tile is whole in the tensor's memory."""
        tiles = self._library.pack(blocks, kind, BLOCK_TYPES[kind].width(blocks.shape[1]))
        return tiles.view(-1, tiles.shape[1] // LANES)[: len(blocks)]

    def linear(self, x: Tensor, kept: Tensor, kind: str, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        y = self._library.product(x, kept, kind, len(kept), bias)
        return y if out is None else out.copy_(y)

    def norm_linear(
        self,
        ops: Ops,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        kept: Tensor,
        kind: str,
        bias: Tensor | None,
        gate: Activation | None,
    ) -> tuple[Tensor, Tensor]:
        weight, outputs = norm.weight, len(kept)
        return self._library.norm_product(x, residual, kept, kind, outputs, bias, norm=weight, eps=norm.eps, gate=gate)

    def linear_add(
        self,
        x: Tensor,
        residual: Tensor,
        kept: Tensor,
        kind: str,
        bias: Tensor | None,
        *,
        next_norm: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return self._library.product(x, kept, kind, len(kept), bias, add=residual), None

    def rows(self, ids: Tensor, kept: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        return self._library.rows(ids, kept, kind, self._library.inputs(kept.shape[1] * LANES, kind), dtype)
