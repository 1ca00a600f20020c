"""Matrix products of few rows in plain torch: the reference of `matvec_triton`, and when that is worth calling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoengine.kernels.activation import silu_and_mul
from nanoengine.kernels.rms_norm import add_rms_norm


def matvec(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False, add: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias, then what usually follows it.

    Products are summed and everything after them is done in float32; the result is rounded once.

    Args:
        x: [T, K]. weight: [N, K], row-major. bias: [N].
        gated: the first half of the outputs gates the second: silu(first) * second.
        add: [T, outputs], added last (the residual stream).

    Returns:
        [T, N], or [T, N / 2] if `gated`.
    """
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if gated:
        y = silu_and_mul(y)
    return (y if add is None else y + add.float()).to(x.dtype)


def norm_matvec(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm`, then `matvec` of what it normalised. Returns (product, residual stream [T, K])."""
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    return matvec(normed, weight, bias, gated=gated), total


def use_matvec(rows: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether `matvec_triton` beats cuBLAS for [rows, k] @ [n, k].T."""
    return rows <= 64
