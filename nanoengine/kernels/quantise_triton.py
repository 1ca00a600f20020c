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
_FEW_ROWS = 32  # of which each is quantised by several programs


@triton.jit
def over(x, scale):
    """x [GROUPS, GROUP] / scale [GROUPS, 1], rounded once: of 16-bit values many are ties. Three instructions a value,
    where a division has ten."""
    one_over = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), x.shape)
    scale = tl.broadcast_to(scale, x.shape)
    quotient = x * one_over
    return tl.fma(tl.fma(-quotient, scale, x), one_over, quotient)


@triton.jit
def codes_of(x, input_scale_ptr, bound_ptr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
             INPUTS: tl.constexpr, INT8: tl.constexpr, HAS_BOUND: tl.constexpr, STORED: tl.constexpr):  # fmt: skip
    """float32 [GROUPS * GROUP] -> (codes as float32 [GROUPS, GROUP], their scales [GROUPS])."""
    x = tl.reshape(x, (GROUPS, GROUP))
    scale = _scales_of(x, input_scale_ptr, bound_ptr, GROUPS, INPUTS, INT8, HAS_BOUND, STORED)
    return _codes(x, scale[:, None], INT8, INPUTS == "tensor" or HAS_BOUND, False), scale


@triton.jit
def _scales_of(x, input_scale_ptr, bound_ptr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, INT8: tl.constexpr,
               HAS_BOUND: tl.constexpr, STORED: tl.constexpr):  # fmt: skip
    """[GROUPS, GROUP] -> [GROUPS]."""
    most = tl.max(tl.abs(x), 1)
    off = tl.sum(x * 0.0, 1)  # x - x of a product x would be what its rounding took: both become one instruction
    return scale_of(most, off, input_scale_ptr, bound_ptr, INPUTS, INT8, HAS_BOUND, STORED)


@triton.jit
def scale_of(most, off, input_scale_ptr, bound_ptr, INPUTS: tl.constexpr, INT8: tl.constexpr,
             HAS_BOUND: tl.constexpr, STORED: tl.constexpr):  # fmt: skip
    """[GROUPS]: of what has these largest values. off: NaN, if one of its values is not finite, else 0."""
    limit: tl.constexpr = 127.0 if INT8 else 448.0
    if INPUTS == "tensor":
        scale = tl.load(input_scale_ptr + tl.zeros(most.shape, tl.int32))
    else:
        if HAS_BOUND:
            most = tl.minimum(most, tl.load(bound_ptr))
        scale = tl.div_rn(tl.maximum(most, _LEAST), tl.full(most.shape, limit, tl.float32))
    if STORED or INT8 or INPUTS == "tensor" or HAS_BOUND:
        scale += off  # a limited or integer code would not say that it is not finite
    return scale


@triton.jit
def _codes(x, scale, INT8: tl.constexpr, CLAMPED: tl.constexpr, CAST: tl.constexpr):
    """x [GROUPS, GROUP] and scales [GROUPS, 1] -> codes as float32. CAST: the cast behind this rounds them.

    Codes are rounded by adding a number whose last bit is worth as much as theirs: the sum is rounded to nearest even.
    """
    limit: tl.constexpr = 127.0 if INT8 else 448.0
    x = over(x, scale)
    if CLAMPED:
        x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
    if not CAST:
        if INT8:
            rounder = 12582912.0  # 1.5 * 2^23
        else:
            power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            rounder = tl.where(power > 0.015625, power, 0.015625) * 1572864.0  # 2^-6: subnormal below; 1.5 * 2^20
        x = (x + rounder) - rounder
    return x


@triton.jit
def normed_row(x, norm_weight, eps, dtype: tl.constexpr, K: tl.constexpr):
    """float32 [BLOCK_K] -> normalised, as it is rounded where the norm is a kernel of its own."""
    return (x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * norm_weight).to(dtype).to(tl.float32)


@triton.jit
def _stream_at(x_ptr, residual_ptr, k, mask, HAS_RESIDUAL: tl.constexpr):
    """x, with the residual stream added, in the dtype of x."""
    x = tl.load(x_ptr + k, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + k, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _quantise_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, input_scale_ptr, bound_ptr, codes_ptr, scale_ptr, total_ptr,
    x_stride, residual_stride, eps,
    K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WANTED: tl.constexpr, PARTS: tl.constexpr,
    INPUTS: tl.constexpr, INT8: tl.constexpr, HAS_BOUND: tl.constexpr,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PARTS: programs of a row. Each reads all of it, for its norm and its scale, and writes a part."""
    groups: tl.constexpr = BLOCK_K // GROUP
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    mask = k < K
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + k, mask=mask, other=0.0).to(tl.float32)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    stream = _stream_at(x_ptr, residual_ptr, k, mask, HAS_RESIDUAL)
    x = stream.to(tl.float32)
    if NORM:
        shrink = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
        x = (x * shrink * norm_weight).to(x_ptr.dtype.element_ty).to(tl.float32)
    x = tl.reshape(x, (groups, GROUP))
    scale = _scales_of(x, input_scale_ptr, bound_ptr, groups, INPUTS, INT8, HAS_BOUND, True)
    group = tl.arange(0, groups)
    tl.store(scale_ptr + row * WANTED + group, scale, mask=(group < WANTED) & (tl.program_id(1) == 0))
    clamped: tl.constexpr = INPUTS == "tensor" or HAS_BOUND
    if PARTS > 1:
        k = tl.program_id(1) * (BLOCK_K // PARTS) + tl.arange(0, BLOCK_K // PARTS)
        mask = k < K
        stream = _stream_at(x_ptr, residual_ptr, k, mask, HAS_RESIDUAL)
        x = stream.to(tl.float32)
        if NORM:
            norm_weight = tl.load(norm_weight_ptr + k, mask=mask, other=0.0).to(tl.float32)
            x = (x * shrink * norm_weight).to(x_ptr.dtype.element_ty).to(tl.float32)
        x = tl.reshape(x, (groups, BLOCK_K // PARTS))
    if HAS_RESIDUAL:
        tl.store(total_ptr + row * K + k, stream, mask=mask)
    codes = tl.reshape(_codes(x, scale[:, None], INT8, clamped, CAST), k.shape)
    tl.store(codes_ptr + row * K + k, codes.to(codes_ptr.dtype.element_ty), mask=mask)


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
    source, int8 = x if residual is None else residual, w.weight.dtype == torch.int8
    parts = 4 if rows <= _FEW_ROWS and group == block_k and block_k >= 2048 else 1
    _quantise_kernel[(rows, parts)](
        x, source, norm_weight if norm_weight is not None else x,
        w.input_scale if w.input_scale is not None else scale, w.bound if w.bound is not None else scale,
        codes, scale, total, x.stride(0), source.stride(0), eps,
        K=k, BLOCK_K=block_k, GROUP=group, WANTED=count, PARTS=parts,
        INPUTS=w.inputs, INT8=int8, HAS_BOUND=w.bound is not None,
        NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None, CAST=x.is_cuda and not int8,
        num_warps=min(16, max(1, block_k // 512)), **pdl_options(x),
    )  # fmt: skip
    return codes, scale, total
