"""Residual add and root-mean-square normalisation in plain torch: the reference of `rms_norm_triton`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds, then normalises over the last dimension.

    Args:
        x: [T, H]. residual: [T, H] or None, of x's dtype. weight: [H], of x's dtype or float32.
        eps: added to the mean square.

    Returns:
        y [T, H]: the sum over its root mean square, times weight, in float32 and rounded once.
        total [T, H]: x + residual rounded to x's dtype (what y is computed from); x itself without a residual.
    """
    total = x if residual is None else x + residual
    return rms_norm(total, weight, eps), total


def sum_rms_norm(parts: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` of a product that is left in parts, float32 [parts, T, H]: all are added up, then rounded once."""
    total = (parts.sum(0) + residual).to(residual.dtype)
    return rms_norm(total, weight, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., H], normalised over the last dimension in float32 and rounded once."""
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
