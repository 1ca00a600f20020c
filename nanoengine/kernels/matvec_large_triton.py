"""Products of few rows with a large weight, by tensor cores in tiles of outputs x tokens.

The norm in front and, beyond 16 rows, the gate are kernels of their own. Where tiles alone make too few programs the
sum over K is cut in parts, each written down and added in order by a second kernel: no atomics, so a product comes out
the same every time.
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
from nanoengine.kernels.matvec_parts_triton import check, prefetch_rows, result
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

_GATED_ROWS = 16
_AHEAD = 512  # elements of each weight row that a program asks for before it waits


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


@triton.jit(do_not_specialize=["rows"])
def _large_kernel(
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
        prefetch_rows(weight_ptr, n, first, n_mask, K, AHEAD)
        if GATED:
            prefetch_rows(weight_ptr + N * K, n, first, n_mask, K, AHEAD)
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
class LargeTile:
    """Outputs, K and (at least) tokens a tile, warps, pipeline stages, parts of K."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1
    block_t: int = 16


# Within 5% of the best of some 2,000 trials for the shapes of Qwen3-8B (bf16, H200, torch 2.11, Triton 3.6,
# 2026-11-21).
def large_tile(rows: int, outputs: int, k: int, *, gated: bool, itemsize: int) -> LargeTile:
    """64 x 128 of the weight, many stages: bytes in flight count for more than the number of programs, of which 64 are
    enough; long rows are cut for a program a multiprocessor."""
    if gated and rows <= _GATED_ROWS:
        return LargeTile(32, 256, warps=2, stages=5 if itemsize == 2 else 2, block_t=8)
    programs, enough, splits = triton.cdiv(outputs * (1 + gated), 64), 132 if k >= 2048 else 64, 1
    while splits < 4 and 2 * splits * programs <= enough and k // (2 * splits) >= 512:
        splits *= 2
    stages = 3 if itemsize > 2 else 7 if rows <= 32 else 5  # as many as shared memory holds
    return LargeTile(64, 128, warps=4, stages=stages, splits=splits)


def large(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tile: LargeTile,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The product. Beyond 16 rows a gate is applied after rounding; `out` is not supported with a gate."""
    rows, k = x.shape
    assert out is None or not gate
    if gate and rows > _GATED_ROWS:
        y = act_and_mul(large(x, weight, bias, tile=tile), gate)
        return y if add is None else y.add_(add)
    outputs = len(weight) // 2 if gate else len(weight)
    check(x, weight, add, outputs)
    y = result(x, outputs, out)
    partial = y
    if tile.splits > 1:
        partial = torch.empty(tile.splits, rows, len(weight), dtype=torch.float32, device=x.device)
    span = triton.cdiv(triton.cdiv(k, tile.splits), tile.block_k) * tile.block_k
    flags = {"GATED": gate is not None, "ACTIVATION": gate, "HAS_BIAS": bias is not None, "HAS_ADD": add is not None}
    tail = (bias if bias is not None else x, add if add is not None else x)
    add_stride = 0 if add is None else add.stride(0)
    _large_kernel[(triton.cdiv(outputs, tile.block_n), tile.splits)](
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
