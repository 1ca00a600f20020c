"""What the kernels for few-row products share: the rows of a gated tile, and what follows the sum."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation_triton import act_mul


@triton.jit
def pin(values):
    """`values` (16-bit), through an identity that the compiler cannot see through: at this point they are in registers,
    and not widened to float32."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=values.dtype, is_pure=False, pack=2)


@triton.jit
def prefetch_rows(source_ptr, rows, first, mask, K: tl.constexpr, SPAN: tl.constexpr):
    """Asks for SPAN elements from `first` on of each weight row, one request a 128-byte line, to be in L2 soon. A power
    of two, and maybe less than a line."""
    line: tl.constexpr = 128 // (source_ptr.dtype.element_ty.primitive_bitwidth // 8)
    k = first + tl.arange(0, (SPAN + line - 1) // line)[None, :] * line
    ptrs = source_ptr + rows.to(tl.int64) * K + tl.where(k < K, k, 0)
    ptrs = tl.where(mask, ptrs, source_ptr)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def pick_rows(tile, N: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """(output, row of the weight) of each row of a tile. A gated tile has 2 * BLOCK_N: the gates and the ups of eight
    outputs by turns, so that both of an output are sums of the same thread."""
    if GATED:
        r = tl.arange(0, 2 * BLOCK_N)
        n = tile * BLOCK_N + r // 16 * 8 + r % 8
        return n, n + r // 8 % 2 * N
    else:
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        return n, n


@triton.jit
def halves(acc, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GATED: tl.constexpr):
    """Sums [rows of a tile, T] -> (gates, ups), [BLOCK_N, T] each; (sums, sums) without a gate."""
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N // 8, 2, 8, BLOCK_T)), (0, 2, 3, 1)))
        return tl.reshape(gate, (BLOCK_N, BLOCK_T)), tl.reshape(up, (BLOCK_N, BLOCK_T))
    else:
        return acc, acc


@triton.jit
def load_if(WANTED: tl.constexpr, ptrs, mask):
    """float32, or 0.0 where there is nothing to load."""
    if WANTED:
        return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def finish(y, up, bias, bias_up, extra, ptrs, mask, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """What follows the float32 sums, and their one rounding. Returns what was stored."""
    y += bias
    if GATED:
        y = act_mul(y, up + bias_up, ACTIVATION)
    y = (y + extra).to(ptrs.dtype.element_ty)
    tl.store(ptrs, y, mask=mask)
    return y


def check(x: Tensor, weight: Tensor, add: Tensor | None, outputs: int) -> None:
    assert x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert x.stride(1) == 1 and weight.is_contiguous() and x.dtype == weight.dtype, (x.stride(), x.dtype, weight.dtype)
    assert add is None or (add.shape == (len(x), outputs) and add.stride(1) == 1), (add, outputs)


def result(x: Tensor, outputs: int, out: Tensor | None) -> Tensor:
    """Where a product goes; `out` may be float32, and is not rounded then."""
    if out is None:
        return torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    assert out.shape == (len(x), outputs) and out.is_contiguous(), (out.shape, out.stride())
    assert out.dtype in (x.dtype, torch.float32), (out.dtype, x.dtype)
    return out
