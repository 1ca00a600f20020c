"""Triton: decode attention of several queries a row over the paged cache: a token and the drafts behind it.

A tile has the queries of one row with all heads of one KV head, so its keys are read once for all of them: up to 16
(query, head) pairs cost what one query does. The keys are split over programs as in `paged_attention_decode_triton`.
How many queries a row has is read on the device: a captured launch serves rows of 0 to `queries` of them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803, RUF005, SIM102, SIM108 - constants of a kernel are in capitals, its branches are taken when it is
# compiled, and Triton knows no starred tuple
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.paged_attention_plan import SeveralConfig, padded_head
from nanoengine.kernels.paged_attention_read_triton import (
    LOG2E,
    Scales,
    blocks_of,
    capped,
    prefetch_keys,
    rows_of,
    scaled,
)
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.split_k_triton import come

_AT_ONCE = tl.constexpr(8)  # parts whose loads are in flight together


@triton.jit
def _zero_padding(
    out, padding, count, head,
    HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Zeros at tokens [padding, padding + count): they are never read, but they must be finite."""
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, D_PAD)
    at = ((padding + m // GROUP).to(tl.int64) * HEADS + head) * D
    none = tl.zeros([BLOCK_M, D_PAD], out.dtype.element_ty)
    tl.store(out + at[:, None] + d[None, :], none, mask=(m // GROUP < count)[:, None] & (d < D)[None, :])


@triton.jit
def _combine(
    part, lse, out, used, pairs,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Sum of the `used` parts of the first so many (query, head) pairs of a tile, each weighed by its share of the
    softmax's denominator; so many pairs at a time that a thread has a few elements. A part may have seen no key."""
    step: tl.constexpr = 1 if D_PAD >= 512 else 512 // D_PAD
    i = tl.arange(0, step * D_PAD)
    for first_pair in range(0, pairs, step):
        pair, d = first_pair + i // D_PAD, i % D_PAD
        live = (pair < pairs) & (d < D)
        pair = tl.minimum(pair, pairs - 1)
        top = tl.full([step * D_PAD], float("-inf"), tl.float32)
        total = tl.zeros([step * D_PAD], tl.float32)
        acc = tl.zeros([step * D_PAD], tl.float32)
        for first in range(0, used, _AT_ONCE):
            # .cg: other programs wrote all this; never from this multiprocessor's own L1
            marks, parts = (), ()
            for near in tl.static_range(_AT_ONCE):
                there = first + near < used
                mark = lse + (first + near) * ROWS + pair
                marks = marks + (tl.load(mark, mask=there, other=float("-inf"), cache_modifier=".cg"),)
                mixed = part + ((first + near) * ROWS + pair) * D + d
                parts = parts + (tl.load(mixed, mask=there & live, other=0.0, cache_modifier=".cg"),)
            higher = top
            for near in tl.static_range(_AT_ONCE):
                higher = tl.maximum(higher, marks[near])
            base = tl.where(higher == float("-inf"), 0.0, higher)
            fade = tl.exp2(top - base)
            total *= fade
            acc *= fade
            for near in tl.static_range(_AT_ONCE):
                share = tl.exp2(marks[near] - base)
                total += share
                acc += share * parts[near]
            top = higher
        to = (pair // GROUP).to(tl.int64) * STRIDE + (pair % GROUP) * D + d
        tl.store(out + to, (acc / total).to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["queries", "pad_tokens", "min_tiles"])
def _decode_several(
    q, k_cache, v_cache, k_scales, v_scales, out, block_tables, seq_lens, starts, part, lse, tickets, sinks,
    q_stride, table_stride, queries, pad_tokens, min_tiles,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr, SINKS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) % KV_HEADS
    tile = tl.program_id(0) // KV_HEADS  # of the row's queries
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)  # slowest, so that programs without work start behind those with
    # Lengths, offsets and tables are complete before a step's first layer starts: see `paged_attention_decode_triton`.
    length = tl.load(seq_lens + row, cache_modifier=".cg")
    start = tl.load(starts + row, cache_modifier=".cg")
    stop = tl.load(starts + row + 1, cache_modifier=".cg")
    behind = tl.load(starts + tl.num_programs(1), cache_modifier=".cg")  # the first token of no row
    first = start + tile * BLOCK_Q  # token
    lowest = length - stop + first  # position of the tile's first query
    last = tl.minimum(lowest + BLOCK_Q, length)  # keys from here on are ahead of every query
    edge = 0
    if WINDOW > 0:
        edge = tl.maximum(lowest - WINDOW + 1, 0) // TILE * TILE
    tiles = tl.where(first < stop, tl.cdiv(last - edge, TILE), 0)
    tiles_each = tl.maximum(tl.cdiv(tiles, SPLITS), min_tiles)
    used = tl.cdiv(tiles, tiles_each)
    begin = edge + tl.minimum(split, used) * tiles_each * TILE
    end = tl.minimum(begin + tiles_each * TILE, last)
    table = block_tables + row * table_stride
    if PDL and AHEAD > 0:
        if split < used:
            prefetch_keys(k_cache, table, kv_head, begin, end, KV_HEADS, D, BLOCK_SIZE, AHEAD)
            prefetch_keys(v_cache, table, kv_head, begin, end, KV_HEADS, D, BLOCK_SIZE, AHEAD)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    near = tl.arange(0, TILE)
    head = kv_head * GROUP + m % GROUP
    wait_for_inputs(PDL)
    release_dependents(PDL)
    if split == 0:
        # Each row has its share of the padding: as many tokens as it has fewer queries than `queries`.
        spare = tl.minimum(start + queries - stop - tile * BLOCK_Q, BLOCK_Q)
        padding = behind + row.to(tl.int32) * queries - start + tile * BLOCK_Q
        spare = tl.minimum(spare, pad_tokens - padding)
        if spare > 0:
            _zero_padding(out, padding, spare, head, KV_HEADS * GROUP, D, D_PAD, BLOCK_M, GROUP)
    if split >= used:
        return

    token = first + m // GROUP
    pairs = tl.minimum(stop - first, BLOCK_Q) * GROUP
    live = (m < pairs)[:, None] & (d < D)[None, :]
    position = tl.minimum(lowest + m // GROUP, last - 1)
    own = (token.to(tl.int64) * q_stride + head * D)[:, None] + d[None, :]
    query = tl.load(q + own, mask=live, other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    if SINKS:
        if split == 0:  # a key without a value, which the row's first program counts
            top = LOG2E * tl.load(sinks + head).to(tl.float32)
            total = tl.where(top > float("-inf"), 1.0, 0.0)
    for at_key in tl.range(begin, end, TILE, num_stages=STAGES):
        keys = at_key + near
        block = blocks_of(table, at_key, end, TILE, BLOCK_SIZE)
        at = (block * KV_HEADS + kv_head) * (BLOCK_SIZE * D) + keys % BLOCK_SIZE * D
        place = at // D if SCALED else at
        at = at[:, None] + d[None, :]
        if D == D_PAD:
            key = tl.load(k_cache + at)
        else:
            key = tl.load(k_cache + at, mask=(d < D)[None, :], other=0.0)
        seen = keys[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (keys[None, :] > position[:, None] - WINDOW)
        # stale memory behind the row's end may hold anything, and 0 * inf is no zero
        value = tl.load(v_cache + at, mask=(keys < end)[:, None] & (d < D)[None, :], other=0.0)
        key, key_scale = scaled(key, k_scales, place, keys < end, query.dtype, SCALED)
        value, value_scale = scaled(value, v_scales, place, keys < end, query.dtype, SCALED)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if SCALED:
            scores *= key_scale[None, :]
        scores = capped(scores, SCALE, SOFT_CAP)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a query may have seen nothing yet
        fade = tl.exp2(top - base)
        p = tl.exp2(scores - base[:, None])
        total = total * fade + tl.sum(p, 1)
        if SCALED:
            p *= value_scale[None, :]
        acc = tl.dot(p.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
        top = higher

    none = total == 0  # in a part whose keys are all ahead of a query, or behind its window
    mixed = acc / tl.where(none, 1.0, total)[:, None]
    stride: tl.constexpr = KV_HEADS * GROUP * D
    if SPLITS == 1 or used == 1:
        to = (token.to(tl.int64) * stride + head * D)[:, None] + d[None, :]
        tl.store(out + to, mixed.to(out.dtype.element_ty), mask=live)
    else:
        rows: tl.constexpr = BLOCK_Q * GROUP
        pair = row * tl.num_programs(0) + tl.program_id(0)
        part += pair * (SPLITS * rows * D)
        lse += pair * (SPLITS * rows)
        tl.store(part + (split * rows + m)[:, None] * D + d[None, :], mixed, mask=live)
        mark = tl.where(none, float("-inf"), top + tl.log2(tl.where(none, 1.0, total)))
        tl.store(lse + split * rows + m, mark, mask=m < pairs)
        if come(tickets + pair) == used - 1:
            to = out + first.to(tl.int64) * stride + kv_head * (GROUP * D)
            _combine(part, lse, to, used, pairs, stride, rows, GROUP, D, D_PAD)
            tl.store(tickets + pair, 0)  # for the next launch


def attend_several(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    queries: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: SeveralConfig,
    tickets: Tensor,
    pad_tokens: int = 0,
    sinks: Tensor | None = None,
    scales: Scales | None = None,
) -> None:
    """Up to `queries` queries a row: q [T, heads, head_size] of R rows into `out`, the same shape and contiguous.

    Row r's are tokens query_start_loc[r] .. query_start_loc[r + 1] (int32 [R + 1], from 0 on), perhaps none, the last
    of its seq_lens[r] (int32 [R]) tokens; each attends to those up to itself. `block_tables`: int32 [R, blocks]. All
    three are read on the device alone. Of later tokens those in front of `pad_tokens` (at most R * queries) come out as
    zeros; the others are left alone.

    `tickets`: int32, zero between launches, one for each of `config.programs`; launches that share it must follow each
    other in one stream. `sinks`: float [heads], a score of each head that takes part in the softmax and has no value.
    `scales`: as in `attend_decode`.
    """
    heads, width = q.shape[1:]
    rows, (kv_heads, block_size) = len(seq_lens), k_cache.shape[1:3]
    if rows == 0 or queries == 0:
        return
    group, q, layout = heads // kv_heads, rows_of(q), config.keys
    block_q = config.block_m // group
    parts = rows * config.programs(kv_heads, group, queries) * layout.splits * block_q * group
    limit = {"maxnreg": config.registers} if config.registers and q.is_cuda else {}
    scratch = torch.empty(parts * (width + 1) if layout.splits > 1 else 0, dtype=torch.float32, device=q.device)
    _decode_several[(config.programs(kv_heads, group, queries), rows, layout.splits)](
        q, k_cache, v_cache, *(scales or (q, q)), out, block_tables, seq_lens, query_start_loc,
        scratch, scratch[parts * width :], tickets,
        q if sinks is None else sinks, q.stride(0), block_tables.stride(0), queries, pad_tokens,
        layout.min_tiles, KV_HEADS=kv_heads, GROUP=group, D=width, D_PAD=padded_head(width), BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m, BLOCK_Q=block_q, TILE=layout.tile, SPLITS=layout.splits,
        SCALE=scale, WINDOW=window or 0, SOFT_CAP=soft_cap or 0.0, STAGES=layout.stages, AHEAD=layout.ahead,
        SINKS=sinks is not None, SCALED=scales is not None, num_warps=layout.warps, **limit, **pdl_options(q),
    )  # fmt: skip
