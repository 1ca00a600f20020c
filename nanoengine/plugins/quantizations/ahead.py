"""Norms that the product before them prepares, between methods of one model."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.api import WeightLayer
from nanoengine.kernels.matmul import Scaled
from nanoengine.layers.linear import ParallelLinear


class Ahead:
    """The last sum that a product wrote down, and what the norm behind it needs of it."""

    def __init__(self) -> None:
        self._sum: tuple[Tensor, Scaled] | None = None

    def kept(self, total: Tensor, scaled: Scaled | None) -> Tensor:
        """Returns `total`."""
        self._sum = None if scaled is None else (total, scaled)
        return total

    def taken(self, x: Tensor, residual: Tensor | None, norm_weight: Tensor) -> Scaled | None:
        """Of x, for a norm with this weight; None: x is another tensor, or is to be added to."""
        found, self._sum = self._sum, None
        if found is None or residual is not None or found[0] is not x or found[1].norm_weight is not norm_weight:
            return None
        return found[1]


def next_norm_of(layer: WeightLayer, x: Tensor) -> Tensor | None:
    """The weight of the norm that a product of x should prepare: not in float16, where the stream times the weight may
    be too large."""
    norm = layer.next_norm if isinstance(layer, ParallelLinear) else None
    wanted = norm is not None and layer.ops.prepares_norms and x.dtype != torch.float16
    return norm.weight if norm is not None and wanted else None
