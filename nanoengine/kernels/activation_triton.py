"""Pointwise functions of layers: the gate between the projections of an MLP in one pass, and a soft cap in place."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs


@triton.jit
def act_mul(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up, float32 in and out."""
    if ACTIVATION == "swiglu_clamped":  # by `where`, which keeps a NaN
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
        slope = 1.702 * gate
    else:
        slope = gate
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 z), and 1.5957691 is 2 sqrt(2 / pi)
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-slope)) * up


@triton.jit
def _act_and_mul_kernel(
    gate_up_ptr, out_ptr, stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release_dependents(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < WIDTH
    gate = tl.load(gate_up_ptr + row * stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + WIDTH + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + col, act_mul(gate, up, ACTIVATION).to(out_ptr.dtype.element_ty), mask=mask)


def act_and_mul(gate_up: Tensor, activation: Activation = "silu") -> Tensor:
    """As `activation.act_and_mul`. Rows may be strided; a row is contiguous."""
    rows, width = gate_up.shape
    assert gate_up.stride(1) == 1 and width % 2 == 0, (gate_up.shape, gate_up.stride())
    out = torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    if rows == 0:
        return out
    block = min(1024, triton.next_power_of_2(width // 2))
    _act_and_mul_kernel[(rows, triton.cdiv(width // 2, block))](
        gate_up, out, gate_up.stride(0),
        WIDTH=width // 2, BLOCK=block, ACTIVATION=activation, num_warps=4, **pdl_options(gate_up),
    )  # fmt: skip
    return out


@triton.jit
def _soft_cap_kernel(x_ptr, count, cap, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release_dependents(PDL)
    wait_for_inputs(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / cap))
    y = tl.where(x == float("-inf"), x, cap * tanh)
    tl.store(x_ptr + at, y.to(x_ptr.dtype.element_ty), mask=mask)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """As `activation.soft_cap`, but in place; contiguous."""
    assert logits.is_contiguous(), logits.stride()
    if logits.numel():
        block = 4096
        _soft_cap_kernel[(triton.cdiv(logits.numel(), block),)](
            logits, logits.numel(), cap, BLOCK=block, num_warps=8, **pdl_options(logits)
        )
    return logits
