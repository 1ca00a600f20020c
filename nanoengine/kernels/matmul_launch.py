"""Which products of some hundred rows our own kernels make, and which of the kernels makes one; see `matmul`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanoengine.kernels import matmul_triton
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.gluon import is_hopper, multiprocessors, runs_gluon
from nanoengine.kernels.matmul import (
    FEW_ROWS,
    MOST_SPLITS,
    PARTS,
    MatmulTile,
    Scaled,
    matmul_tile,
    takes_parts,
    takes_wide,
    tile_over_ranks,
)

_MOST_TILES = 256  # that wait for each other
_MEASURED_WITHOUT = 192  # rows; beyond, `matmul_triton` with a gate is faster than cuBLAS and a launch for the gate


class Products:
    """Products by `matmul_triton` and `matmul_gluon`, on GPUs of compute capability 9.0, where they were measured."""

    def __init__(self, *, wide: bool = True, in_parts: bool = True) -> None:
        """wide: also those with a gate by large weights, by `matmul_wide_gluon`. in_parts: also `parts`."""
        self._wide, self._in_parts = wide, in_parts
        self._tickets: Tensor | None = None  # [parts of K, tiles]

    def takes(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, gate: Activation | None = None) -> bool:
        """Whether to call this object for the product."""
        if self._tickets is None and x.is_cuda:  # with the first product of any size: nothing is made in a capture
            self._tickets = torch.zeros(MOST_SPLITS + 1, _MOST_TILES, dtype=torch.int32, device=x.device)
        if bias is not None or x.dim() != 2 or _tile(x, weight, gate) is None:
            return False
        return (not x.is_cuda or is_hopper(x.device)) and matmul_triton.takes(x, weight)

    def gates(self, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Activation | None) -> bool:
        """Whether to call `gated`."""
        if not self._wide or bias is not None or gate != "silu" or x.dim() != 2 or not matmul_triton.takes(x, weight):
            return False
        sizes = takes_wide(len(x), len(weight) // 2, weight.shape[1], x.element_size(), multiprocessors(x.device))
        return sizes and runs_gluon(x.device, "a product with a gate is cuBLAS's", "matmul_wide_gluon")

    def gated(self, x: Tensor, weight: Tensor) -> Tensor:
        """`activation.act_and_mul` of the product."""
        from nanoengine.kernels import matmul_wide_gluon

        return matmul_wide_gluon.gated(x, weight)

    def has_parts(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether to call `parts`."""
        if not self._in_parts or bias is not None or x.dim() != 2 or not x.is_contiguous():
            return False
        measured = takes_parts(len(x), len(weight), weight.shape[1], x.element_size(), multiprocessors(x.device))
        return measured and weight.is_contiguous() and is_hopper(x.device)

    def parts(self, x: Tensor, weight: Tensor) -> Tensor:
        """float32 [PARTS, T, N], whose sum is the product; by cuBLAS, as one batch."""
        k = weight.shape[1] // PARTS
        left = x.view(len(x), PARTS, k).transpose(0, 1)
        right = weight.view(len(weight), PARTS, k).permute(1, 2, 0)
        if not x.is_cuda:
            return torch.bmm(left.float(), right.float())
        return torch.bmm(left, right, out_dtype=torch.float32)

    def __call__(
        self, x: Tensor | Scaled, weight: Tensor, *, gate: Activation | None = None, **around: Any
    ) -> tuple[Tensor, Scaled | None]:
        """As `matmul.matmul`; also `out`, contiguous: where the result goes."""
        source, normed = (x.values, True) if isinstance(x, Scaled) else (x, False)
        tile = _tile(source, weight, gate, normed=normed)
        assert tile is not None, "asked only for what it takes"
        if not tile.gluon:
            return matmul_triton.matmul(x, weight, tile=tile, gate=gate, **around)
        from nanoengine.kernels import matmul_gluon

        tickets = None if tile.splits == 1 or self._tickets is None else self._tickets[tile.splits]
        return matmul_gluon.matmul(x, weight, tile=tile, silu=gate is not None, tickets=tickets, **around)

    def takes_over_ranks(self, x: Tensor, weight: Tensor) -> bool:
        """Whether to call `over_ranks` for the product."""
        if not x.is_cuda or x.dim() != 2 or not is_hopper(x.device):
            return False
        tile = tile_over_ranks(len(x), len(weight), weight.shape[1], itemsize=x.element_size())
        return tile is not None and matmul_triton.takes(x, weight) and _gluon(x.device)

    def over_ranks(
        self, x: Tensor, weight: Tensor, inboxes: Callable[[], Any], *, add: Tensor, next_norm: Tensor | None
    ) -> tuple[Tensor, Scaled | None]:
        """As `matmul.matmul`, of the sum over ranks. inboxes: called before the launch."""
        from nanoengine.kernels import matmul_gluon

        tile = tile_over_ranks(len(x), len(weight), weight.shape[1], itemsize=x.element_size())
        assert tile is not None, "asked only for what it takes"
        after = next_norm if len(x) <= FEW_ROWS else None  # of more rows the product behind that is cuBLAS's
        return matmul_gluon.matmul(x, weight, tile=tile, add=add, next_norm=after, inboxes=inboxes)


def _gluon(device: torch.device) -> bool:
    return runs_gluon(device, "some products run on slower kernels", "matmul_gluon")


def _tile(x: Tensor, weight: Tensor, gate: Activation | None, *, normed: bool = False) -> MatmulTile | None:
    outputs = len(weight) // 2 if gate else len(weight)
    tile = matmul_tile(
        len(x), outputs, weight.shape[1], gated=gate is not None, itemsize=x.element_size(),
        normed=normed, multiprocessors=multiprocessors(x.device),
    )  # fmt: skip
    if tile is None or not tile.gluon:
        return tile
    if gate in (None, "silu") and _gluon(x.device):
        return tile
    return replace(tile, gluon=False) if gate and len(x) > _MEASURED_WITHOUT else None
