"""Residual add and root-mean-square normalisation in plain torch: the reference of `rms_norm_triton`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds, then normalises over the last dimension.

    Args:
        x: [T, H]. residual: [T, H] or None, of x's dtype. weight: [H]. eps: added to the mean square.

    Returns:
        y [T, H]: the sum over its root mean square, times weight, in float32 and rounded once.
        total [T, H]: x + residual rounded to x's dtype (what y is computed from); x itself without a residual.
    """
    total = x if residual is None else x + residual
    return F.rms_norm(total, (x.shape[-1],), weight, eps), total
