"""Products with weights in the blocks of a GGUF file, in planes, and rows of them. The reference is `gguf`, in plain
torch. Weights that `gguf_fragments` takes do not come here.

- one row: without tensor cores, a program holds a few rows of the weight; sums in float32; with the norm in front and
  the gate behind it;
- more: a tile is decoded in registers, rounded to x's dtype, and multiplied by tensor cores; sums in float32;
- very many: a slice of the weight is decoded to memory (it stays in L2), and the library multiplies.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_and_mul, act_mul
from nanoengine.kernels.gguf import BLOCK_TYPES
from nanoengine.kernels.gguf_decode_triton import decode, weight_index
from nanoengine.kernels.matvec_parts_triton import load_if, prefetch_rows
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.rms_norm_triton import add_rms_norm

TILED_ROWS = 16  # each tile of tokens decodes the weight: of more, memory is faster (one H200, 2026-11-29)
_SLICE = 1 << 24  # weights decoded to memory at a time: 32 MB in 16 bits, less than the L2 cache
_LINES = 64  # rows of the weight, of which a slice is a multiple, as the library's products want them
_AHEAD = 1024  # bytes of each row that a program asks for before it waits


@triton.jit
def _one_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, blocks_ptr, bias_ptr, y_ptr, total_ptr, eps,
    KIND: tl.constexpr, N: tl.constexpr, ROW_BYTES: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.arange(0, BLOCK_U)
    lane = tl.arange(0, 16)
    rows = blocks_ptr + n.to(tl.int64)[:, None, None] * ROW_BYTES
    y = tl.zeros((BLOCK_N,), tl.float32)
    up = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((1,), tl.float32)
    release_dependents(PDL)
    for start in tl.range(0, UNITS, BLOCK_U):
        units = start + unit
        here = (units < UNITS)[:, None]
        mask = (n < N)[:, None, None] & here[None, :, :]
        low, high = decode(rows, units[None, :, None], lane[None, None, :], mask, UNITS, KIND)
        if GATED:
            up_rows = rows + N * ROW_BYTES
            up_low, up_high = decode(up_rows, units[None, :, None], lane[None, None, :], mask, UNITS, KIND)
        k, apart = weight_index(units[:, None], lane[None, :], KIND)
        wait_for_inputs(PDL)
        x = _input(x_ptr, residual_ptr, total_ptr, k, here, HAS_RESIDUAL)
        x_high = _input(x_ptr, residual_ptr, total_ptr, k + apart, here, HAS_RESIDUAL)
        if NORM:
            squares += tl.sum(tl.sum(x * x + x_high * x_high, axis=1), axis=0)
            x *= tl.load(norm_weight_ptr + k, mask=here, other=0.0).to(tl.float32)
            x_high *= tl.load(norm_weight_ptr + k + apart, mask=here, other=0.0).to(tl.float32)
        y += tl.sum(tl.sum(low * x[None, :, :] + high * x_high[None, :, :], axis=2), axis=1)
        if GATED:
            up += tl.sum(tl.sum(up_low * x[None, :, :] + up_high * x_high[None, :, :], axis=2), axis=1)
    if NORM:
        scale = tl.rsqrt(squares / (UNITS * 32) + eps)
        y, up = y * scale, up * scale
    y += load_if(HAS_BIAS, bias_ptr + n, n < N)
    if GATED:
        y = act_mul(y, up + load_if(HAS_BIAS, bias_ptr + N + n, n < N), ACTIVATION)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _input(x_ptr, residual_ptr, total_ptr, k, mask, HAS_RESIDUAL: tl.constexpr):
    """x, with the residual stream added, in float32. All programs need the sum, one writes it down."""
    x = tl.load(x_ptr + k, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + k, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        if tl.program_id(0) == 0:
            tl.store(total_ptr + k, x, mask=mask)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def _tiled_kernel(
    x_ptr, blocks_ptr, bias_ptr, y_ptr, tokens, x_stride, y_stride,
    KIND: tl.constexpr, N: tl.constexpr, ROW_BYTES: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr, HAS_BIAS: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    half: tl.constexpr = BLOCK_U * 16  # weights of a row in each of the two results of `decode`
    j = tl.arange(0, half)
    unit = tl.arange(0, BLOCK_U)[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    rows = blocks_ptr + n.to(tl.int64)[:, None, None] * ROW_BYTES
    x_rows = x_ptr + t.to(tl.int64)[None, :] * x_stride
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    release_dependents(PDL)
    if PDL:
        prefetch_rows(blocks_ptr, n[:, None], 0, (n < N)[:, None], ROW_BYTES, AHEAD)
    wait_for_inputs(PDL)
    for start in tl.range(0, UNITS, BLOCK_U):
        mask = (n < N)[:, None, None] & (start + unit < UNITS)
        low, high = decode(rows, start + unit, lane, mask, UNITS, KIND)
        k, apart = weight_index(start + j // 16, j % 16, KIND)
        x_mask = (t < tokens)[None, :] & (start + j // 16 < UNITS)[:, None]
        x = tl.load(x_rows + k[:, None], mask=x_mask, other=0.0)
        x_high = tl.load(x_rows + k[:, None] + apart, mask=x_mask, other=0.0)
        acc = tl.dot(tl.reshape(low, (BLOCK_N, half)).to(x.dtype), x, acc, input_precision="ieee")
        acc = tl.dot(tl.reshape(high, (BLOCK_N, half)).to(x.dtype), x_high, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + t.to(tl.int64)[None, :] * y_stride + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (t < tokens)[None, :])


@triton.jit
def _rows_kernel(
    ids_ptr, blocks_ptr, out_ptr,
    KIND: tl.constexpr, ROW_BYTES: tl.constexpr, UNITS: tl.constexpr, BLOCK_U: tl.constexpr,
    HAS_IDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)  # before the next kernel may start: see `embedding_triton`
    release_dependents(PDL)
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + place).to(tl.int64) if HAS_IDS else place
    units = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    lane = tl.arange(0, 16)
    here = units < UNITS
    rows = blocks_ptr + row * ROW_BYTES + tl.zeros((1, 1, 1), tl.int64)
    low, high = decode(rows, units[None, :, None], lane[None, None, :], here[None, :, None], UNITS, KIND)
    k, apart = weight_index(units[:, None], lane[None, :], KIND)
    out = out_ptr + place * (UNITS * 32) + k
    kind = out_ptr.dtype.element_ty
    tl.store(out, tl.reshape(low, (BLOCK_U, 16)).to(kind), mask=here[:, None])
    tl.store(out + apart, tl.reshape(high, (BLOCK_U, 16)).to(kind), mask=here[:, None])


@dataclass(frozen=True, slots=True)
class BlockTile:
    """Rows of the weight, units of a row and tokens that a program holds at a time, and its warps."""

    block_n: int
    block_u: int
    block_t: int
    warps: int


def one_tile(units: int, *, gated: bool) -> BlockTile:
    """16 bytes of codes of each row a thread, at most 128 threads. All programs read x, so a program has some rows, but
    more than these four were slower (Q4_K, one H200, 2026-11-29)."""
    return BlockTile(4 // (1 + gated), min(128, triton.next_power_of_2(units)), 1, warps=4)


def dot_tile(tokens: int, outputs: int) -> BlockTile:
    """128 weights of a row at a time; narrow where wide tiles would leave multiprocessors idle. Tokens are few tiles,
    because each decodes the weight."""
    block_n = 64 if outputs >= 64 * 132 else 32
    block_t = min(128, max(16, triton.next_power_of_2(tokens)))
    return BlockTile(block_n, 4, block_t, warps=8 if block_t > 64 else 4)


def gguf_linear(
    x: Tensor, planes: Tensor, kind: str, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias: [T, in], uint8 [out, bytes of a row] in planes, [out] -> [T, out]. See `gguf.gguf_linear`.

    x: with contiguous rows. Of several rows the decoded weight is rounded to x's dtype, as an expanded weight is.
    """
    check(x, planes, kind)
    if out is None:
        out = torch.empty(len(x), len(planes), dtype=x.dtype, device=x.device)
    assert out.shape == (len(x), len(planes)) and out.stride(1) == 1, (out.shape, out.stride())
    if not out.numel():
        return out
    if len(x) == 1:
        return one(x, planes, kind, bias, out=out)[0]
    if len(x) <= TILED_ROWS:
        return tiled(x, planes, kind, bias, out, dot_tile(len(x), len(planes)))
    return by_slices(x, bias, out, lambda part: dequantise(planes[part], kind, x.dtype))


