"""Norms that the product before them prepares: whether they are wanted of a quantised one."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.api import WeightLayer
from nanoengine.layers.linear import next_norm_weight


def next_norm_of(layer: WeightLayer, x: Tensor) -> Tensor | None:
    """The weight of the norm that a product of x should prepare: not in float16, where the stream times the weight may
    be too large."""
    return next_norm_weight(layer) if layer.ops.prepares_norms and x.dtype != torch.float16 else None
