"""Products of one row with a large weight, by programs that all run at once and walk through the weight's rows.

Each has its share of neighbouring rows and a ring of shared memory, through which they pass by asynchronous copies: its
first stages are filled before it waits for the kernel in front (see `pdl_triton`), and each is filled again as soon as
it is multiplied. So the memory has something to do while kernels end and begin: two rings of 96 KiB on each of 132
multiprocessors are 26 MB, six microseconds of reading on an H200. The largest rings leave the next kernel's programs no
room before this one's end: what they asked for earlier would be there when the memory idles. Smaller weights have
smaller rings, and the smallest more programs.

x is read and normalised once a program. Sums are in float32; what follows them is done for all of a program's rows at
its end.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment,var-annotated"
# ruff: noqa: N803, RUF005 - constants of a kernel are in capitals, and Triton knows no starred tuple
from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_mul
from nanoengine.kernels.inboxes_triton import Inboxes, addresses, by_words, next_turn, over_ranks
from nanoengine.kernels.matvec_parts_triton import check, load_if, prefetch_rows, result
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

_PROCESSORS = 132  # of a Hopper GPU
_RING = 96 << 10  # bytes of a program, of which a multiprocessor holds two
_STEP = 16 << 10  # bytes that are multiplied at a time
_PIECE = 4096  # of K: a tensor's elements; half as many where 4096 do not divide K
_WORTH = 24 << 20  # bytes of a weight; smaller ones are held in registers
# Of weights below so many bytes, with rows of so many elements or more: bytes of a ring, programs a multiprocessor,
# warps. The fastest of 8 to 25 tiles for each product of Qwen3-8B, whole or one of two ranks', in chains of layers (one
# H200, 2026-11-30).
_SMALLER = (
    (28 << 20, 0, 32 << 10, 4, 4),
    (40 << 20, 0, 48 << 10, 4, 8),
    (64 << 20, 6144, 48 << 10, 4, 8),
    (64 << 20, 0, 64 << 10, 2, 8),
)


@triton.jit
def _pieces(ptr, row, there, k, K: tl.constexpr, PIECE: tl.constexpr):
    """Rows [R, 1] of K elements: of each piece [R, PIECE]."""
    found = ()
    for first in tl.static_range(0, K, PIECE):
        mask = there & (k < K - first)
        found = found + (tl.load(ptr + row.to(tl.int64) * K + first + k, mask=mask, other=0.0),)
    return found


@triton.jit
def _dot(w, x, ROWS: tl.constexpr, PIECES: tl.constexpr):
    """Pieces of rows times those of x -> [ROWS]."""
    total = tl.zeros((ROWS, w[0].shape[1]), tl.float32)
    for i in tl.static_range(PIECES):
        total += w[i].to(tl.float32) * x[i]
    return tl.sum(total, 1)


@triton.jit
def _read(x_ptr, norms, eps, k, K: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, NORM: tl.constexpr):
    """x in float32, times the norm's weight if there is a norm, and what is left of that for the sums."""
    raw = _pieces(x_ptr, k * 0, k >= 0, k, K, PIECE)
    x = ()
    squares = tl.zeros((1, PIECE), tl.float32)
    for i in tl.static_range(PIECES):
        wide = raw[i].to(tl.float32)
        if NORM:
            squares += wide * wide
            wide *= norms[i].to(tl.float32)
        x = x + (wide,)
    if NORM:
        return x, tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / K + eps)
    else:
        return x, 1.0


