"""Truncation without a sort: the kernels behind the scan. `sampling_triton` tells how they go together."""

# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

from nanoengine.kernels.sampling_scan_triton import (
    DONE,
    INF,
    LOG2_LN2,
    NEG_INF,
    NO_ID,
    PER_LN2,
    SLOW,
    WEIGH,
    answer,
    column,
    entry_of,
    hasty_score,
    load_logits,
    margin,
    min_p_floor,
    ordered,
    refine,
    row_key,
    row_temperature,
    row_top_k,
    scaled,
    true_score,
    weight,
)

_LEAST_KEY = tl.constexpr(-(2**31))


@triton.jit
def _kth_key(keys, k):
    """The highest key that at least k of the int32 keys reach, int32; the least if there are fewer. `LEAST`: none.

    Each turn asks for three counts, packed in one sum, and leaves a quarter of the range.
    """
    high = tl.max(keys, 0).to(tl.int64)
    low = tl.min(tl.where(keys == _LEAST_KEY, 2147483647, keys), 0).to(tl.int64)
    while low < high:
        step = (high - low + 3) >> 2
        packed = (keys >= (low + step).to(tl.int32)).to(tl.int64)
        packed += (keys >= (low + 2 * step).to(tl.int32)).to(tl.int64) << 21
        packed += (keys >= (low + 3 * step).to(tl.int32)).to(tl.int64) << 42
        counts = tl.sum(packed, 0)
        enough = ((counts & 2097151) >= k).to(tl.int64)
        enough += ((counts >> 21) & 2097151) >= k
        enough += (counts >> 42) >= k
        low += enough * step
        high = tl.where(enough < 3, tl.minimum(high, low + step - 1), high)
    return low.to(tl.int32)


