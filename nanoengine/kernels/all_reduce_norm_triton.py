"""A sum of few rows over the GPUs of one host, with the residual stream and the norm behind it, in one kernel.

Ranks write into each other's inboxes, and each reads its own. A product of one or two rows sends itself (`send_words`):
a value goes as a word of 64 bits, 32 of which are the number of the sum, its turn. A word is never torn, so a rank that
finds the turn in it has the value, too, and ranks need not meet. Other products, which may be in parts of K, are added
up and copied here; then ranks meet.

Inboxes have two halves, used by turns. A rank that writes into a half for the turn after next has finished the next
sum, so all ranks have begun that; and each begins it when its own kernels before it are complete, also the one that
read the half. `turns` counts on the device, so that a captured graph goes on counting. It is the same in all places: a
program writes its own place, and those that no program of its launch reads. No turn is 0, as a new inbox is.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.all_reduce_triton import MAX_PROGRAMS, Peers, meet_at
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs


@dataclass(frozen=True, slots=True)
class Inboxes:
    """Where ranks write to each other: words, or copies.

    peers: `data`: address of each rank's two halves of [size, capacity] bytes. Those of words are 0 at first, and only
        words are ever written there. `turns` and `signals` are the same for both.
    capacity: a multiple of 16.
    """

    peers: Peers
    capacity: int


@triton.jit
def next_turn(turns, place):
    """The number of the next sum; never 0, and odd and even by turns all the same."""
    turn = tl.load(turns + place) + 1
    return tl.where(turn == 0, 2, turn)


@triton.jit
def _inbox(data, rank, turn, sender, capacity, SIZE: tl.constexpr, KIND: tl.constexpr):
    """Where `sender` writes into a rank's memory in this turn."""
    place = ((turn & 1) * SIZE + sender).to(tl.int64) * capacity
    return tl.multiple_of((tl.load(data + rank) + place).to(tl.pointer_type(KIND)), 16)


@triton.jit
def send_words(values, at, mask, data, turn, capacity, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Writes float32 values, with their turn, at the places `at` of this rank's part of all other ranks' inboxes."""
    words = (values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (turn.to(tl.int64) << 32)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            tl.store(_inbox(data, peer, turn, RANK, capacity, SIZE, tl.int64) + at, words, mask=mask)


@triton.jit
def _received_words(words_ptr, turn, mask):
    """Values of this turn, once all have come."""
    words = tl.load(words_ptr, mask=mask, other=0, volatile=True)
    while tl.max(((words >> 32).to(tl.int32) != turn).to(tl.int32) & mask.to(tl.int32), 0) > 0:
        words = tl.load(words_ptr, mask=mask, other=0, volatile=True)
    return words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _all_reduce_norm_kernel(
    parts_ptr, residual_ptr, norm_weight_ptr, total_ptr, normed_ptr, data, signals, turns, capacity, eps,
    RANK: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, SENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release_dependents(PDL)
    row, rows = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    mask, at = col < WIDTH, row * WIDTH + col
    kind: tl.constexpr = total_ptr.dtype.element_ty
    weight = tl.load(norm_weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    turn = next_turn(turns, row)
    stream = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    own = tl.load(parts_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        own += tl.load(parts_ptr + part * rows * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    if not SENT:
        copy = own.to(kind)
        for peer in tl.static_range(SIZE):
            if peer != RANK:
                tl.store(_inbox(data, peer, turn, RANK, capacity, SIZE, kind) + at, copy, mask=mask)
        own = copy.to(tl.float32)  # as the others get it
        tl.debug_barrier()  # every thread's copies are written before one of them signals
        meet_at(turn, signals, RANK, SIZE, PLACES)
    tl.debug_barrier()
    i = tl.arange(0, PLACES)
    tl.store(turns + i, turn, mask=i % rows == row)
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            total += own
        elif SENT:
            total += _received_words(_inbox(data, RANK, turn, peer, capacity, SIZE, tl.int64) + at, turn, mask)
        else:
            copies = _inbox(data, RANK, turn, peer, capacity, SIZE, kind)
            total += tl.load(copies + at, mask=mask, other=0.0, volatile=True).to(tl.float32)
    x = (total + stream).to(kind)
    tl.store(total_ptr + at, x, mask=mask)
    x = x.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * weight
    tl.store(normed_ptr + at, y.to(kind), mask=mask)


def all_reduce_norm(
    inboxes: Inboxes,
    parts: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    sent: bool,
    out: Tensor,
    normed: Tensor,
) -> None:
    """As `all_reduce.all_reduce_norm`. Every rank must call it, with the same shapes, and `sent` or not.

    Args:
        inboxes: of words, which the product has sent, or of copies.
        parts: [parts, T, H], contiguous. residual: [T, H], contiguous. norm_weight: [H].
        out, normed: [T, H], contiguous; what is written.
    """
    count, rows, width = parts.shape
    assert rows <= MAX_PROGRAMS, rows  # as they meet
    assert all(each.is_contiguous() for each in (parts, residual, out, normed))
    assert rows * width * (8 if sent else out.element_size()) <= inboxes.capacity, (rows, width)
    peers, block = inboxes.peers, triton.next_power_of_2(width)
    _all_reduce_norm_kernel[(rows,)](
        parts, residual, norm_weight, out, normed, peers.data, peers.signals, peers.turns, inboxes.capacity, eps,
        RANK=peers.rank, SIZE=peers.size, PLACES=MAX_PROGRAMS, WIDTH=width, BLOCK=block, PARTS=count, SENT=sent,
        num_warps=min(16, max(1, block // 256)), **pdl_options(out),
    )  # fmt: skip
