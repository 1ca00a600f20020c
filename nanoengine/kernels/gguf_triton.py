"""Products with weights in the blocks of a GGUF file, and rows of them. The reference is `gguf`, in plain torch.

- one or two rows: without tensor cores, a program holds a few rows of the weight; sums in float32;
- more: a tile is decoded in registers, rounded to x's dtype, and multiplied by tensor cores; sums in float32;
- very many: a slice of the weight is decoded to memory (it stays in L2), and the library multiplies.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.gguf import BLOCK_TYPES
from nanoengine.kernels.gguf_decode_triton import decode, weight_index

FEW_ROWS, TILED_ROWS = 2, 256
_SLICE = 1 << 24  # weights decoded to memory at a time: 32 MB in 16 bits, less than the L2 cache


@triton.jit
def _few_kernel(
    x_ptr, blocks_ptr, bias_ptr, y_ptr, x_stride, y_stride,
    KIND: tl.constexpr, T: tl.constexpr, N: tl.constexpr, ROW_BYTES: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.arange(0, BLOCK_U)
    lane = tl.arange(0, 16)
    rows = blocks_ptr + n.to(tl.int64)[:, None, None] * ROW_BYTES
    sums = tl.zeros((BLOCK_N, BLOCK_U, 16), tl.float32)
    others = tl.zeros((BLOCK_N, BLOCK_U, 16), tl.float32)
    for start in tl.range(0, UNITS, BLOCK_U):
        units = start + unit
        here = units < UNITS
        mask = (n < N)[:, None, None] & here[None, :, None]
        low, high = decode(rows, units[None, :, None], lane[None, None, :], mask, UNITS, KIND)
        k, apart = weight_index(units[:, None], lane[None, :], KIND)
        x = tl.load(x_ptr + k, mask=here[:, None], other=0.0).to(tl.float32)[None, :, :]
        x_high = tl.load(x_ptr + k + apart, mask=here[:, None], other=0.0).to(tl.float32)[None, :, :]
        sums += low * x
        sums += high * x_high
        if T == 2:
            x = tl.load(x_ptr + x_stride + k, mask=here[:, None], other=0.0).to(tl.float32)[None, :, :]
            x_high = tl.load(x_ptr + x_stride + k + apart, mask=here[:, None], other=0.0).to(tl.float32)[None, :, :]
            others += low * x
            others += high * x_high
    _write(sums, 0, n, bias_ptr, y_ptr, y_stride, N, HAS_BIAS)
    if T == 2:
        _write(others, 1, n, bias_ptr, y_ptr, y_stride, N, HAS_BIAS)


@triton.jit
def _write(sums, t, n, bias_ptr, y_ptr, y_stride, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums [N, U, 16] of token t."""
    y = tl.sum(tl.sum(sums, axis=2), axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * y_stride + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["tokens"])
def _tiled_kernel(
    x_ptr, blocks_ptr, bias_ptr, y_ptr, tokens, x_stride, y_stride,
    KIND: tl.constexpr, N: tl.constexpr, ROW_BYTES: tl.constexpr, UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr, HAS_BIAS: tl.constexpr,
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
    HAS_IDS: tl.constexpr,
):  # fmt: skip
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


def few_tile(units: int) -> BlockTile:
    """16 bytes of codes of each row a thread, at most 128 threads."""
    return BlockTile(4, min(128, triton.next_power_of_2(units)), 1, warps=4)


def dot_tile(tokens: int, outputs: int) -> BlockTile:
    """128 weights of a row at a time; narrow where wide tiles would leave multiprocessors idle."""
    block_n = 64 if outputs >= 64 * 132 else 32
    return BlockTile(block_n, 4, min(64, max(16, triton.next_power_of_2(tokens))), warps=4)


