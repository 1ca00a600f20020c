"""Triton: decode attention of many rows, in equal shares.

The keys of all (row, KV head) pairs stand in one list of tiles, and as many programs as run at once each take an equal
piece of it, wherever it begins and ends ("stream-K", Osama et al. 2023). One program a pair leaves multiprocessors idle
behind its last wave, the more so the more the rows' lengths differ. Lengths are read on the device, so a captured
launch serves all of them.

A pair that one program has whole is written at once. Else each program leaves its part in scratch memory and takes a
ticket; the last to come adds the parts up, in order. A program has at most two parts: what its piece begins with, where
another program has the pair's start, and what it ends with. They lie at its places 2 p and 2 p + 1.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, SIM102 - constants of a kernel are in capitals, and its branches are taken when it is compiled
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.paged_attention_decode_triton import (
    DecodeScratch,
    attend_keys,
    combine,
    keys_ahead,
    padded_head,
    prefetch_keys,
    rows_of,
)
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs


@triton.jit
def _first_key(length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The first key of a row's first tile."""
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE * TILE
    return first


@triton.jit
def _decode_shares(
    q, k_cache, v_cache, out, block_tables, seq_lens, part, lse, tickets, q_stride, table_stride, rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    GROUP_P2: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ROWS_P2: tl.constexpr,
    PROGRAMS: tl.constexpr, MIN_TILES: tl.constexpr, SPLITS_P2: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # Lengths and tables may be read before the wait: see `_decode`.
    each_row = tl.arange(0, ROWS_P2)
    lens = tl.load(seq_lens + each_row, mask=each_row < rows, other=0)
    tiles = tl.cdiv(lens - _first_key(lens, TILE, WINDOW), TILE) * KV_HEADS
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0).to(tl.int64)
    programs = tl.minimum(tl.maximum(total // MIN_TILES, 1), PROGRAMS)
    at = (program * total // programs).to(tl.int32)
    stop = ((program + 1) * total // programs).to(tl.int32)
    row = tl.sum((ends <= at).to(tl.int32), 0)
    row_at = tl.max(tl.where(ends <= at, ends, 0), 0)  # where the row's tiles begin in the list
    live = program < programs
    if PDL and AHEAD > 0:
        if live:
            length = tl.load(seq_lens + row)
            first = _first_key(length, TILE, WINDOW)
            each = tl.cdiv(length - first, TILE)
            begin = first + (at - row_at) % each * TILE
            table = block_tables + row.to(tl.int64) * table_stride
            kv_head = (at - row_at) // each
            prefetch_keys(k_cache, table, kv_head, begin, length, KV_HEADS, D, BLOCK_SIZE, AHEAD)
            prefetch_keys(v_cache, table, kv_head, begin, length, KV_HEADS, D, BLOCK_SIZE, AHEAD)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    if not live:
        return

    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, D_PAD)
    rows_live = (g < GROUP)[:, None] & (d < D)[None, :]
    within = g[:, None] * D + d[None, :]
    while at < stop:
        length = tl.load(seq_lens + row)
        first = _first_key(length, TILE, WINDOW)
        each = tl.cdiv(length - first, TILE)  # tiles of one pair
        kv_head = (at - row_at) // each
        pair_at = row_at + kv_head * each
        until = tl.minimum(stop, pair_at + each)
        begin = first + (at - pair_at) * TILE
        end = tl.minimum(first + (until - pair_at) * TILE, length)
        wide_row = row.to(tl.int64)
        query = tl.load(q + wide_row * q_stride + kv_head * (GROUP * D) + within, mask=rows_live, other=0.0)
        acc, top, weights = attend_keys(
            query, k_cache, v_cache, block_tables + wide_row * table_stride, kv_head, begin, end, length,
            KV_HEADS, GROUP_PAD, D, D_PAD, BLOCK_SIZE, TILE, SCALE, WINDOW, SOFT_CAP, STAGES,
        )  # fmt: skip
        mixed = acc / weights[:, None]
        to = out + (wide_row * KV_HEADS + kv_head) * (GROUP * D)
        if until - at == each:
            tl.store(to + within, mixed.to(out.dtype.element_ty), mask=rows_live)
        else:
            starts_here = at == pair_at
            place = 2 * program + starts_here.to(tl.int32)
            tl.store(part + place * (GROUP * D) + within, mixed, mask=rows_live)
            tl.store(lse + place * GROUP + g, top + tl.log2(weights), mask=g < GROUP)
            # programs that hold the pair's first and last tile: the highest p with p * total // programs <= tile
            low = (((pair_at + 1) * programs.to(tl.int64) - 1) // total).to(tl.int32)
            high = (((pair_at + each) * programs.to(tl.int64) - 1) // total).to(tl.int32)
            used = high - low + 1
            tl.debug_barrier()  # every thread's part is written before one of them releases the ticket
            ticket = tickets + wide_row * KV_HEADS + kv_head
            if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == used - 1:
                combine(
                    part + 2 * low * (GROUP * D), lse + 2 * low * GROUP, to, used,
                    GROUP, GROUP_P2, D, D_PAD, SPLITS_P2, CHUNK, 2,
                )  # fmt: skip
                tl.store(ticket, 0)  # for the next launch
        at = until
        if at == row_at + each * KV_HEADS:
            row += 1
            row_at = at


@dataclass(frozen=True, slots=True)
class SharesConfig:
    """`tile`: keys an iteration; `programs`: at most; `min_tiles`: the smallest share; `stages`: tiles in flight;
    `registers`: most a thread may have, so that as many programs as meant run at once."""

    tile: int
    programs: int
    min_tiles: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def places(self) -> int:
        """Parts in scratch memory."""
        return 2 * self.programs


def shares_config(head_size: int, itemsize: int, multiprocessors: int) -> SharesConfig:
    """As measured at 128 x bf16: tiles of 128 keys read fastest, three programs of them fill a multiprocessor, and
    adding parts up takes as long as some hundred keys."""
    tile = max(16, min(128, 32768 // (padded_head(head_size) * itemsize)))
    return SharesConfig(
        tile=tile, programs=3 * multiprocessors, min_tiles=max(1, 256 // tile), warps=4, stages=3, registers=168
    )  # fmt: skip


def attend_shares(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: SharesConfig,
    scratch: DecodeScratch,
) -> None:
    """As `attend_decode`. `scratch` holds `config.places` parts and a ticket a pair."""
    rows, heads, width = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    if rows == 0:
        return
    group, q = heads // kv_heads, rows_of(q)
    d_pad, group_p2 = padded_head(width), triton.next_power_of_2(group)
    splits_p2 = triton.next_power_of_2(config.programs)
    chunk = min(splits_p2, max(1, 8192 // (group_p2 * d_pad)), 4)
    ahead = keys_ahead(config.programs, 2 * width * q.element_size())
    _decode_shares[(config.programs,)](
        q, k_cache, v_cache, out, block_tables, seq_lens, scratch.part, scratch.lse, scratch.tickets,
        q.stride(0), block_tables.stride(0), rows,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, group_p2), GROUP_P2=group_p2, D=width, D_PAD=d_pad,
        BLOCK_SIZE=block_size, TILE=config.tile, ROWS_P2=max(16, triton.next_power_of_2(rows)),
        PROGRAMS=config.programs, MIN_TILES=config.min_tiles, SPLITS_P2=splits_p2, CHUNK=chunk, SCALE=scale,
        WINDOW=window or 0, SOFT_CAP=soft_cap or 0.0, STAGES=config.stages, AHEAD=ahead,
        num_warps=config.warps, maxnreg=config.registers, **pdl_options(q),
    )  # fmt: skip
