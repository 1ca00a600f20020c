"""What the products in C compute, in plain torch: the reference of `Library.product`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoengine.kernels.activation import Activation, act_and_mul
from nanoengine.kernels.rms_norm import rms_norm

BLOCK = 32  # inputs of a scale


def quantised(x: Tensor) -> Tensor:
    """float32 [T, in] -> the nearest of 255 values from -max|x| to max|x| of each 32 inputs, halves to even: float32.

    Blocks whose values are all below 1e-30 are zeros, and blocks with a value that is not finite are NaN.
    """
    blocks = x.reshape(len(x), -1, BLOCK)
    most = blocks.abs().amax(-1, keepdim=True)
    whole = torch.full_like(most, 127.0)
    codes = (blocks * torch.div(whole, most)).round()
    values = torch.where(most < 1e-30, 0.0, codes * (most / whole))
    return torch.where(most.isfinite(), values, torch.nan).view(x.shape)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """`Library.product` with a dequantised weight [out, in]; equal to it within float32's rounding."""
    wide = x.float() if norm is None else rms_norm(x.float(), norm.float(), eps)
    y = F.linear(quantised(wide), weight.float(), None if bias is None else bias.float())
    if gate:
        y = act_and_mul(y, gate)
    return (y if add is None else y + add.float()).to(x.dtype)