@triton.jit
def _collect(
    base, vocab, groups, peak_row, list_row, values_row, ids_row, k, t,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, TILE_GROUPS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Writes all logits / t that may be among the k highest, and their ids, in ascending order; returns how many.

    More than CAPACITY are counted but not written. -inf is left out: it is never drawn, and weighs nothing.
    """
    index = tl.arange(0, GROUPS)
    peak = scaled(tl.load(peak_row + index, index < groups, NEG_INF), t)
    keys = tl.where(index < groups, ordered(peak), _LEAST_KEY)
    bound = tl.where(k > groups, _LEAST_KEY, _kth_key(keys, k))  # fewer maxima than k bound nothing
    wanted = (keys >= bound) & (peak > NEG_INF)
    place = tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.store(list_row + place, index, wanted)
    count = tl.sum(wanted.to(tl.int32), 0)
    tl.debug_barrier()
    found = tl.full([], 0, tl.int32)
    for start in range(0, count, TILE_GROUPS):
        which = start + tl.arange(0, TILE_GROUPS * GROUP) // GROUP
        group = tl.load(list_row + which, which < count, 0)
        ids = group * GROUP + tl.arange(0, TILE_GROUPS * GROUP) % GROUP
        x = scaled(load_logits(base, ids, (ids < vocab) & (which < count)), t)
        here = (ordered(x) >= bound) & (x > NEG_INF)
        at = found + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(values_row + at, x, here & (at < CAPACITY))
        tl.store(ids_row + at, ids, here & (at < CAPACITY))
        found += tl.sum(here.to(tl.int32), 0)
    tl.debug_barrier()
    return found


@triton.jit
def _draw_collected(
    values_row, ids_row, found, k, p, top, floor, key0, key1, CAPACITY: tl.constexpr, NATIVE: tl.constexpr
):
    """Top-k, top-p, min-p and draw among the collected: (token, score)."""
    index = tl.arange(0, CAPACITY)
    here = index < found
    x = tl.load(values_row + index, here, NEG_INF)
    ids = tl.load(ids_row + index, here, NO_ID)
    keys = tl.where(here, ordered(x), _LEAST_KEY)
    here = here & (keys >= _kth_key(keys, k))
    w = tl.where(here, weight(x, top, NATIVE), 0.0)
    limit = p.to(tl.float64) * tl.sum(w, 0)
    scores = tl.where(here & (x >= floor), true_score(x, ids, key0, key1, True, NATIVE), NEG_INF)
    score, token = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32)
    searching = tl.full([], 1, tl.int1)
    while searching:
        score = tl.max(scores, 0)
        token = tl.min(tl.where(scores == score, ids, NO_ID), 0)
        value = tl.max(tl.where(ids == token, x, NEG_INF), 0)
        likelier = tl.sum(tl.where(x > value, w, 0.0), 0)
        searching = (p < 1) & (likelier >= limit) & (likelier > 0) & (score > NEG_INF)
        scores = tl.where(x > value, scores, NEG_INF)
    return token, score


@triton.jit
def pick_truncated(
    logits, stride, vocab, groups, greedy, temperature, top_k, top_p, min_p, seeds, positions, sample_index, at,
    stat, peak, group_list, values, value_ids, state, tops, pivots, pivot_ids, pivot_scores,
    out_tokens, out_failed, raw_tops,
    RAW_TOPS: tl.constexpr, MAX_K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    TILE_GROUPS: tl.constexpr, CAPACITY: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Rows whose token is known now get it; the others get a `state` and what `_finish` needs."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    entry = entry_of(at, row)
    random = column(greedy, entry) == 0
    k, p = row_top_k(top_k, entry, vocab), column(top_p, entry)
    t = row_temperature(temperature, entry)
    key0, key1 = row_key(seeds, positions, sample_index, row, entry)
    index = tl.arange(0, GROUPS)
    raw = tl.max(tl.load(peak + row * groups + index, index < groups, NEG_INF), 0)
    top = scaled(raw, t)
    floor = min_p_floor(top, column(min_p, entry), NATIVE)
    todo = tl.full([], 0, tl.int32)
    token, score = tl.full([], 0, tl.int32), raw
    if random & (tl.abs(top) < INF):
        if k > MAX_K:
            todo = todo * 0 + SLOW
        elif k > 0:
            found = _collect(
                base, vocab, groups, peak + row * groups, group_list + row * groups,
                values + row * CAPACITY, value_ids + row * CAPACITY, k, t, GROUP, GROUPS, TILE_GROUPS, CAPACITY,
            )  # fmt: skip
            todo = tl.where(found > CAPACITY, SLOW, DONE)
            if found <= CAPACITY:
                token, score = _draw_collected(
                    values + row * CAPACITY, value_ids + row * CAPACITY, found, k, p, top, floor, key0, key1,
                    CAPACITY, NATIVE,
                )  # fmt: skip
        else:
            score, token, value, _ = refine(
                base, vocab, groups, stat + row * groups, True, t, key0, key1, NEG_INF, GROUP, GROUPS, NATIVE
            )
            todo = tl.where((p < 1) | (value < floor), WEIGH, DONE)
            tl.store(pivots + row, value)
            tl.store(pivot_ids + row, token)
            tl.store(pivot_scores + row, score)
    else:
        if random:
            score = top
        elif tl.abs(raw) < INF:
            score, token, _, _ = refine(
                base, vocab, groups, stat + row * groups, False, t, key0, key1, NEG_INF, GROUP, GROUPS, NATIVE
            )
    tl.store(tops + row, top)
    tl.store(state + row, todo)
    answer(out_tokens, out_failed, raw_tops, row, token, score, raw, RAW_TOPS)


@triton.jit
def _kth_key_of_row(base, vocab, t, k, TILE: tl.constexpr):
    """Key of the k-th highest logit / t, int32: eleven reads, three bits each, counted in eight bytes of one int64."""
    prefix, rest = tl.full([], 0, tl.int64), k
    for level in range(11):
        shift = 30 - 3 * level
        counters = tl.zeros([TILE], tl.int64)
        for start in range(0, vocab, TILE):
            ids = start + tl.arange(0, TILE)
            x = scaled(load_logits(base, ids, ids < vocab), t)
            key = ordered(x).to(tl.int64) + 2147483648
            one = ((ids < vocab) & ((key >> (shift + 3)) == prefix)).to(tl.int64)
            counters += one << (((key >> shift) & 7) * 8)
        digit, found = tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)
        for i in tl.static_range(8):
            count = tl.sum((counters >> (8 * (7 - i))) & 255, 0).to(tl.int32)
            take = (found == 0) & (rest <= count)
            digit = tl.where(take, 7 - i, digit)
            found = tl.where(take, 1, found)
            rest = tl.where(found == 0, rest - count, rest)
        prefix = prefix * 8 + digit
    return (prefix - 2147483648).to(tl.int32)


@triton.jit
def _rest_of_row(base, vocab, t, key0, key1, top, over, floor, TILE: tl.constexpr, NATIVE: tl.constexpr):
    """Of the logits / t with a key > over: their weight; and score, id and value of the best draw of those >= floor."""
    mass = tl.zeros([TILE], tl.float64)
    score, value = tl.full([], float("-inf"), tl.float32), tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    for start in range(0, vocab, TILE):
        ids = start + tl.arange(0, TILE)
        raw = load_logits(base, ids, ids < vocab)
        x = scaled(raw, t)
        here = (ids < vocab) & (ordered(x) > over)
        mass += tl.where(here, weight(x, top, NATIVE), 0.0)
        here = here & (x >= floor)
        hasty = tl.max(tl.where(here, hasty_score(raw, ids, key0, key1, PER_LN2 / t, NATIVE), NEG_INF), 0)
        if (hasty > NEG_INF) & (hasty + margin(hasty) >= score * PER_LN2 + LOG2_LN2):
            scores = tl.where(here, true_score(x, ids, key0, key1, True, NATIVE), NEG_INF)
            best = tl.max(scores, 0)
            if best > score:
                score = best
                token = tl.min(tl.where(scores == best, ids, NO_ID), 0)
                value = tl.max(tl.where(ids == token, x, NEG_INF), 0)
    return tl.sum(mass, 0), score, token, value


@triton.jit
def finish(
    logits, stride, vocab, groups, programs, temperature, top_k, top_p, min_p, seeds, positions, sample_index, at,
    stat, parts, state, tops, pivots, pivot_ids, pivot_scores, out_tokens, out_failed, raw_tops,
    RAW_TOPS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PROGRAMS: tl.constexpr, TILE: tl.constexpr,
    LAST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What `pick_truncated` left: accept the pivot, or draw from what is above it.

    A token drawn so is the next pivot of another round, or, in the last one, searched on from until one is accepted.
    """
    row = tl.program_id(0).to(tl.int64)
    todo = tl.load(state + row)
    if (todo == WEIGH) | (LAST & (todo == SLOW)):
        base = logits + row * stride
        entry = entry_of(at, row)
        k, p, top = row_top_k(top_k, entry, vocab), column(top_p, entry), tl.load(tops + row)
        t = row_temperature(temperature, entry)
        floor = min_p_floor(top, column(min_p, entry), NATIVE)
        key0, key1 = row_key(seeds, positions, sample_index, row, entry)
        mass, searching = tl.full([], 0.0, tl.float64), todo != todo
        score, value = tl.full([], float("-inf"), tl.float32), tl.full([], float("-inf"), tl.float32)
        token = tl.full([], 0, tl.int32)
        if todo == WEIGH:
            index = tl.arange(0, PROGRAMS)
            part = parts + (row * programs + index) * 2
            mass = tl.sum(tl.load(part, index < programs, 0.0), 0)
            above = tl.sum(tl.load(part + 1, index < programs, 0.0), 0)
            value = tl.load(pivots + row)
            token, score = tl.load(pivot_ids + row), tl.load(pivot_scores + row)
            searching = (value < floor) | ((p < 1) & (above >= p.to(tl.float64) * mass) & (above > 0))
            if searching:
                score, token, value, _ = refine(
                    base, vocab, groups, stat + row * groups, True, t, key0, key1,
                    tl.maximum(floor, _next_up(value)), GROUP, GROUPS, NATIVE,
                )  # fmt: skip
                searching = p < 1
        if LAST:
            if todo == SLOW:
                over = _kth_key_of_row(base, vocab, t, k, TILE) - 1
                mass, score, token, value = _rest_of_row(base, vocab, t, key0, key1, top, over, floor, TILE, NATIVE)
                searching = p < 1
            limit = p.to(tl.float64) * mass
            while searching & (score > NEG_INF):
                likelier, next_score, next_token, next_value = _rest_of_row(
                    base, vocab, t, key0, key1, top, ordered(value), floor, TILE, NATIVE
                )
                searching = (likelier >= limit) & (likelier > 0)
                if searching:
                    score, token, value = next_score, next_token, next_value
        else:
            tl.store(pivots + row, value)
            tl.store(pivot_ids + row, token)
            tl.store(pivot_scores + row, score)
            tl.store(state + row, tl.where(searching & (score > NEG_INF), WEIGH, DONE))
        answer(out_tokens, out_failed, raw_tops, row, token, score, top, RAW_TOPS)


@triton.jit
def _next_up(x):
    """The least float32 above x, which is finite."""
    key = ordered(x) + 1
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
