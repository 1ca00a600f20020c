"""Gated activation: one pass over what the gate and up projections gave."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs


@triton.jit
def silu_mul(gate, up):
    """silu(gate) * up, float32 in and out."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release_dependents(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < WIDTH
    gate = tl.load(gate_up_ptr + row * stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + WIDTH + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + col, silu_mul(gate, up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As `activation.silu_and_mul`. Rows may be strided; a row is contiguous."""
    rows, width = gate_up.shape
    assert gate_up.stride(1) == 1 and width % 2 == 0, (gate_up.shape, gate_up.stride())
    out = torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    if rows == 0:
        return out
    block = min(1024, triton.next_power_of_2(width // 2))
    _silu_and_mul_kernel[(rows, triton.cdiv(width // 2, block))](
        gate_up, out, gate_up.stride(0), WIDTH=width // 2, BLOCK=block, num_warps=4, **pdl_options(gate_up)
    )
    return out
