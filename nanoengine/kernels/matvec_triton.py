"""Matrix products of few rows, which read every weight once: the time of a decode step at small batch.

Two kernels. For one or two rows, each program holds whole rows of the weight in registers, loaded before it waits
for the kernel in front (see `pdl_triton`): no loop, no shared memory for the weight, sums in float32 without tensor
cores. Beyond, tensor cores take tiles of outputs x tokens ("skinny"), the weight on the left, so that the tokens are
the short side of a tile. Where outputs alone make too few programs the sum over K is cut in parts, each written down
and added in order by a second kernel: no atomics, so a product comes out the same every time.
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
from nanoengine.kernels.activation_triton import act_and_mul, act_mul
from nanoengine.kernels.matvec import takes_gemv
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.rms_norm_triton import add_rms_norm

MAX_ROWS = 64
_FUSED_NORM_MAX_WEIGHTS = 5 << 20  # for two rows: each program repeats the norm
_GATED_ROWS = 16
_AHEAD = 512  # elements of each weight row that a tensor-core program asks for before it waits


@triton.jit
def _pin(w):
    """w (16-bit), through an identity that the compiler cannot see through. It keeps it from widening held weights to
    float32 before the wait: half the registers (80 a thread, not 147), so the next kernel's programs find room."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [w], dtype=w.dtype, is_pure=False, pack=2)


@triton.jit
def _gemv_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, weight_ptr, bias_ptr, add_ptr, y_ptr, total_ptr,
    x_stride, residual_stride, add_stride, eps,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    n_mask, k_mask = n < N, k < K
    mask = n_mask[:, None] & k_mask
    source = weight_ptr + n.to(tl.int64)[:, None] * K + k
    w = tl.load(source, mask=mask, other=0.0)
    if GATED:
        u = tl.load(source + N * K, mask=mask, other=0.0)
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
        if GATED:
            bias_u = tl.load(bias_ptr + N + n, mask=n_mask, other=0.0).to(tl.float32)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    for t in tl.static_range(T):
        if PDL and w.dtype.primitive_bitwidth == 16:
            w = _pin(w)
            if GATED:
                u = _pin(u)
        x = tl.load(x_ptr + t * x_stride + k, mask=k_mask, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + t * residual_stride + k, mask=k_mask, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            if tl.program_id(0) == 0:  # all programs need the sum, one writes it down
                tl.store(total_ptr + t * K + k, x, mask=k_mask)
        x = x.to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / K + eps)
            x *= norm_weight
        y = tl.sum(w.to(tl.float32) * x, axis=1)
        if NORM:
            y *= scale
        if HAS_BIAS:
            y += bias
        if GATED:
            up = tl.sum(u.to(tl.float32) * x, axis=1)
            if NORM:
                up *= scale
            if HAS_BIAS:
                up += bias_u
            y = act_mul(y, up, ACTIVATION)
        if HAS_ADD:
            y += tl.load(add_ptr + t * add_stride + n, mask=n_mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + t * N + n, y.to(y_ptr.dtype.element_ty), mask=n_mask)


