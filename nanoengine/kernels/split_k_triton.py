"""Sums over K that several programs share: the last one to come adds the parts up, in order, and finishes the tile.

A program has `BLOCK_N` outputs (program_id 0), a part of K (1) and `BLOCK_T` tokens (2). Here is what `int4_triton`
and `gguf_fragments_triton` share around and behind their loops; and the tickets, which other kernels use too.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.matmul import Scaled
from nanoengine.kernels.matvec_parts_triton import finish, halves, load_if
from nanoengine.kernels.norm_parts_triton import norm_scale, prepare_norm
from nanoengine.kernels.pdl_triton import pdl_options

_MOST_TILES = 1024


@triton.jit
def come(ticket_ptr):
    """Behind the stores of a part: how many parts came before it. The last one sets the ticket to 0 again."""
    tl.debug_barrier()  # every thread's part is written before one of them releases the ticket
    return tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _tile():
    return tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _part(part_ptr, split, SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr):
    place = tl.arange(0, WIDTH)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    return part_ptr + _tile() * (SPLITS * WIDTH * BLOCK_T) + split * (WIDTH * BLOCK_T) + place


@triton.jit
def leave_part(acc, part_ptr, ticket_ptr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr):
    """Writes this program's sums [WIDTH, BLOCK_T]; how many parts of the tile came before it."""
    tl.store(_part(part_ptr, tl.program_id(1), SPLITS, WIDTH, BLOCK_T), acc)
    return come(ticket_ptr + _tile())


@triton.jit
def join_parts(part_ptr, ticket_ptr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr):
    """All parts of the tile, added up."""
    tl.store(ticket_ptr + _tile(), 0)  # for the next launch
    acc = tl.zeros((WIDTH, BLOCK_T), tl.float32)
    for split in tl.static_range(SPLITS):  # .cg: other programs wrote it; never from this multiprocessor's own L1
        acc += tl.load(_part(part_ptr, split, SPLITS, WIDTH, BLOCK_T), cache_modifier=".cg")
    return acc


@triton.jit
def load_around(
    tile, t, bias_ptr, add_ptr, rows, add_stride,
    N: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
):  # fmt: skip
    """What stands around the sums of a tile and the tokens t [1, BLOCK_T], in float32: biases, those of ups, what is
    added. 0 where there is none."""
    n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    bias, up = load_if(HAS_BIAS, bias_ptr + n, n < N), load_if(HAS_BIAS and GATED, bias_ptr + N + n, n < N)
    return bias, up, load_if(HAS_ADD, add_ptr + t.to(tl.int64) * add_stride + n, (n < N) & (t < rows))


@triton.jit
def write_tile(
    acc, tile, t, around, y_ptr, rows, y_stride,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """What follows the sums of a tile, which are normalised already, and the tokens t [1, BLOCK_T]. around: of
    `load_around`. Returns what was stored, where, and the mask."""
    n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    mask, to = (n < N) & (t < rows), t.to(tl.int64) * y_stride + n
    y, up = halves(acc, BLOCK_N, BLOCK_T, GATED)
    return finish(y, up, around[0], around[1], around[2], y_ptr + to, mask, GATED, ACTIVATION), to, mask


@triton.jit
def finish_tile(
    acc, t, bias_ptr, add_ptr, y_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr,
    rows, y_stride, add_stride, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
    SQUARES: tl.constexpr, PARTS: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """What follows the sums of the tokens t [BLOCK_T]. SQUARES: parts of the sum of squares by which a token is
    normalised; 0: it is not."""
    tile, t = tl.program_id(0), t[None, :]
    if SQUARES > 0:
        acc *= norm_scale(squares_ptr, t, rows, SQUARES, PARTS, K, eps)
    around = load_around(tile, t, bias_ptr, add_ptr, rows, add_stride, N, BLOCK_N, GATED, HAS_BIAS, HAS_ADD)
    y, to, mask = write_tile(acc, tile, t, around, y_ptr, rows, y_stride, N, BLOCK_T, BLOCK_N, GATED, ACTIVATION)
    if NEXT:
        n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        weight = tl.load(next_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        prepare_norm(y, weight, scaled_ptr + to, sums_ptr + tile * rows + t, t, mask, rows)


def tickets_on(device: torch.device) -> Tensor:
    """Counters of the parts of each tile; zero between launches. Launches that share them must follow each other in
    one stream."""
    return torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)


def parts_of(y: Tensor, grid: tuple[int, int, int], size: int, tickets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the programs of `grid` leave parts of `size` float32 each, and their tickets, made anew if None is given.
    With one part of K neither is used: y twice."""
    if grid[1] == 1:
        return y, y
    assert grid[0] * grid[2] <= _MOST_TILES, grid
    parts = torch.empty(grid[0] * grid[1] * grid[2] * size, dtype=torch.float32, device=y.device)
    return parts, tickets_on(y.device) if tickets is None else tickets


class SplitProduct:
    """The launch of a product into y [T, outputs], of x [T, K] or of x that the product before it normalised.

    Attributes:
        scaled: what `next_norm` needs of the result: see `matmul.matmul`. grid: of the programs.
        arguments: of the kernel, behind x and the weight. constants: of the kernel; and launch options.
    """

    def __init__(
        self,
        x: Tensor | Scaled,
        y: Tensor,
        bias: Tensor | None,
        *,
        eps: float,
        gate: Activation | None,
        add: Tensor | None,
        next_norm: Tensor | None,
        tickets: Tensor | None,
        block_n: int,
        block_t: int,
        splits: int,
    ) -> None:
        squares = x.squares if isinstance(x, Scaled) else None
        x = x.values if isinstance(x, Scaled) else x
        rows, outputs = y.shape
        assert add is None or (add.shape == y.shape and add.stride(1) == 1), (add, outputs)
        tiles = triton.cdiv(outputs, block_n)
        self.scaled: Scaled | None = None
        if next_norm is not None:
            assert y.is_contiguous() and y.dtype == x.dtype, (y.stride(), y.dtype)
            sums = torch.empty(tiles, rows, dtype=torch.float32, device=x.device)
            self.scaled = Scaled(next_norm, torch.empty_like(y), sums)
        self.grid = (tiles, splits, triton.cdiv(rows, block_t))
        next_of = (y, y, y) if self.scaled is None else (next_norm, self.scaled.values, self.scaled.squares)
        self.arguments: tuple[Any, ...] = (
            x if bias is None else bias, x if add is None else add, y,
            *parts_of(y, self.grid, block_n * (2 if gate else 1) * block_t, tickets),
            y if squares is None else squares, *next_of,
            rows, x.stride(0), y.stride(0), 0 if add is None else add.stride(0), eps,
        )  # fmt: skip
        self.constants: dict[str, Any] = {
            "N": outputs, "K": x.shape[1], "BLOCK_T": block_t, "BLOCK_N": block_n, "SPLITS": splits,
            "GATED": gate is not None, "ACTIVATION": gate, "HAS_BIAS": bias is not None, "HAS_ADD": add is not None,
            "SQUARES": 0 if squares is None else len(squares),
            "PARTS": 1 if squares is None else triton.next_power_of_2(len(squares)),
            "NEXT": self.scaled is not None, "ASM": x.is_cuda and torch.version.hip is None, **pdl_options(x),
        }  # fmt: skip
