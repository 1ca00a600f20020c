"""Blocks of a GGUF file on a GPU, for tensor cores: see `kernels/gguf_fragments`."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.api import Norm
from nanoengine.kernels import gguf_fragments
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.matmul import Ahead
from nanoengine.kernels.ops import Ops
from nanoengine.plugins.quantizations.gguf_stores import Store


class Fragments(Store):
    """The same bits in another order: uint8 [out / 16, tiles of a row, bytes of a tile]."""

    def __init__(self, weight: Tensor, kind: str, ahead: Ahead) -> None:
        from nanoengine.kernels import gguf_fragments_decode_triton, gguf_fragments_triton, gguf_triton

        self._few, self._decode, self._triton = gguf_fragments_triton, gguf_fragments_decode_triton, gguf_triton
        self._ahead = ahead
        super().__init__(weight, kind)

    def kept(self, blocks: Tensor, kind: str) -> Tensor:
        return gguf_fragments.fragments(blocks, kind)

    def linear(self, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        lines = gguf_fragments.LINES
        if out is None:
            out = x.new_empty(len(x), len(self.weight) * lines)
        if len(x) <= self._few.MAX_ROWS:
            self._few.few(x, self.weight, self.kind, bias, out=out)
            return out

        def decode(part: slice) -> Tensor:
            lines_of_part = self.weight[part.start // lines : part.stop // lines]
            values: Tensor = self._decode.rows(None, lines_of_part, self.kind, x.dtype)
            return values

        self._triton.by_slices(x, bias, out, decode)
        return out

    def norm_linear(
        self, x: Tensor, residual: Tensor | None, norm: Norm, bias: Tensor | None, gate: Activation | None, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        if len(x) > self._few.MAX_ROWS:
            return super().norm_linear(x, residual, norm, bias, gate, ops)
        scaled = self._ahead.taken(x, residual, norm.weight)
        if scaled is not None:
            return self._few.few(scaled, self.weight, self.kind, bias, eps=norm.eps, gate=gate)[0], x
        normed, total = norm.add(x, residual)
        return self._few.few(normed, self.weight, self.kind, bias, gate=gate)[0], total

    def linear_add(
        self, x: Tensor, residual: Tensor, bias: Tensor | None, next_norm: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if len(x) > self._few.MAX_ROWS:
            return super().linear_add(x, residual, bias, next_norm)
        made = self._few.few(x, self.weight, self.kind, bias, add=residual, next_norm=next_norm)
        return self._ahead.kept(*made), None

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._decode.rows(ids.contiguous(), self.weight, self.kind, dtype)
