"""Triton: attention of one query a row over the paged cache.

The cache of a layer is head-major, `[num_blocks, kv_heads, block_size, head_size]`: what one KV head of one block holds
lies in one piece (4 KB at 16 x 128 x bf16), and that is what one program reads.

Decode splits long contexts over programs ("flash-decoding", Dao et al. 2023). The grid depends on host-known facts
alone, so a captured launch serves every length; how many of its splits a row uses is worked out on the device from the
row's own length. A row that uses one writes its output at once. Otherwise each split leaves its part in scratch memory
and takes a ticket; the last to come adds the parts up, in split order, so the result does not depend on who was last.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803, RUF005, SIM102, SIM108 - constants of a kernel are in capitals, its branches are taken when it is
# compiled, and Triton knows no starred tuple
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.gluon import runs_gluon
from nanoengine.kernels.paged_attention_half_triton import tile_of_codes
from nanoengine.kernels.paged_attention_plan import DecodeConfig, DecodeScratch, NewTokens, padded_head
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
def _combine(
    part, lse, out, used, GROUP: tl.constexpr, GROUP_P2: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Sum of the `used` parts of one (row, KV head), each weighed by its share of the softmax's denominator.

    Each thread adds its own elements up, so there is nothing to exchange; and little code: at few rows a program runs
    it once, and fetching instructions takes longer than executing them.
    """
    i = tl.arange(0, GROUP_P2 * D_PAD)
    head, d = i // D_PAD, i % D_PAD
    live = (head < GROUP) & (d < D)
    head = tl.minimum(head, GROUP - 1)
    top = tl.full([GROUP_P2 * D_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_P2 * D_PAD], tl.float32)
    acc = tl.zeros([GROUP_P2 * D_PAD], tl.float32)
    for first in range(0, used, _AT_ONCE):
        # .cg: other programs wrote all this; never from this multiprocessor's own L1
        marks, parts = (), ()
        for near in tl.static_range(_AT_ONCE):
            there = first + near < used
            mark = lse + (first + near) * GROUP + head
            marks = marks + (tl.load(mark, mask=there, other=float("-inf"), cache_modifier=".cg"),)
            mixed = part + ((first + near) * GROUP + head) * D + d
            parts = parts + (tl.load(mixed, mask=there & live, other=0.0, cache_modifier=".cg"),)
        higher = top
        for near in tl.static_range(_AT_ONCE):
            higher = tl.maximum(higher, marks[near])
        fade = tl.exp2(top - higher)
        total *= fade
        acc *= fade
        for near in tl.static_range(_AT_ONCE):
            share = tl.exp2(marks[near] - higher)
            total += share
            acc += share * parts[near]
        top = higher
    tl.store(out + head * D + d, (acc / total).to(out.dtype.element_ty), mask=live)


@triton.jit
def _turned(raw, swapped, weight, swapped_weight, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Heads [G, D], normalised head by head where there is a norm, and rotated; rounded as
    `rope.qk_norm_rope_store` does. `swapped`: each element's partner of the other half."""
    a, b = raw.to(tl.float32), swapped.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a, axis=1, keep_dims=True) / D + eps)
        a = (a * scale * weight).to(raw.dtype).to(tl.float32)
        b = (b * scale * swapped_weight).to(raw.dtype).to(tl.float32)
    return (a * cos + b * sin).to(raw.dtype)


