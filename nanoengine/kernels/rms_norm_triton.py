"""Residual add and root-mean-square normalisation in one pass over the rows."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

_SMALL_TILE = 1024  # elements that rows are put together up to, when there are many
_MANY_ROWS = 256


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr,
    num_rows, x_stride, residual_stride, eps, part_stride,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_H)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    mask = (row < num_rows) & (col < H)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + col, mask=mask, other=0.0)
        x = x.to(tl.float32)
        for part in tl.static_range(1, PARTS):
            x += tl.load(x_ptr + part * part_stride + row * x_stride + col, mask=mask, other=0.0)
        x = (x + residual.to(tl.float32)).to(residual.dtype)
        tl.store(total_ptr + row * H + col, x, mask=mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
    tl.store(y_ptr + row * H + col, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm.add_rms_norm`. Rows of x and residual may be strided; a row is contiguous."""
    assert x.stride(1) == 1 and (residual is None or residual.stride(1) == 1), (x.stride(), residual)
    block_h = triton.next_power_of_2(x.shape[1])
    block_rows = max(1, _SMALL_TILE // block_h) if len(x) >= _MANY_ROWS else 1
    return _launch(x, residual, weight, eps, torch.empty(x.shape, dtype=x.dtype, device=x.device), block_rows)


def sum_rms_norm(parts: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm.sum_rms_norm`. parts is contiguous, a row of the residual stream too."""
    assert parts.is_contiguous() and residual.stride(1) == 1, (parts.stride(), residual.stride())
    y = torch.empty(parts.shape[1:], dtype=residual.dtype, device=residual.device)
    return _launch(parts[0], residual, weight, eps, y, 1, parts=len(parts))


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, block_rows: int, *, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """y, and what it normalises. x: the first of so many parts, which lie behind each other."""
    num_rows, hidden = y.shape
    total = x if residual is None else torch.empty_like(y)
    if num_rows == 0:
        return y, total
    source, block_h = x if residual is None else residual, triton.next_power_of_2(hidden)
    _add_rms_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
        x, source, weight, y, total,
        num_rows, x.stride(0), source.stride(0), eps, 0 if parts == 1 else num_rows * hidden,
        H=hidden, BLOCK_H=block_h, BLOCK_ROWS=block_rows, HAS_RESIDUAL=residual is not None, PARTS=parts,
        num_warps=min(16, max(1, block_h * block_rows // 256)), **pdl_options(x),
    )  # fmt: skip
    return y, total
