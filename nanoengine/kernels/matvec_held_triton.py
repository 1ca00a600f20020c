"""Products of some rows by tensor cores whose programs hold their whole part of the weight before they wait.

As the kernel without tensor cores (`matvec_triton`) does it: the weight is in shared memory when the kernel in front
ends (see `pdl_triton`), so what is left is one read of x, the norm, the product and a sum over slices. Each warp
multiplies its own slices of K; their sums are added in order, so a row comes out the same beside any others.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment,var-annotated"
# ruff: noqa: N803, RUF005 - constants of a kernel are in capitals, and Triton knows no starred tuple
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.matvec_parts_triton import check, finish, halves, load_if, pick_rows, pin, result
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

SLICES = 8
_PIECE = 1024  # of K: what is loaded and multiplied at a time


@triton.jit
def _pairs(parts, M: tl.constexpr, T: tl.constexpr, COUNT: tl.constexpr):
    """[M, T, COUNT] -> [M, T, COUNT / 2], each the sum of two neighbours."""
    a, b = tl.split(tl.reshape(parts, (M, T, COUNT // 2, 2)))
    return a + b


@triton.jit
def _fold(parts, M: tl.constexpr, T: tl.constexpr):
    """Sum of [8, M, T] over the slices -> [M, T], neighbours first.

    What `tl.sum` gives, which takes up to ten times as long: it passes sums from warp to warp element by element, where
    this writes all of them down once and each thread reads its own.
    """
    quarters = _pairs(_pairs(tl.permute(parts, (1, 2, 0)), M, T, 8), M, T, 4)
    a, b = tl.split(quarters)
    return a + b


@triton.jit(do_not_specialize=["rows"])
def _held_kernel(
    x_ptr, norm_weight_ptr, weight_ptr, bias_ptr, add_ptr, y_ptr, rows, x_stride, add_stride, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pieces: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    span: tl.constexpr = BLOCK_K // SLICES
    width: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    row, source = pick_rows(tl.program_id(0), N, BLOCK_N, GATED)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    # [slice, row or token, k of the slice]
    k = (tl.arange(0, SLICES)[:, None] * span + tl.arange(0, span)[None, :])[:, None, :]
    w_ptrs = weight_ptr + source.to(tl.int64)[None, :, None] * K + k
    x_ptrs = x_ptr + t.to(tl.int64)[None, :, None] * x_stride + k
    w_mask, x_mask = (row < N)[None, :, None], (t < rows)[None, :, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    mask = (n < N) & (t < rows)[None, :]
    release_dependents(PDL)
    weights = ()
    norms = ()
    for piece in tl.static_range(pieces):
        k_mask = k < K - piece * BLOCK_K
        weights = weights + (tl.load(w_ptrs + piece * BLOCK_K, mask=w_mask & k_mask, other=0.0),)
        if NORM:
            norms = norms + (tl.load(norm_weight_ptr + piece * BLOCK_K + k, mask=k_mask, other=0.0),)
    bias = load_if(HAS_BIAS, bias_ptr + n, n < N)
    bias_up = load_if(HAS_BIAS and GATED, bias_ptr + N + n, n < N)
    wait_for_inputs(PDL)
    tokens = ()
    for piece in tl.static_range(pieces):
        tokens = tokens + (tl.load(x_ptrs + piece * BLOCK_K, mask=x_mask & (k < K - piece * BLOCK_K), other=0.0),)
    extra = load_if(HAS_ADD, add_ptr + t[None, :] * add_stride + n, mask)
    if PDL and pieces > 1 and x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        held = ()  # all of x is asked for before any of it is awaited
        for piece in tl.static_range(pieces):
            held = held + (pin(tokens[piece]),)
        tokens = held
    acc = tl.zeros((SLICES, width, BLOCK_T), tl.float32)
    squares = tl.zeros((SLICES, BLOCK_T), tl.float32)
    for piece in tl.static_range(pieces):
        x = tokens[piece]
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 2)
            x = (wide * norms[piece].to(tl.float32)).to(x.dtype)
        acc = tl.dot(weights[piece], tl.trans(x, 0, 2, 1), acc, input_precision="ieee")
    acc = _fold(acc, width, BLOCK_T)
    if NORM:
        acc *= tl.rsqrt(_fold(squares[:, None, :], 1, BLOCK_T) / K + eps)
    y, up = halves(acc, BLOCK_N, BLOCK_T, GATED)
    finish(y, up, bias, bias_up, extra, y_ptr + t[None, :] * N + n, mask, GATED, ACTIVATION)


@dataclass(frozen=True, slots=True)
class HeldTile:
    """Outputs a program, its warps (at most `SLICES`), and at most tokens a tile. None of it changes a sum's order."""

    block_n: int
    warps: int
    block_t: int


def held(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tile: HeldTile,
    gate: Activation | None = None,
    add: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """The product, of x normalised first if there is a norm."""
    rows, k = x.shape
    outputs = len(weight) // 2 if gate else len(weight)
    check(x, weight, add, outputs)
    y = result(x, outputs, out)
    block_t = min(tile.block_t, max(8, triton.next_power_of_2(rows)))
    block_k = min(_PIECE, max(16 * SLICES, triton.next_power_of_2(k)))
    _held_kernel[(triton.cdiv(outputs, tile.block_n), triton.cdiv(rows, block_t))](
        x, norm_weight if norm_weight is not None else x, weight, bias if bias is not None else x,
        add if add is not None else x, y, rows, x.stride(0), 0 if add is None else add.stride(0), eps,
        N=outputs, K=k, BLOCK_T=block_t, BLOCK_N=tile.block_n, BLOCK_K=block_k, SLICES=SLICES,
        GATED=gate is not None, ACTIVATION=gate, NORM=norm_weight is not None,
        HAS_BIAS=bias is not None, HAS_ADD=add is not None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return y
