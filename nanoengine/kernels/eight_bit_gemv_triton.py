"""Products of one or two rows with weights of eight bits, without tensor cores: each program holds whole rows of the
weight in registers before it waits, as `matvec_triton` does it, and quantises x itself. One launch a product.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_mul
from nanoengine.kernels.eight_bit import EightBit
from nanoengine.kernels.eight_bit_row import RowProduct
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.quantise_triton import codes_of, groups_of, normed_row


@triton.jit
def _pin4(values):
    """`matvec_parts_triton.pin` of eight-bit values."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=values.dtype, is_pure=False, pack=4)


@triton.jit
def _sums(w, scale, codes, x_scale, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """[BLOCK_N, K], [BLOCK_N, GROUPS], [GROUPS, GROUP], [GROUPS] -> [BLOCK_N]."""
    if GROUPS == 1:
        products = w.to(tl.float32) * tl.reshape(codes, (GROUP,))[None, :]
        return tl.sum(products, 1) * tl.sum(scale * x_scale[None, :], 1)
    else:
        products = tl.reshape(w.to(tl.float32), (BLOCK_N, GROUPS, GROUP)) * codes[None, :, :]
        return tl.sum(tl.sum(products, 2) * (scale * x_scale[None, :]), 1)


@triton.jit
def _gemv_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, input_scale_ptr, bound_ptr, weight_ptr, scale_ptr, bias_ptr, add_ptr,
    y_ptr, total_ptr, x_stride, residual_stride, add_stride, eps,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr, INT8: tl.constexpr, HAS_BOUND: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GROUPS of GROUP inputs have a scale of their own, of the weight, and of x with INPUTS "group"."""
    block_k: tl.constexpr = GROUPS * GROUP
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, block_k)
    n_mask, k_mask = n < N, k < K
    mask = n_mask[:, None] & k_mask[None, :]
    source = weight_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(source, mask=mask, other=0.0)
    if GATED:
        u = tl.load(source + N * K, mask=mask, other=0.0)
    column = tl.arange(0, GROUPS)[None, :]
    scale_mask = n_mask[:, None] & (column < SCALE_COLUMNS)
    scale = tl.load(scale_ptr + (n // SCALE_ROWS)[:, None] * SCALE_COLUMNS + column, mask=scale_mask, other=0.0)
    if GATED:
        above = ((N + n) // SCALE_ROWS)[:, None] * SCALE_COLUMNS
        scale_u = tl.load(scale_ptr + above + column, mask=scale_mask, other=0.0)
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
        if GATED:
            bias_u = tl.load(bias_ptr + N + n, mask=n_mask, other=0.0).to(tl.float32)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    for t in tl.static_range(T):
        if PDL:
            w = _pin4(w)
            if GATED:
                u = _pin4(u)
        x = tl.load(x_ptr + t * x_stride + k, mask=k_mask, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + t * residual_stride + k, mask=k_mask, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            if tl.program_id(0) == 0:  # all programs need the sum, one writes it down
                tl.store(total_ptr + t * K + k, x, mask=k_mask)
        x = x.to(tl.float32)
        if NORM:
            x = normed_row(x, norm_weight, eps, x_ptr.dtype.element_ty, K)
        if INPUTS == "plain":
            codes, x_scale = tl.reshape(x, (GROUPS, GROUP)), tl.full((GROUPS,), 1.0, tl.float32)
        elif INPUTS == "group":
            codes, x_scale = codes_of(x, input_scale_ptr, bound_ptr, GROUPS, GROUP, INPUTS, INT8, HAS_BOUND, False)
        else:
            codes, x_scale = codes_of(x, input_scale_ptr, bound_ptr, 1, block_k, INPUTS, INT8, HAS_BOUND, False)
            codes, x_scale = tl.reshape(codes, (GROUPS, GROUP)), tl.broadcast_to(x_scale, (GROUPS,))
        y = _sums(w, scale, codes, x_scale, BLOCK_N, GROUPS, GROUP)
        if HAS_BIAS:
            y += bias
        if GATED:
            up = _sums(u, scale_u, codes, x_scale, BLOCK_N, GROUPS, GROUP)
            if HAS_BIAS:
                up += bias_u
            y = act_mul(y, up, ACTIVATION)
        if HAS_ADD:
            y += tl.load(add_ptr + t * add_stride + n, mask=n_mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + t * N + n, y.to(y_ptr.dtype.element_ty), mask=n_mask)


@dataclass(frozen=True, slots=True)
class GemvTile:
    """Weight rows a program holds, and its warps."""

    block_n: int
    warps: int


def takes_gemv(w: EightBit, rows: int) -> bool:
    """One or two rows that are not too long, as they are or quantised in groups.

    A row with one scale is quantised faster by a kernel in front, beside which tiles ask for their weights (one H200,
    2026-11-29, us with the kernel in front: 30.3 instead of 40.3 for gate and up of Qwen3-8B, 11.6 and 11.8 for qkv).
    """
    return 1 <= rows <= 2 and w.weight.shape[-1] <= 8192 and w.inputs in ("plain", "group")


def gemv_tile(block_k: int, *, gated: bool) -> GemvTile:
    """256 bytes of weight a thread, of long rows 128: then two programs or more fit a multiprocessor's registers."""
    warps, held = (4, 256) if block_k <= 4096 else (8, 128)
    return GemvTile(max(1, min(16, 32 * warps * held // (block_k * (1 + gated)))), warps)


def gemv(
    w: EightBit,
    x: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The product, of x normalised first if there is a norm, and the residual stream."""
    launch = RowProduct(
        w, x, bias, residual=residual, norm_weight=norm_weight, eps=eps, gate=gate, add=add, out=out
    )  # fmt: skip
    block_k = groups_of(w)[0]
    group = min(block_k, w.columns) if w.columns < x.shape[1] or w.inputs == "group" else block_k
    tile = gemv_tile(block_k, gated=gate is not None)
    _gemv_kernel[(triton.cdiv(launch.outputs, tile.block_n),)](
        *launch.arguments, **launch.constants, BLOCK_N=tile.block_n, GROUPS=block_k // group, GROUP=group,
        INT8=w.weight.dtype == torch.int8, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return launch.y, launch.total