@triton.jit
def _ask(
    weight_ptr, program, skipped, N: tl.constexpr, K: tl.constexpr, SHARE: tl.constexpr, AHEAD: tl.constexpr,
    SPAN: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """For AHEAD rows of a program's share, behind those skipped, to be in L2 soon."""
    at = skipped + tl.arange(0, AHEAD)[:, None]
    row = program * SHARE + at
    mask = (at < SHARE) & (row < N)
    prefetch_rows(weight_ptr, row, 0, mask, K, SPAN)
    if GATED:
        prefetch_rows(weight_ptr + N * K, row, 0, mask, K, SPAN)


@triton.jit
def _streamed_kernel(
    x_ptr, norm_weight_ptr, weight_ptr, bias_ptr, add_ptr, y_ptr, data, turns, capacity, eps,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, PADDED: tl.constexpr,
    PIECE: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, OTHER: tl.constexpr, SPAN: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
    RANK: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr, SHARE: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program has STEPS times ROWS outputs. PADDED: STEPS, up to the next power of two; SPAN: K likewise."""
    pieces: tl.constexpr = (K + PIECE - 1) // PIECE
    program, share = tl.program_id(0), STEPS * ROWS
    k = tl.arange(0, PIECE)[None, :]
    at_step = tl.arange(0, PADDED)[:, None]
    release_dependents(PDL)
    norms = ()
    if NORM:
        norms = _pieces(norm_weight_ptr, k * 0, k >= 0, k, K, PIECE)
    x = ()
    for _ in tl.static_range(pieces):
        x = x + (tl.zeros((1, PIECE), tl.float32),)
    scale = 1.0
    if SIZE > 1:
        others, turn = addresses(data, SIZE), 0
    sums = tl.zeros((PADDED, ROWS), tl.float32)
    ups = tl.zeros((PADDED, ROWS), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row = program * share + step * ROWS + tl.arange(0, ROWS)[:, None]
        w = _pieces(weight_ptr, row, row < N, k, K, PIECE)
        if GATED:
            u = _pieces(weight_ptr, row + N, row < N, k, K, PIECE)
        if step == 0:  # in the loop, so that copies of its first stages are in front of the wait
            if PDL and AHEAD > 0:
                _ask(weight_ptr, program, (STAGES - 1) * ROWS, N, K, STEPS * ROWS, AHEAD, SPAN, GATED)
            if PDL and OTHER > 0:
                later = program + (tl.num_programs(0) + 1) // 2
                _ask(weight_ptr, later, 0, N, K, STEPS * ROWS, OTHER, SPAN, GATED)
            wait_for_inputs(PDL)
            if SIZE > 1:
                turn = next_turn(turns)
            x, scale = _read(x_ptr, norms, eps, k, K, PIECE, pieces, NORM)
        sums = tl.where(at_step == step, _dot(w, x, ROWS, pieces)[None, :], sums)
        if GATED:
            ups = tl.where(at_step == step, _dot(u, x, ROWS, pieces)[None, :], ups)
    n = program * share + at_step * ROWS + tl.arange(0, ROWS)[None, :]
    mask = (at_step < STEPS) & (n < N)
    y = sums * scale + load_if(HAS_BIAS, bias_ptr + n, mask)
    if GATED:
        y = act_mul(y, ups * scale + load_if(HAS_BIAS, bias_ptr + N + n, mask), ACTIVATION)
    more = load_if(HAS_ADD, add_ptr + n, mask)
    if SIZE > 1:
        y = over_ranks(y, n, mask, others, turns, turn, capacity, RANK, SIZE, PLACES, SHARE, ASM)
    y += more
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class StreamedTile:
    """Rows of the weight a step (with as many ups, if there is a gate), stages of the ring and one more, warps, and
    programs at most.

    ahead: rows of its own, behind the ring, that a program asks for before it waits. other: as many of the program half
    of all behind: where only half of them find room beside the kernel in front, the others' rows are in L2 too.
    """

    rows: int
    stages: int
    warps: int = 8
    programs: int = 2 * _PROCESSORS
    ahead: int = 0
    other: int = 0


def _piece(k: int) -> int:
    widest = _PIECE if k <= _PIECE or k % _PIECE == 0 else _PIECE // 2
    return min(widest, 1 << (k - 1).bit_length())


def streamed_tile(k: int, *, gated: bool, itemsize: int, ring: int = _RING) -> StreamedTile | None:
    """None where the ring holds fewer than two steps."""
    row = triton.cdiv(k, _piece(k)) * _piece(k) * itemsize * (2 if gated else 1)
    rows = 1 << max(0, (_STEP // row).bit_length() - 1)
    held = ring // (rows * row)
    return StreamedTile(rows, held + 1) if held >= 2 else None


def tile_of(rows: int, outputs: int, k: int, *, gated: bool, itemsize: int) -> StreamedTile | None:
    """The tile of a product that is worth it: of one row, with a large weight; an output layer is none of a layer's."""
    weight = outputs * (2 if gated else 1) * k * itemsize
    if rows != 1 or weight < _WORTH or k < 2048 or k * itemsize % 16 or outputs > 1 << 15:
        return None
    fitting = (each[2:] for each in _SMALLER if weight < each[0] and k >= each[1])
    ring, programs, warps = next(fitting, (_RING, 2, 8))
    tile = streamed_tile(k, gated=gated, itemsize=itemsize, ring=ring)
    if tile is None:
        return None
    few = itemsize == 2 and not gated and 2 * _PIECE < k <= 3 * _PIECE  # of a row, in a program's registers
    return replace(tile, programs=programs * _PROCESSORS, warps=4 if few else warps)


def _steps(tile: StreamedTile, outputs: int) -> int:
    """Of each program but the last."""
    return -(-outputs // (tile.rows * tile.programs))


def constants(tile: StreamedTile, outputs: int, k: int) -> dict[str, int]:
    """Those of the kernel that the tile and the weight decide."""
    steps = _steps(tile, outputs)
    return {
        "N": outputs, "K": k, "ROWS": tile.rows, "STEPS": steps, "PADDED": triton.next_power_of_2(steps),
        "PIECE": _piece(k), "STAGES": tile.stages,
        "AHEAD": tile.ahead, "OTHER": tile.other, "SPAN": triton.next_power_of_2(k),
    }  # fmt: skip


def programs_of(tile: StreamedTile, outputs: int) -> int:
    """How many programs a launch has."""
    return -(-outputs // (_steps(tile, outputs) * tile.rows))


def streamed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tile: StreamedTile,
    gate: Activation | None = None,
    add: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
    inboxes: Inboxes | None = None,
) -> Tensor:
    """The product, of x [1, K] normalised first if there is a norm. inboxes: it is summed over ranks."""
    rows, k = x.shape
    assert rows == 1, rows
    outputs = len(weight) // 2 if gate else len(weight)
    check(x, weight, add, outputs)
    y = result(x, outputs, out)
    programs = programs_of(tile, outputs)
    _streamed_kernel[(programs,)](
        x, norm_weight if norm_weight is not None else x, weight, bias if bias is not None else x,
        add if add is not None else x, y, eps=eps, **constants(tile, outputs, k), **by_words(inboxes, x, programs),
        GATED=gate is not None, ACTIVATION=gate, NORM=norm_weight is not None,
        HAS_BIAS=bias is not None, HAS_ADD=add is not None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return y