@triton.jit
def _epilogue(y, up, n, t, mask, bias_ptr, add_ptr, y_ptr, add_stride,
              N: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
              HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr):  # fmt: skip
    """Finishes float32 sums [n, t] and writes them; n and t are [..., 1] and [1, ...]."""
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        y = act_mul(y, up, ACTIVATION)
    if HAS_ADD:
        y += tl.load(add_ptr + t * add_stride + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * N + n, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _prefetch_rows(source_ptr, rows, first, mask, K: tl.constexpr, SPAN: tl.constexpr):
    """Asks for SPAN elements from `first` on of each weight row, one request a 128-byte line, to be in L2 soon."""
    line: tl.constexpr = 128 // (source_ptr.dtype.element_ty.primitive_bitwidth // 8)
    k = first + tl.arange(0, SPAN // line)[None, :] * line
    ptrs = source_ptr + rows.to(tl.int64) * K + tl.where(k < K, k, 0)
    ptrs = tl.where(mask, ptrs, source_ptr)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["rows"])
def _skinny_kernel(
    x_ptr, weight_ptr, bias_ptr, add_ptr, y_ptr, partial_ptr, rows, x_stride, add_stride,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, SPAN: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    t = tl.arange(0, BLOCK_T)[None, :]
    split = tl.program_id(1)
    first = split * SPAN
    n_mask, t_mask = n < N, t < rows
    if PDL:
        _prefetch_rows(weight_ptr, n, first, n_mask, K, AHEAD)
        if GATED:
            _prefetch_rows(weight_ptr + N * K, n, first, n_mask, K, AHEAD)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    k = tl.arange(0, BLOCK_K)
    w_ptrs = weight_ptr + n.to(tl.int64) * K + k[None, :]
    x_ptrs = x_ptr + t * x_stride + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in tl.range(first, first + SPAN, BLOCK_K, num_stages=STAGES):
        k_left = K - start
        x = tl.load(x_ptrs + start, mask=t_mask & (k[:, None] < k_left), other=0.0)
        w = tl.load(w_ptrs + start, mask=n_mask & (k[None, :] < k_left), other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if GATED:
            u = tl.load(w_ptrs + N * K + start, mask=n_mask & (k[None, :] < k_left), other=0.0)
            up = tl.dot(u, x, up, input_precision="ieee")
    mask = n_mask & t_mask
    if SPLITS == 1:
        _epilogue(acc, up, n, t, mask, bias_ptr, add_ptr, y_ptr, add_stride, N, GATED, ACTIVATION, HAS_BIAS, HAS_ADD)
    else:
        width: tl.constexpr = 2 * N if GATED else N
        out = partial_ptr + (split * rows + t) * width + n
        tl.store(out, acc, mask=mask)
        if GATED:
            tl.store(out + N, up, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _add_parts_kernel(
    partial_ptr, bias_ptr, add_ptr, y_ptr, rows, add_stride,
    N: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    width: tl.constexpr = 2 * N if GATED else N
    y = tl.zeros((BLOCK_N,), tl.float32)
    up = tl.zeros((BLOCK_N,), tl.float32)
    for split in tl.static_range(SPLITS):
        source = partial_ptr + (split * rows + t) * width + n
        y += tl.load(source, mask=n < N, other=0.0)
        if GATED:
            up += tl.load(source + N, mask=n < N, other=0.0)
    _epilogue(y, up, n, t, n < N, bias_ptr, add_ptr, y_ptr, add_stride, N, GATED, ACTIVATION, HAS_BIAS, HAS_ADD)


@dataclass(frozen=True, slots=True)
class GemvTile:
    """Weight rows a program holds, and its warps."""

    block_n: int
    warps: int


@dataclass(frozen=True, slots=True)
class SkinnyTile:
    """Sizes of the tensor-core kernel: outputs, K and (at least) tokens a tile, warps, pipeline stages, parts of K."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1
    block_t: int = 16


# The tiles below are within 5% of the best of some 2,000 trials (`benchmarks/kernels.py --tune`, bf16, H200, torch
# 2.11, Triton 3.6, 2026-11-21) for the shapes of Qwen3-0.6B and 8B. Those of up to 64 rows sum in the same order.
def gemv_tile(k: int, *, gated: bool, itemsize: int) -> GemvTile:
    """128 or 256 bytes of weight a thread, more warps for longer rows."""
    row = triton.next_power_of_2(k) * itemsize * (2 if gated else 1)
    warps, held = (2, 256) if row <= 4096 else (4, 128) if row <= 16384 else (8, 128)
    return GemvTile(max(1, min(16, 32 * warps * held // row)), warps)


def skinny_tile(rows: int, outputs: int, k: int, *, gated: bool, itemsize: int) -> SkinnyTile:
    """64 x 128 of the weight, many stages: bytes in flight count for more than the number of programs, of which 64 are
    enough; long rows are cut for a program a multiprocessor."""
    if gated:
        return SkinnyTile(32, 256, warps=2, stages=5 if itemsize == 2 else 2, block_t=8)
    programs, enough, splits = triton.cdiv(outputs, 64), 132 if k >= 2048 else 64, 1
    while splits < 4 and 2 * splits * programs <= enough and k // (2 * splits) >= 512:
        splits *= 2
    stages = 3 if itemsize > 2 else 7 if rows <= 32 else 5  # as many as shared memory holds
    return SkinnyTile(64, 128, warps=4, stages=stages, splits=splits)


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `matvec.matvec`, for up to `MAX_ROWS` rows. With many rows a gate is a kernel of its own, after rounding.

    `out`: contiguous; where the result goes. Not with a gate.
    """
    rows, k = x.shape
    assert out is None or not gate
    if takes_gemv(rows, k):
        return gemv(x, weight, bias, gate=gate, add=add, out=out)[0]
    if gate and rows > _GATED_ROWS:
        y = act_and_mul(skinny(x, weight, bias), gate)
        return y if add is None else y.add_(add)
    return skinny(x, weight, bias, gate=gate, add=add, out=out)


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
    """As `matvec.norm_matvec`. One kernel where every program can afford the norm; there, x is not rounded after it."""
    rows, k = x.shape
    if rows == 1 or (takes_gemv(rows, k) and weight.numel() <= _FUSED_NORM_MAX_WEIGHTS):
        return gemv(x, weight, bias, gate=gate, norm_weight=norm_weight, eps=eps, residual=residual)
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    return matvec(normed, weight, bias, gate=gate), total


def _check(x: Tensor, weight: Tensor, add: Tensor | None, outputs: int) -> None:
    assert len(x) <= MAX_ROWS and x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert x.stride(1) == 1 and weight.is_contiguous() and x.dtype == weight.dtype, (x.stride(), x.dtype, weight.dtype)
    assert add is None or (add.shape == (len(x), outputs) and add.stride(1) == 1), (add, outputs)


def _result(x: Tensor, outputs: int, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    assert out.shape == (len(x), outputs) and out.dtype == x.dtype and out.is_contiguous(), (out.shape, out.dtype)
    return out


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: GemvTile | None = None,
) -> tuple[Tensor, Tensor]:
    """Product, and the residual stream if there is a norm (else x)."""
    rows, k = x.shape
    outputs = len(weight) // 2 if gate else len(weight)
    _check(x, weight, add, outputs)
    y = _result(x, outputs, out)
    # a buffer of its own: other programs still read `residual`
    total = x if residual is None else torch.empty(rows, k, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y, total
    tile = tile or gemv_tile(k, gated=gate is not None, itemsize=x.element_size())
    _gemv_kernel[(triton.cdiv(outputs, tile.block_n),)](
        x, residual if residual is not None else x, norm_weight if norm_weight is not None else x, weight,
        bias if bias is not None else x, add if add is not None else x, y, total,
        x.stride(0), 0 if residual is None else residual.stride(0), 0 if add is None else add.stride(0), eps,
        T=rows, N=outputs, K=k, BLOCK_N=tile.block_n, BLOCK_K=triton.next_power_of_2(k),
        GATED=gate is not None, ACTIVATION=gate, NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None, HAS_ADD=add is not None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return y, total


def skinny(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
    tile: SkinnyTile | None = None,
) -> Tensor:
    """The product by tensor cores."""
    rows, k = x.shape
    outputs = len(weight) // 2 if gate else len(weight)
    _check(x, weight, add, outputs)
    tile = tile or skinny_tile(rows, outputs, k, gated=gate is not None, itemsize=x.element_size())
    y = _result(x, outputs, out)
    partial = y
    if tile.splits > 1:
        partial = torch.empty(tile.splits, rows, len(weight), dtype=torch.float32, device=x.device)
    span = triton.cdiv(triton.cdiv(k, tile.splits), tile.block_k) * tile.block_k
    flags = {"GATED": gate is not None, "ACTIVATION": gate, "HAS_BIAS": bias is not None, "HAS_ADD": add is not None}
    tail = (bias if bias is not None else x, add if add is not None else x)
    add_stride = 0 if add is None else add.stride(0)
    _skinny_kernel[(triton.cdiv(outputs, tile.block_n), tile.splits)](
        x, weight, *tail, y, partial, rows, x.stride(0), add_stride,
        N=outputs, K=k, BLOCK_T=max(tile.block_t, triton.next_power_of_2(rows)),
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        SPLITS=tile.splits, SPAN=span, AHEAD=min(_AHEAD, triton.next_power_of_2(span)), STAGES=tile.stages,
        num_warps=tile.warps, **flags, **pdl_options(x),
    )  # fmt: skip
    if tile.splits > 1:
        block_n = min(256, triton.next_power_of_2(outputs))
        _add_parts_kernel[(rows, triton.cdiv(outputs, block_n))](
            partial, *tail, y, rows, add_stride,
            N=outputs, BLOCK_N=block_n, SPLITS=tile.splits, num_warps=2, **flags, **pdl_options(x),
        )  # fmt: skip
    return y
