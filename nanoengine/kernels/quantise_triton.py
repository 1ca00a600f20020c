"""Quantises the rows of a product's input to eight bits, behind the norm in front of it."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.eight_bit import LEAST, EightBit
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

_LEAST = tl.constexpr(LEAST)


@triton.jit
def codes_of(x, input_scale_ptr, bound_ptr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
             INPUTS: tl.constexpr, INT8: tl.constexpr, HAS_BOUND: tl.constexpr, STORED: tl.constexpr):  # fmt: skip
    """float32 [GROUPS * GROUP] -> (codes as float32 [GROUPS, GROUP], their scales [GROUPS]).

    Codes are rounded by adding a number whose last bit is worth as much as theirs: the sum is rounded to nearest even.
    """
    limit: tl.constexpr = 127.0 if INT8 else 448.0
    x = tl.reshape(x, (GROUPS, GROUP))
    if INPUTS == "tensor":
        scale = tl.load(input_scale_ptr + tl.zeros((GROUPS,), tl.int32))
    else:
        most = tl.max(tl.abs(x), 1)
        if HAS_BOUND:
            most = tl.minimum(most, tl.load(bound_ptr))
        scale = tl.div_rn(tl.maximum(most, _LEAST), tl.full((GROUPS,), limit, tl.float32))
    if STORED or INT8 or INPUTS == "tensor" or HAS_BOUND:
        scale += tl.sum(x - x, 1)  # NaN, if one of them is not finite: a limited or integer code would not say so
    x = tl.div_rn(x, tl.broadcast_to(scale[:, None], (GROUPS, GROUP)))  # of 16-bit values many are ties
    if INPUTS == "tensor" or HAS_BOUND:
        x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
    if INT8:
        rounder = 12582912.0  # 1.5 * 2^23
    else:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        rounder = tl.where(power > 0.015625, power, 0.015625) * 1572864.0  # 2^-6: subnormal below; 1.5 * 2^20
    return (x + rounder) - rounder, scale


@triton.jit
def normed_row(x, norm_weight, eps, dtype: tl.constexpr, K: tl.constexpr):
    """float32 [BLOCK_K] -> normalised, as it is rounded where the norm is a kernel of its own."""
    return (x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * norm_weight).to(dtype).to(tl.float32)


@triton.jit
def _quantise_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, input_scale_ptr, bound_ptr, codes_ptr, scale_ptr, total_ptr,
    x_stride, residual_stride, eps,
    K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WANTED: tl.constexpr,
    INPUTS: tl.constexpr, INT8: tl.constexpr, HAS_BOUND: tl.constexpr,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    groups: tl.constexpr = BLOCK_K // GROUP
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    mask = k < K
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + k, mask=mask, other=0.0).to(tl.float32)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    x = tl.load(x_ptr + row * x_stride + k, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + k, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * K + k, x, mask=mask)
    x = x.to(tl.float32)
    if NORM:
        x = normed_row(x, norm_weight, eps, x_ptr.dtype.element_ty, K)
    codes, scale = codes_of(x, input_scale_ptr, bound_ptr, groups, GROUP, INPUTS, INT8, HAS_BOUND, True)
    codes = tl.reshape(codes, (BLOCK_K,)).to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + row * K + k, codes, mask=mask)
    group = tl.arange(0, groups)
    tl.store(scale_ptr + row * WANTED + group, scale, mask=group < WANTED)


def groups_of(w: EightBit) -> tuple[int, int]:
    """(K as a power of two, inputs that share a scale of x as one)."""
    block_k = triton.next_power_of_2(w.weight.shape[-1])
    return (max(block_k, w.group), w.group) if w.inputs == "group" else (block_k, block_k)


def quantised(
    x: Tensor,
    w: EightBit,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eight_bit.quantised`, of `add_rms_norm` of x where there is a norm; and the residual stream."""
    rows, k = x.shape
    assert x.stride(1) == 1 and (residual is None or residual.stride(1) == 1), (x.stride(), residual)
    count = -(-k // w.group)
    codes = torch.empty(rows, k, dtype=w.weight.dtype, device=x.device)
    scale = torch.empty(rows, count, dtype=torch.float32, device=x.device)
    total = x if residual is None else torch.empty(rows, k, dtype=x.dtype, device=x.device)
    if rows == 0:
        return codes, scale, total
    block_k, group = groups_of(w)
    source = x if residual is None else residual
    _quantise_kernel[(rows,)](
        x, source, norm_weight if norm_weight is not None else x,
        w.input_scale if w.input_scale is not None else scale, w.bound if w.bound is not None else scale,
        codes, scale, total, x.stride(0), source.stride(0), eps,
        K=k, BLOCK_K=block_k, GROUP=group, WANTED=count,
        INPUTS=w.inputs, INT8=w.weight.dtype == torch.int8, HAS_BOUND=w.bound is not None,
        NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None,
        num_warps=min(16, max(1, block_k // 512)), **pdl_options(x),
    )  # fmt: skip
    return codes, scale, total
