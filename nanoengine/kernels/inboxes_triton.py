"""Sums over the GPUs of one host at the end of the products that are summed: no kernel of their own.

Ranks write into each other's inboxes, and each reads its own. Two ways, of which a product takes one:

- words of 64 bits, here: a value and the number of the sum, its turn. A word is never torn, so a rank that finds the
  turn in it has the value, too, and ranks need not meet;
- copies of a tile, and a signal behind them (`matmul_gluon`).

A program sends its own results, waits for what the programs of the same number sent on other ranks, and adds all up in
rank order: so all ranks get the same bits. It sends before it waits, and ranks launch the same programs in the same
order, so all of them come to an end.

Inboxes have two halves, used by turns. A rank that writes into a half for the turn after next has finished the next
sum, to which all ranks have sent; and each sends when its own kernels before that product are complete, also the one
that read the half. `turns` counts on the device, so that a captured graph goes on counting. It is the same in all
places: a program reads and writes its own place, and writes those that no program of its launch reads. No turn is 0, as
a new inbox is.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803, RUF005 - constants of a kernel are in capitals, and Triton knows no starred tuple
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES = 1024
"""The most programs of a product that is summed over ranks."""
WAIT = tl.constexpr("""{
    .reg .b32 value, stamp;
    .reg .b64 word;
    .reg .pred again;
    mov.b32 value, 0;
    setp.eq.b32 again, $3, 0;
    @again bra DONE;
AGAIN:
    ld.relaxed.sys.global.b64 word, [$1];
    mov.b64 {value, stamp}, word;
    setp.ne.b32 again, stamp, $2;
    @again bra AGAIN;
DONE:
    mov.b32 $0, value;
}""")
"""PTX: an address, a turn, whether to wait -> the value that came in this turn; 0 if not to wait."""


@dataclass(frozen=True, slots=True, eq=False)
class Inboxes:
    """Where ranks write to each other, as one of them sees it.

    Attributes:
        rank, size: of the group.
        words, copies: int64 [size]; addresses of each rank's two halves of [size, capacity] bytes. Words are 0 at
            first, and only words are ever written there.
        signals: int64 [size]; address of each rank's int32 [size, PLACES], zero at first.
        turns: int32 [PLACES], this rank's own; zero at first.
        capacity: bytes of words, and of copies; multiples of 16.
    """

    rank: int
    size: int
    words: Tensor
    copies: Tensor
    signals: Tensor
    turns: Tensor
    capacity: tuple[int, int]


@triton.jit
def addresses(table, SIZE: tl.constexpr):
    """What a rank's table has of each rank: read early, as nothing ever writes it."""
    found = ()
    for peer in tl.static_range(SIZE):
        found = found + (tl.load(table + peer),)
    return found


@triton.jit
def next_turn(turns):
    """The number of the next sum; never 0, and odd and even by turns all the same."""
    turn = tl.load(turns + tl.program_id(0)) + 1
    return tl.where(turn == 0, 2, turn)


@triton.jit
def _words(address, turn, sender, capacity, SIZE: tl.constexpr):
    """Where `sender` writes into a rank's memory in this turn."""
    place = ((turn & 1) * SIZE + sender).to(tl.int64) * capacity
    return (address + place).to(tl.pointer_type(tl.int64))


@triton.jit
def _received(words_ptr, turn, mask, ASM: tl.constexpr):
    """Values of this turn, once all have come. ASM: each thread waits for its own, and for no other thread.

    In a loop of one pass, of which the compiler makes no second one with values at other threads."""
    if ASM:
        values, once = tl.zeros(words_ptr.shape, tl.float32), turn * 0
        while once == 0:
            given = [words_ptr.to(tl.int64), turn, mask.to(tl.int32)]
            values = tl.inline_asm_elementwise(WAIT, "=f,l,r,r", given, tl.float32, is_pure=False, pack=1)
            once += 1
        return values
    else:
        words = tl.load(words_ptr, mask=mask, other=0, volatile=True)
        while tl.max(tl.ravel(((words >> 32).to(tl.int32) != turn).to(tl.int32) & mask.to(tl.int32)), 0) > 0:
            words = tl.load(words_ptr, mask=mask, other=0, volatile=True)
        return words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def over_ranks(
    values, at, mask, data, turns, turn, capacity, RANK: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr,
    SHARE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The sum over ranks of float32 values at the places `at`, which no other program of the launch has.

    data: `addresses`. SHARE: a power of two; at least as many as a program's share of the places."""
    words = (values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (turn.to(tl.int64) << 32)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            tl.store(_words(data[peer], turn, RANK, capacity, SIZE) + at, words, mask=mask)
    total = tl.zeros_like(values)
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            total += values
        else:
            total += _received(_words(data[RANK], turn, peer, capacity, SIZE) + at, turn, mask, ASM)
    tl.debug_barrier()  # all threads have read the turn
    i = tl.program_id(0) + tl.arange(0, SHARE) * tl.num_programs(0)
    tl.store(turns + i, turn, mask=i < PLACES)
    return total


def by_words(inboxes: Inboxes | None, unused: Tensor, programs: int) -> dict[str, Any]:
    """Arguments of a kernel whose results are summed over ranks by words; of one rank, if there are no inboxes."""
    assert inboxes is None or programs <= PLACES, programs
    data = unused if inboxes is None else inboxes.words
    native = unused.is_cuda and torch.version.hip is None
    return {"data": data, **of_sum(inboxes, 0, unused, programs), "ASM": native}


def of_sum(inboxes: Inboxes | None, way: int, unused: Tensor, programs: int) -> dict[str, Any]:
    """Those arguments that kernels of both ways take. way: 0: words, 1: copies."""
    if inboxes is None:
        return {"turns": unused, "capacity": 16, "RANK": 0, "SIZE": 1, "PLACES": PLACES, "SHARE": 1}
    return {
        "turns": inboxes.turns, "capacity": inboxes.capacity[way], "RANK": inboxes.rank, "SIZE": inboxes.size,
        "PLACES": PLACES, "SHARE": triton.next_power_of_2(triton.cdiv(PLACES, programs)),
    }  # fmt: skip
