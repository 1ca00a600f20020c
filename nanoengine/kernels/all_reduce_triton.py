"""Small all-reduces over the GPUs of one host, each a single kernel that reads the other ranks' memory.

Every rank reads all partial sums and adds them in rank order ("one shot"), so all ranks get the same bits. The residual
stream is added in the same kernel. Ranks meet once, before they read: each program signals to the program of the same
number on the other ranks that its partial sum is written, and waits for their signals. There is no second meeting after
reading: before a rank writes into memory that others read here, all must have met once more. `distributed.symmetric`
ensures this by using three buffers in turn.

`turn` counts meetings, on the device, so that a captured graph goes on counting. It may wrap around.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

MAX_PROGRAMS = 128
"""Programs that meet. All of them run at once on any GPU that has as many multiprocessors, and there is no other way:
one that waited for a place while its peers wait for it would never come."""

_TILE = 2048


@dataclass(frozen=True, slots=True)
class Peers:
    """Where the ranks' memory is to be found, as one rank sees it.

    Attributes:
        rank, size: of the group.
        data: int64 [size]; address of each rank's buffer.
        signals: int64 [size]; address of each rank's int32 [size, MAX_PROGRAMS], zero at first.
        turns: int32 [MAX_PROGRAMS], this rank's own; zero at first.
    """

    rank: int
    size: int
    data: Tensor
    signals: Tensor
    turns: Tensor


@triton.jit
def _meet(signals, turns, RANK: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr):
    """Returns the number of the meeting, once this program of every rank has come to it."""
    place = tl.program_id(0)
    turn = tl.load(turns + place) + 1
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            theirs = tl.load(signals + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(theirs + RANK * PLACES + place, turn, sem="release", scope="sys")
    mine = tl.load(signals + RANK).to(tl.pointer_type(tl.int32))
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            while tl.atomic_add(mine + peer * PLACES + place, 0, sem="acquire", scope="sys") - turn < 0:
                pass
    tl.debug_barrier()
    tl.store(turns + place, turn)
    return turn


@triton.jit
def _all_reduce_add_kernel(
    data, signals, turns, residual_ptr, out_ptr, offset, count,
    RANK: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr, TILE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    release_dependents(PDL)
    wait_for_inputs(PDL)
    _meet(signals, turns, RANK, SIZE, PLACES)
    for first in range(tl.program_id(0) * TILE, count, tl.num_programs(0) * TILE):
        i = first + tl.arange(0, TILE)
        mask = i < count
        total = tl.zeros([TILE], tl.float32)
        for peer in tl.static_range(SIZE):
            base = tl.load(data + peer).to(tl.pointer_type(out_ptr.dtype.element_ty))
            values = tl.load(tl.multiple_of(base, 16) + offset + i, mask=mask, other=0.0, volatile=True)
            total += values.to(tl.float32)
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=mask)


def all_reduce_add(
    peers: Peers, offset: int, like: Tensor, residual: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """As `all_reduce.all_reduce_add`. Every rank must call it, with the same shape and offset.

    Args:
        offset: elements of `like`'s dtype from each rank's buffer's start to its partial sum; a multiple of 16 bytes.
        like: [T, H], contiguous; its shape and dtype are the result's.
        residual: [T, H], contiguous.
        out: as `like`; None: it is made.
    """
    assert like.is_contiguous() and (residual is None or residual.is_contiguous())
    out = torch.empty_like(like) if out is None else out
    count = like.numel()
    if count == 0:
        return out
    _all_reduce_add_kernel[(min(MAX_PROGRAMS, triton.cdiv(count, _TILE)),)](
        peers.data, peers.signals, peers.turns, out if residual is None else residual, out, offset, count,
        RANK=peers.rank, SIZE=peers.size, PLACES=MAX_PROGRAMS, TILE=_TILE, HAS_RESIDUAL=residual is not None,
        num_warps=8, **pdl_options(like),
    )  # fmt: skip
    return out


@triton.jit
def _highest_kernel(
    keys_ptr, data, signals, turns, out_ptr, count, half,
    RANK: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release_dependents(PDL)
    wait_for_inputs(PDL)
    i = tl.arange(0, BLOCK)
    mask = i < count
    keys = tl.load(keys_ptr + i, mask=mask, other=0)
    offset = ((tl.load(turns) + 1) & 1) * half  # a peer may still be reading the other half
    mine = tl.load(data + RANK).to(tl.pointer_type(tl.int64)) + offset
    tl.store(mine + i, keys, mask=mask)
    tl.debug_barrier()
    _meet(signals, turns, RANK, SIZE, PLACES)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            theirs = tl.load(data + peer).to(tl.pointer_type(tl.int64)) + offset
            keys = tl.maximum(keys, tl.load(theirs + i, mask=mask, other=0, volatile=True))
    tl.store(out_ptr + i, keys, mask=mask)


def highest(peers: Peers, keys: Tensor, half: int, out: Tensor | None = None) -> Tensor:
    """As `all_reduce.highest`, of this rank's keys int64 [R] and the other ranks'. Every rank must call it.

    `peers.data`: address of each rank's int64 [2, half], R <= half. `out`: int64 [R]; None: it is made.
    """
    assert len(keys) <= half
    out = torch.empty_like(keys) if out is None else out
    _highest_kernel[(1,)](
        keys, peers.data, peers.signals, peers.turns, out, len(keys), half,
        RANK=peers.rank, SIZE=peers.size, PLACES=MAX_PROGRAMS, BLOCK=triton.next_power_of_2(max(len(keys), 1)),
        **pdl_options(keys),
    )  # fmt: skip
    return out