@triton.jit
def _repeat(rows, COUNT: tl.constexpr, WANTED: tl.constexpr, D: tl.constexpr):
    """[COUNT, D] -> [WANTED, D], the rows again and again: as many as a dot takes at the least."""
    return tl.reshape(tl.broadcast_to(rows[None, :, :], (WANTED // COUNT, COUNT, D)), (WANTED, D))


@triton.jit
def _tile(
    query, key, value, key_scale, value_scale, seen, top, total, acc,
    SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax: (top, total, acc)."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if SCALED:
        scores *= key_scale[None, :]
    scores = capped(scores, SCALE, SOFT_CAP)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))  # finite: a row's first tile has a key that is seen, or top is
    fade = tl.exp2(top - higher)
    p = tl.exp2(scores - higher[:, None])
    total = total * fade + tl.sum(p, 1)
    if SCALED:
        p *= value_scale[None, :]
    acc = tl.dot(p.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit(do_not_specialize=["min_tiles"])  # it goes by the number of rows, which is any in a mixed step
def _decode(
    q, k_cache, v_cache, k_scales, v_scales, out, block_tables, seq_lens, part, lse, tickets,
    q_stride, table_stride, sinks, min_tiles,
    slots, inv_freq, q_weight, k_weight, eps, FUSED: tl.constexpr, NORM: tl.constexpr, HELD: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    GROUP_P2: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
    SINKS: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """BESIDE: the kernel in front lets this one start behind its own wait, and what it writes is not read here: so
    this one waits at its end, and runs beside it.

    FUSED: q is qkv; this kernel normalises and rotates q and the newest key, and stores that key and its value.

    What the cache holds of earlier steps may then be read before the wait, and with HELD each program's first tile is:
    it lies in registers when qkv comes.
    """
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)  # slowest, so that programs without work start behind those with
    if FUSED:
        release_dependents(PDL)
    # Lengths and tables are complete before a step's first layer starts (`embedding_triton`), and every multiprocessor
    # has waited since it read those of the step before: they may be read before the wait, L1 included (past L1 a layer
    # took 0.5 us longer at 8 rows). So may what lies in the cache be asked for, but not used: the newest key is on its
    # way.
    length = tl.load(seq_lens + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE * TILE
    tiles = tl.cdiv(length - first, TILE)
    tiles_each = tl.maximum(tl.cdiv(tiles, SPLITS), min_tiles)
    used = tl.cdiv(tiles, tiles_each)
    if SPLITS > 1:
        tiles_each = tl.cdiv(tiles, used)  # as few as so many parts allow: the longest is waited for
    begin = first + tl.minimum(split, used) * tiles_each * TILE
    end = tl.minimum(begin + tiles_each * TILE, length)
    newest = split == used - 1
    if FUSED:
        if newest:  # the newest key comes from qkv
            end = begin if WINDOW == 1 else length - 1
    table = block_tables + row * table_stride
    if PDL and AHEAD > 0:
        if split < used:
            prefetch_keys(k_cache, table, kv_head, begin, end, KV_HEADS, D, BLOCK_SIZE, AHEAD)
            prefetch_keys(v_cache, table, kv_head, begin, end, KV_HEADS, D, BLOCK_SIZE, AHEAD)
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, D_PAD)
    near = tl.arange(0, TILE)
    rows_live = (g < GROUP)[:, None] & (d < D)[None, :]
    head_size = BLOCK_SIZE * D
    if FUSED:
        # One layout for all of it, [heads of the group, D], so that nothing is exchanged behind the wait: angles, k and
        # the weights again for each head.
        h, e = tl.arange(0, GROUP_P2)[:, None], d[None, :]
        each = h * 0 + e
        one, swap = (h < GROUP) & (e < D), tl.where(each < D // 2, each + D // 2, each - D // 2)
        slot = tl.load(slots + row)
        angle = (length - 1).to(tl.float32) * tl.load(inv_freq + each % (D // 2), mask=one, other=0.0)
        cos, sin = tl.cos(angle), tl.where(each < D // 2, -1.0, 1.0) * tl.sin(angle)
        weight, swapped_weight, new_weight, new_swapped_weight = 0.0, 0.0, 0.0, 0.0
        if NORM:
            weight = tl.load(q_weight + each, mask=one, other=0.0).to(tl.float32)
            swapped_weight = tl.load(q_weight + swap, mask=one, other=0.0).to(tl.float32)
            new_weight = tl.load(k_weight + each, mask=one, other=0.0).to(tl.float32)
            new_swapped_weight = tl.load(k_weight + swap, mask=one, other=0.0).to(tl.float32)
    if HELD:
        held_keys = begin + near
        held_seen = held_keys < end
        held_block = tl.load(table + held_keys // BLOCK_SIZE, mask=held_seen, other=0).to(tl.int64)
        held_at = ((held_block.to(tl.int64) * KV_HEADS + kv_head) * head_size + held_keys % BLOCK_SIZE * D)[
            :, None
        ] + d[None, :]
        held_key = tl.load(k_cache + held_at, mask=held_seen[:, None] & (d < D)[None, :], other=0.0)
        held_value = tl.load(v_cache + held_at, mask=held_seen[:, None] & (d < D)[None, :], other=0.0)
        if WINDOW > 0:
            held_seen = held_seen & (held_keys >= length - WINDOW)
        begin += TILE
    wait_for_inputs(PDL and not BESIDE)
    if not FUSED:
        release_dependents(PDL)
    if split >= used:
        return

    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    if FUSED:
        heads = q + row * q_stride + (kv_head * GROUP + h) * D
        last = q + row * q_stride + (KV_HEADS * GROUP + kv_head) * D
        raw, swapped = tl.load(heads + e, mask=one, other=0.0), tl.load(heads + swap, mask=one, other=0.0)
        new_raw = tl.load(last + each, mask=one & newest, other=0.0)
        new_swapped = tl.load(last + swap, mask=one & newest, other=0.0)
        new_value = tl.load(last + KV_HEADS * D + each, mask=one & newest, other=0.0)
        query = _turned(raw, swapped, weight, swapped_weight, cos, sin, eps, D, NORM)
        new_key = _turned(new_raw, new_swapped, new_weight, new_swapped_weight, cos, sin, eps, D, NORM)
        new_at = ((slot // BLOCK_SIZE * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * D + each
        tl.store(k_cache + new_at, new_key, mask=one & (h == 0) & newest & (slot >= 0))
        tl.store(v_cache + new_at, new_value, mask=one & (h == 0) & newest & (slot >= 0))
        score = capped(tl.sum(query.to(tl.float32) * new_key.to(tl.float32), 1), SCALE, SOFT_CAP)
        score = tl.where(newest, score, float("-inf"))
        top = _repeat(score[:, None], GROUP_P2, GROUP_PAD, 1).reshape(GROUP_PAD)
        query = _repeat(query, GROUP_P2, GROUP_PAD, D_PAD)
        total = tl.where(top > float("-inf"), 1.0, 0.0)
        acc = _repeat(new_value.to(tl.float32), GROUP_P2, GROUP_PAD, D_PAD)  # 0 in programs without the newest key
    else:
        own = row * q_stride + kv_head * (GROUP * D) + g[:, None] * D + d[None, :]
        # .cg: beside prefill there was no wait, and where q lies an input of the product in front of it may have been
        query = tl.load(q + own, mask=rows_live, other=0.0, cache_modifier=".cg")
    halves: tl.constexpr = SCALED and q.dtype.element_ty != tl.float32
    if halves:
        even, odd = tl.zeros([GROUP_PAD, D_PAD // 2], tl.float32), tl.zeros([GROUP_PAD, D_PAD // 2], tl.float32)
        wide = query.to(tl.float32)
        query_size = tl.max(tl.abs(wide), 1)
        query_size = tl.where(query_size == 0, 1.0, query_size)
        query = (wide / query_size[:, None]).to(tl.float16)
        word = tl.arange(0, D_PAD // 2)[None, :]
        words_at = v_cache.to(tl.pointer_type(tl.int16)) + word
    if SINKS:
        if split == 0:  # a key without a value, which the row's first program counts
            sink = LOG2E * tl.load(sinks + kv_head * GROUP + g, mask=g < GROUP, other=0.0).to(tl.float32)
            higher = tl.maximum(tl.maximum(top, sink), -1e30)
            fade = tl.exp2(top - higher)
            total = total * fade + tl.exp2(sink - higher)
            acc *= fade[:, None]
            top = higher
    if HELD:
        top, total, acc = _tile(
            query, held_key, held_value, 1.0, 1.0, held_seen, top, total, acc, SCALE, SOFT_CAP, False
        )
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        keys = start + near
        live = keys < end
        block = blocks_of(table, start, end, TILE, BLOCK_SIZE)
        at = (block * KV_HEADS + kv_head) * head_size + keys % BLOCK_SIZE * D
        token = at // D if SCALED else at
        at = at[:, None] + d[None, :]
        if D == D_PAD:
            key = tl.load(k_cache + at)
        else:
            key = tl.load(k_cache + at, mask=(d < D)[None, :], other=0.0)
        seen = live
        if WINDOW > 0:
            seen = seen & (keys >= length - WINDOW)
        # stale memory behind the row's end may hold anything, and 0 * inf is no zero
        if halves:
            words = tl.load(words_at + token[:, None] * (D // 2), mask=live[:, None] & (word < D // 2), other=0)
            key_scale = tl.load(k_scales + token, mask=live, other=0.0)
            value_scale = tl.load(v_scales + token, mask=live, other=0.0)
            top, total, even, odd = tile_of_codes(
                query, key, words, query_size, key_scale, value_scale, seen, top, total, even, odd,
                SCALE, SOFT_CAP, v_cache.dtype.element_ty, ASM,
            )  # fmt: skip
        else:
            value = tl.load(v_cache + at, mask=live[:, None] & (d < D)[None, :], other=0.0)
            key, key_scale = scaled(key, k_scales, token, live, query.dtype, SCALED)
            value, value_scale = scaled(value, v_scales, token, live, query.dtype, SCALED)
            top, total, acc = _tile(
                query, key, value, key_scale, value_scale, seen, top, total, acc, SCALE, SOFT_CAP, SCALED
            )

    if halves:
        acc = tl.interleave(even, odd)
    mixed = acc / total[:, None]
    to = row * (KV_HEADS * GROUP * D) + kv_head * (GROUP * D)
    if SPLITS == 1 or used == 1:
        tl.store(out + to + g[:, None] * D + d[None, :], mixed.to(out.dtype.element_ty), mask=rows_live)
    else:
        pair = row * KV_HEADS + kv_head
        part += pair * (SPLITS * GROUP * D)
        lse += pair * (SPLITS * GROUP)
        tl.store(part + (split * GROUP + g)[:, None] * D + d[None, :], mixed, mask=rows_live)
        tl.store(lse + split * GROUP + g, top + tl.log2(total), mask=g < GROUP)
        if come(tickets + pair) == used - 1:
            _combine(part, lse, out + to, used, GROUP, GROUP_P2, D, D_PAD)
            tl.store(tickets + pair, 0)  # for the next launch
    wait_for_inputs(PDL and BESIDE)


def attend_decode(
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
    config: DecodeConfig,
    scratch: DecodeScratch,
    new: NewTokens | None = None,
    sinks: Tensor | None = None,
    scales: Scales | None = None,
    by_codes: bool = True,
    beside: bool = False,
) -> None:
    """One query a row: q [B, heads, head_size] into `out`, the same shape and contiguous.

    With `new`, q is the rows' qkv [B, (heads + 2 kv_heads) * head_size], contiguous row by row: this kernel normalises
    and rotates q and k, and stores k and v, as `rope.qk_norm_rope_store` does. `out` tells the heads.

    `sinks`: float [heads], a score of each head that takes part in the softmax and has no value.
    `scales`: of K and V, float32 [blocks, kv_heads, block_size]: the caches have codes (`kv_quant`); not with `new`.
    `by_codes`: on Hopper GPUs these are read by `paged_attention_codes_gluon` where it can.
    `beside`: the launch in front is `attend_prefill` of other rows, and both run at the same time.
    `block_tables` int32 [B, blocks], `seq_lens` int32 [B], of at least 1; both are read on the device alone.
    """
    rows, heads, width = out.shape
    kv_heads, block_size = k_cache.shape[1:3]
    if rows == 0:
        return
    group = heads // kv_heads
    if new is None:
        q, given = rows_of(q), q
        beside = beside and q is given  # else the launch in front is that of a copy, which is read here
    else:
        assert q.stride(1) == 1 and q.shape[1] == (heads + 2 * kv_heads) * width, (q.shape, q.stride())
    assert new is None or scales is None
    if by_codes and scales is not None and window is None and soft_cap is None and sinks is None:
        slower = "K and V in eight bits are read by a slower kernel"
        if runs_gluon(q.device, slower, "paged_attention_codes_gluon"):
            from nanoengine.kernels import paged_attention_codes_gluon as by_gluon

            if by_gluon.takes(q, k_cache):
                by_gluon.attend_codes(
                    q, k_cache, v_cache, scales, out, block_tables, seq_lens, scale=scale, config=config,
                    scratch=scratch, beside=beside,
                )  # fmt: skip
                return
    norms = new is not None and new.q_weight is not None
    d_pad, group_p2 = padded_head(width), triton.next_power_of_2(group)
    _decode[(kv_heads, rows, config.splits)](
        q, k_cache, v_cache, *(scales or (q, q)), out, block_tables, seq_lens,
        scratch.part, scratch.lse, scratch.tickets,
        q.stride(0), block_tables.stride(0), q if sinks is None else sinks, config.min_tiles,
        *((q, q, q, q, 0.0) if new is None else new.arguments()), FUSED=new is not None, NORM=norms,
        HELD=config.held and new is not None,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, group_p2), GROUP_P2=group_p2, D=width, D_PAD=d_pad,
        BLOCK_SIZE=block_size, TILE=config.tile, SPLITS=config.splits,
        SCALE=scale, WINDOW=window or 0, SOFT_CAP=soft_cap or 0.0, STAGES=config.stages,
        AHEAD=config.ahead,
        SINKS=sinks is not None, SCALED=scales is not None, ASM=q.is_cuda and torch.version.hip is None,
        BESIDE=beside, num_warps=config.warps, **pdl_options(q),
    )  # fmt: skip