def gguf_linear(
    x: Tensor, blocks: Tensor, kind: str, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias: [T, in], uint8 [out, bytes of a row], [out] -> [T, out]. See `gguf.gguf_linear`.

    x: with contiguous rows. Beyond `FEW_ROWS` decoded weights are rounded to x's dtype, as an expanded weight is.
    """
    check(x, blocks, kind)
    if out is None:
        out = torch.empty(len(x), len(blocks), dtype=x.dtype, device=x.device)
    assert out.shape == (len(x), len(blocks)) and out.stride(1) == 1, (out.shape, out.stride())
    if not out.numel():
        return out
    if len(x) <= FEW_ROWS:
        return few(x, blocks, kind, bias, out, few_tile(x.shape[1] // 32))
    if len(x) <= TILED_ROWS:
        return tiled(x, blocks, kind, bias, out, dot_tile(len(x), len(blocks)))
    rows = max(1, _SLICE // x.shape[1])
    for start in range(0, len(blocks), rows):
        part = slice(start, start + rows)
        values = dequantise(blocks[part], kind, x.dtype)
        out[:, part] = F.linear(x, values, None if bias is None else bias[part])
    return out


def gguf_rows(ids: Tensor, blocks: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding: int [T], contiguous -> [T, in] of `dtype`."""
    return _rows(ids, blocks, kind, dtype, len(ids))


def dequantise(blocks: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """uint8 [rows, bytes of a row] -> [rows, weights of a row] of `dtype`."""
    return _rows(None, blocks, kind, dtype, len(blocks))


def check(x: Tensor, blocks: Tensor, kind: str) -> None:
    assert x.dim() == 2 and x.stride(1) == 1, (x.shape, x.stride())
    assert blocks.dtype == torch.uint8 and blocks.is_contiguous(), (blocks.dtype, blocks.stride())
    assert blocks.shape[1] == BLOCK_TYPES[kind].row_bytes(x.shape[1]), (blocks.shape, x.shape, kind)


def few(x: Tensor, blocks: Tensor, kind: str, bias: Tensor | None, out: Tensor, tile: BlockTile) -> Tensor:
    """The product of one or two rows."""
    _few_kernel[(triton.cdiv(len(blocks), tile.block_n),)](
        x, blocks, blocks if bias is None else bias, out, x.stride(0), out.stride(0),
        KIND=kind, T=len(x), N=len(blocks), ROW_BYTES=blocks.shape[1], UNITS=x.shape[1] // 32,
        BLOCK_N=tile.block_n, BLOCK_U=tile.block_u, HAS_BIAS=bias is not None, num_warps=tile.warps,
    )  # fmt: skip
    return out


def tiled(x: Tensor, blocks: Tensor, kind: str, bias: Tensor | None, out: Tensor, tile: BlockTile) -> Tensor:
    """The product of any number of rows, by tensor cores."""
    _tiled_kernel[(triton.cdiv(len(blocks), tile.block_n), triton.cdiv(len(x), tile.block_t))](
        x, blocks, blocks if bias is None else bias, out, len(x), x.stride(0), out.stride(0),
        KIND=kind, N=len(blocks), ROW_BYTES=blocks.shape[1], UNITS=x.shape[1] // 32,
        BLOCK_N=tile.block_n, BLOCK_T=tile.block_t, BLOCK_U=tile.block_u, HAS_BIAS=bias is not None,
        num_warps=tile.warps,
    )  # fmt: skip
    return out


def _rows(ids: Tensor | None, blocks: Tensor, kind: str, dtype: torch.dtype, count: int) -> Tensor:
    assert blocks.dtype == torch.uint8 and blocks.is_contiguous(), (blocks.dtype, blocks.stride())
    assert ids is None or ids.is_contiguous()
    units = BLOCK_TYPES[kind].width(blocks.shape[1]) // 32
    out = torch.empty(count, units * 32, dtype=dtype, device=blocks.device)
    block = min(64, triton.next_power_of_2(units))
    if out.numel():
        _rows_kernel[(count, triton.cdiv(units, block))](
            blocks if ids is None else ids, blocks, out, KIND=kind, ROW_BYTES=blocks.shape[1], UNITS=units,
            BLOCK_U=block, HAS_IDS=ids is not None, num_warps=4,
        )  # fmt: skip
    return out
