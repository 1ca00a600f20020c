"""Sums over the GPUs of one host at the end of a product in Gluon, by copies of its tiles; see `inboxes_triton`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803, RUF005 - constants of a kernel are in capitals, and Triton knows no starred tuple
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nanoengine.kernels.inboxes_triton import PLACES, Inboxes, of_sum

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # by its name in Triton 3.6, and behind it


@gluon.jit
def addresses(table, SIZE: gl.constexpr):
    """What a rank's table has of each rank: read early, as nothing ever writes it."""
    found = ()
    for peer in gl.static_range(SIZE):
        found = found + (gl.load(table + peer),)
    return found


@gluon.jit
def next_turn(turns):
    """(this program's place, the number of the next sum)."""
    place = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    turn = gl.load(turns + place) + 1
    return place, gl.where(turn == 0, 2, turn)


@gluon.jit
def _copies(address, turn, sender, capacity, SIZE: gl.constexpr, KIND: gl.constexpr):
    """Where `sender` writes into a rank's memory in this turn."""
    place = ((turn & 1) * SIZE + sender).to(gl.int64) * capacity
    return gl.multiple_of((address + place).to(gl.pointer_type(KIND)), 16)


@gluon.jit
def over_ranks(y, at, mask, KIND: gl.constexpr, data, signals, turns, place, turn, capacity, RANK: gl.constexpr,
               SIZE: gl.constexpr, PLACES: gl.constexpr, SHARE: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """The sum over ranks of y, rounded on each. at: places in the whole result. data, signals: `addresses`."""
    copy = y.to(KIND)
    for peer in gl.static_range(SIZE):
        if peer != RANK:
            gl.store(_copies(data[peer], turn, RANK, capacity, SIZE, KIND) + at, copy, mask=mask)
    barrier()  # every thread's copies are written before one of them signals, and all have read the turn
    for peer in gl.static_range(SIZE):
        if peer != RANK:
            theirs = signals[peer].to(gl.pointer_type(gl.int32))
            gl.atomic_xchg(theirs + RANK * PLACES + place, turn, sem="release", scope="sys")
    mine = signals[RANK].to(gl.pointer_type(gl.int32))
    for peer in gl.static_range(SIZE):
        if peer != RANK:
            signal = mine + peer * PLACES + place
            while ((gl.atomic_add(signal, 0, sem="acquire", scope="sys") - turn) & -4) != 0:
                pass  # until it is this turn or the next, which may be three further; any other number is an old one
    barrier()
    total = gl.zeros_like(y)
    for peer in gl.static_range(SIZE):
        if peer == RANK:
            total += copy.to(gl.float32)
        else:
            copies = _copies(data[RANK], turn, peer, capacity, SIZE, KIND)
            total += gl.load(copies + at, mask=mask, other=0.0, cache_modifier=".cg").to(gl.float32)
    programs = gl.num_programs(0) * gl.num_programs(1)
    i = place + programs * gl.arange(0, SHARE, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.store(turns + i, turn, mask=i < PLACES)
    return total


def by_copies(begin: Callable[[], Inboxes] | None, unused: Tensor, programs: int) -> dict[str, Any]:
    """Arguments of a kernel whose results are summed over ranks by copies; of one rank, if begin is None."""
    assert begin is None or programs <= PLACES, programs
    inboxes = None if begin is None else begin()
    data, signals = (unused, unused) if inboxes is None else (inboxes.copies, inboxes.signals)
    return {"data": data, "signals": signals, **of_sum(inboxes, 1, unused, programs)}
