"""Matrix products of few rows in plain torch: the reference of `matvec_triton`, and when that is worth calling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoengine.kernels.activation import Activation, act_and_mul
from nanoengine.kernels.rms_norm import add_rms_norm


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias, then what usually follows it.

    Products are summed and everything after them is done in float32; the result is rounded once.

    Args:
        x: [T, K]. weight: [N, K], row-major. bias: [N].
        gate: the first half of the outputs gates the second: gate(first) * second.
        add: [T, outputs], added last (the residual stream).

    Returns:
        [T, N], or [T, N / 2] with a gate.
    """
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if gate:
        y = act_and_mul(y, gate)
    return (y if add is None else y + add.float()).to(x.dtype)


def norm_matvec(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm`, then `matvec` of what it normalised. Returns (product, residual stream [T, K])."""
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    return matvec(normed, weight, bias, gate=gate), total


def takes_gemv(rows: int, k: int) -> bool:
    """Whether `matvec_triton` can sum without tensor cores: one row, or two if a row is not too long for registers."""
    return rows == 1 or (rows == 2 and k <= 8192)


def use_matvec(rows: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether `matvec_triton` beats cuBLAS for [rows, k] @ [n, k].T (or is within 3% of it).

    From `python benchmarks/kernels.py` on one H200 (bf16, torch 2.11, Triton 3.6, 2026-11-21); us, ours / cuBLAS. The
    first four of ours have become faster since; as layers call them, with the norm in front or the residual stream
    behind, they take (2026-11-29)

        4096 x 1024, norm          3.0      3.1      4.9      7.0
        1024 x 2048, sum           2.3      2.4      3.2      5.3
        6144 x 1024, norm, gate    4.5      4.6      7.5      8.8
        1024 x 3072, sum           2.7      3.4      5.2      5.7

        n x k            1 row         8 rows        32 rows       64 rows
        4096 x 1024      3.3 / 5.0     3.7 / 5.3     4.0 / 5.3     5.2 / 5.4
        1024 x 2048      2.0 / 12.7    3.4 / 5.9     3.8 / 5.9     4.5 / 5.8
        6144 x 1024      4.2 / 6.1     5.3 / 6.1     5.5 / 6.3     6.1 / 6.5
        1024 x 3072      2.4 / 7.4     4.5 / 7.6     4.4 / 7.7     5.4 / 8.0
        151936 x 1024    71 / 77       76 / 80       80 / 83       95 / 87
        6144 x 4096      13.3 / 16.8   15.7 / 15.9   16.2 / 16.3   17.0 / 16.3
        4096 x 4096      9.1 / 13.3    10.2 / 13.4   10.8 / 14.1   11.7 / 12.1
        28672 x 4096     53 / 56       58 / 57       60 / 59       67 / 62
        4096 x 12288     24 / 31       26 / 31       27 / 30       28 / 32
        151936 x 4096    272 / 297     287 / 300     298 / 306     359 / 313
        2048 x 8192      9.1 / 13.5    10.3 / 13.7   11.0 / 14.2   11.8 / 14.6

    The output layer at 64 rows x 1024 with the final norm in front and the draw behind: 105 / 108 (2026-11-29).

    In float32 only the kernel without tensor cores is faster (4096 x 1024: 4.5 / 7.0 at 1 row, 5.0 / 8.2 at 2).
    """
    if dtype.itemsize > 2:
        return takes_gemv(rows, k)
    return 1 <= rows <= 32 or (33 <= rows <= 64 and (n <= 4096 or n * k <= 8 << 20 or (k <= 1024 and n > 1 << 16)))
