"""`experts.experts` in Triton: matrix-vector products for a few tokens, grouped products for more."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.experts_few_triton import few
from nanoengine.kernels.experts_grouped_triton import grouped

_FEW_ROWS = 2  # four take 74 us grouped and 89 one by one (Qwen3-30B-A3B on an H200)
_FEW_BYTES = 96 << 10  # of the rows of down that a program holds, for one output


def takes_few(rows: int, top_k: int, width: int, itemsize: int) -> bool:
    """Whether tokens read their experts one by one."""
    return rows <= _FEW_ROWS and top_k * width * itemsize <= _FEW_BYTES


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: Activation = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    first: int = 0,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `experts.experts`. Rows of x and `add` may be strided; `out`, contiguous: where the result goes."""
    rows, (_, hidden, width) = len(x), down.shape
    _check(x, ids, weights, gate_up, down, add)
    y = torch.empty(rows, hidden, dtype=x.dtype, device=x.device) if out is None else out
    assert y.shape == x.shape and y.is_contiguous(), (y.shape, y.stride())
    if rows == 0:
        return y
    run = few if takes_few(rows, ids.shape[1], width, x.element_size()) else grouped
    return run(
        x, ids, weights, gate_up, down,
        activation=activation, gate_up_bias=gate_up_bias, down_bias=down_bias, first=first, add=add, out=y,
    )  # fmt: skip


def _check(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, add: Tensor | None) -> None:
    count, hidden, width = down.shape
    assert gate_up.shape == (count, 2 * width, hidden) and x.shape == (len(x), hidden), (gate_up.shape, down.shape)
    assert gate_up.is_contiguous() and down.is_contiguous() and x.stride(1) == 1, (gate_up.stride(), down.stride())
    assert x.dtype == gate_up.dtype == down.dtype, (x.dtype, gate_up.dtype, down.dtype)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32, (ids.dtype, weights.dtype)
    assert ids.shape == weights.shape and ids.is_contiguous() and weights.is_contiguous(), (ids.shape, weights.shape)
    assert add is None or (add.shape == x.shape and add.stride(1) == 1), add