def by_slices(x: Tensor, bias: Tensor | None, out: Tensor, decode: Callable[[slice], Tensor]) -> Tensor:
    """The product with a weight of which `decode` decodes rows, a multiple of 64 of them at a time."""
    rows = max(_LINES, _SLICE // x.shape[1] // _LINES * _LINES)
    for start in range(0, out.shape[1], rows):
        part = slice(start, start + rows)
        columns = decode(part).t()
        if bias is None:
            torch.mm(x, columns, out=out[:, part])
        else:
            torch.addmm(bias[part], x, columns, out=out[:, part])
    return out


def gguf_norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    planes: Tensor,
    kind: str,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm`, the product, and `act_and_mul` if there is a gate -> (result, residual stream)."""
    if len(x) == 1:
        return one(x, planes, kind, bias, residual=residual, norm_weight=norm_weight, eps=eps, gate=gate)
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    y = gguf_linear(normed, planes, kind, bias)
    return (act_and_mul(y, gate) if gate else y), total


def gguf_rows(ids: Tensor, planes: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding: int [T], contiguous -> [T, in] of `dtype`."""
    return _rows(ids, planes, kind, dtype, len(ids))


def dequantise(planes: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """uint8 [rows, bytes of a row] -> [rows, weights of a row] of `dtype`."""
    return _rows(None, planes, kind, dtype, len(planes))


def check(x: Tensor, planes: Tensor, kind: str) -> None:
    assert x.dim() == 2 and x.stride(1) == 1, (x.shape, x.stride())
    assert planes.dtype == torch.uint8 and planes.is_contiguous(), (planes.dtype, planes.stride())
    assert planes.shape[1] == BLOCK_TYPES[kind].row_bytes(x.shape[1]), (planes.shape, x.shape, kind)


def one(
    x: Tensor,
    planes: Tensor,
    kind: str,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gate: Activation | None = None,
    out: Tensor | None = None,
    tile: BlockTile | None = None,
) -> tuple[Tensor, Tensor]:
    """The product of one row, normalised first if there is a norm, and the residual stream."""
    check(x, planes, kind)
    assert len(x) == 1 and (residual is None or residual.stride(1) == 1), (x.shape, residual)
    outputs, units = len(planes) // 2 if gate else len(planes), x.shape[1] // 32
    y = torch.empty(1, outputs, dtype=x.dtype, device=x.device) if out is None else out
    total = x if residual is None else torch.empty_like(x)
    tile = tile or one_tile(units, gated=gate is not None)
    _one_kernel[(triton.cdiv(outputs, tile.block_n),)](
        x, x if residual is None else residual, x if norm_weight is None else norm_weight, planes,
        x if bias is None else bias, y, total, eps,
        KIND=kind, N=outputs, ROW_BYTES=planes.shape[1], UNITS=units, BLOCK_N=tile.block_n, BLOCK_U=tile.block_u,
        GATED=gate is not None, ACTIVATION=gate, NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return y, total


def tiled(x: Tensor, planes: Tensor, kind: str, bias: Tensor | None, out: Tensor, tile: BlockTile) -> Tensor:
    """The product of any number of rows, by tensor cores."""
    _tiled_kernel[(triton.cdiv(len(planes), tile.block_n), triton.cdiv(len(x), tile.block_t))](
        x, planes, planes if bias is None else bias, out, len(x), x.stride(0), out.stride(0),
        KIND=kind, N=len(planes), ROW_BYTES=planes.shape[1], UNITS=x.shape[1] // 32,
        BLOCK_N=tile.block_n, BLOCK_T=tile.block_t, BLOCK_U=tile.block_u, HAS_BIAS=bias is not None,
        AHEAD=min(_AHEAD, triton.next_power_of_2(planes.shape[1])), num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return out


def _rows(ids: Tensor | None, planes: Tensor, kind: str, dtype: torch.dtype, count: int) -> Tensor:
    assert planes.dtype == torch.uint8 and planes.is_contiguous(), (planes.dtype, planes.stride())
    assert ids is None or ids.is_contiguous()
    units = BLOCK_TYPES[kind].width(planes.shape[1]) // 32
    out = torch.empty(count, units * 32, dtype=dtype, device=planes.device)
    block = min(64, triton.next_power_of_2(units))
    if out.numel():
        _rows_kernel[(count, triton.cdiv(units, block))](
            planes if ids is None else ids, planes, out, KIND=kind, ROW_BYTES=planes.shape[1], UNITS=units,
            BLOCK_U=block, HAS_IDS=ids is not None, num_warps=4,
            **pdl_options(planes),
        )  # fmt: skip
    return out
