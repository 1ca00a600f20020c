"""Temperature, truncation and draw over a large vocabulary without a sort, in Triton. The reference is `sampling`.

The vocabulary is read in *groups* of 128 ids by several programs a row (`scan`), each group leaving one number: its
highest logit (greedy rows and rows with top-k) or its highest score by a noise made in haste, wrong by less than a
known bound. One program a row (`_pick`) then looks exactly only at the groups that can hold the winner: one, mostly.

Truncation needs no sort either:

- The k-th highest of the groups' maxima is a lower bound of the k-th highest logit. What reaches it, a little more than
  k logits, is collected, and top-k, top-p, min-p and draw happen in registers.
- Without top-k: a draw from what truncation leaves is the draw from everything whenever the latter's token is left. So
  the winner over the whole row stands if what is strictly likelier weighs less than top_p of the whole (`weigh`, one
  more read). If not, all that is not likelier than it is out too, and the next is drawn from the rest (`_finish`).

Weights are whole numbers, whose float64 sums are exact in any order, so neither the split nor the batch has a say in a
threshold. No atomics. Grids depend on the shape and the `Tail` alone; all else is read on the device.
"""

# ruff: noqa: N803, SIM108
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.philox_triton import NATIVE
from nanoengine.kernels.sampling_scan_triton import (
    DONE,
    INF,
    LOG2_LN2,
    NEG_INF,
    NO_ID,
    PER_LN2,
    SLOW,
    WEIGH,
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
    scan,
    true_score,
    weigh,
    weight,
)

FINE, BAD_LOGITS, NOTHING_LEFT = 0, 1, 2
"""`out_failed`: a token was drawn; the logits were not finite, or none was above -inf; truncation left none."""

_FINE, _BAD, _NOTHING = tl.constexpr(FINE), tl.constexpr(BAD_LOGITS), tl.constexpr(NOTHING_LEFT)
_LEAST_KEY = tl.constexpr(-(2**31))
_MAX_TILES = 255  # of one row in `_finish`, whose counters have 8 bits


class Tail(IntEnum):
    """What the rows of a batch need at most; it picks the kernels, so it is part of a graph's key."""

    GREEDY = 0
    TEMPERATURE = 1
    TRUNCATION = 2


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes; powers of two (but `max_k`), and none changes a token.

    Attributes:
        group: ids that share one number of the scan. tile_groups: groups a program reads at once. tiles: how often.
        capacity: how many logits that may be among the top k are held in registers.
        max_k: with a larger top-k a row goes the slow way: about a dozen reads by one program.
        slow_tile: ids read at once on that way.
    """

    group: int = 128
    tile_groups: int = 32
    tiles: int = 4
    capacity: int = 1024
    max_k: int = 256
    slow_tile: int = 4096


def tuning_for(rows: int) -> Tuning:
    """With few rows, many small programs each; with many, programs that read more."""
    if rows <= 4:
        return Tuning(tile_groups=8, tiles=1)
    return Tuning(tile_groups=16, tiles=1) if rows < 64 else Tuning()


@triton.jit
def _answer(out_tokens, out_failed, sound, row, token, score, raw, SOUND_GIVEN: tl.constexpr):
    """raw: highest raw logit, as far as it matters here."""
    fine = (tl.abs(raw) < INF) & (tl.abs(score) < INF)
    if SOUND_GIVEN:
        good = tl.load(sound + row) != 0
    else:
        good = tl.abs(raw) < INF
    tl.store(out_tokens + row, tl.where(fine & good, token, 0).to(tl.int64))
    tl.store(out_failed + row, tl.where(good, tl.where(fine, _FINE, _NOTHING), _BAD))


@triton.jit
def _pick(
    logits, stride, vocab, groups, greedy, temperature, seeds, positions, sample_index, stat,
    out_tokens, out_failed, sound,
    GREEDY: tl.constexpr, SOUND_GIVEN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The token of each row without truncation."""
    row = tl.program_id(0).to(tl.int64)
    noisy, key0, key1 = False, 0, 0
    t = 1.0
    if not GREEDY:
        noisy = tl.load(greedy + row) == 0
        key0, key1 = row_key(seeds, positions, sample_index, row)
        t = row_temperature(temperature, row)
    score, token, _, raw = refine(
        logits + row * stride, vocab, groups, stat + row * groups, noisy, t, key0, key1, NEG_INF, GROUP, GROUPS, NATIVE
    )
    _answer(out_tokens, out_failed, sound, row, token, score, raw, SOUND_GIVEN)


# Truncation -----------------------------------------------------------------------------------------------------------


@triton.jit
def _kth_key(keys, k):
    """The highest key that at least k of the int32 keys reach, int32; the least if there are fewer."""
    low, high = tl.full([], -(2**31), tl.int64), tl.max(keys, 0).to(tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
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
    bound = _kth_key(keys, k)
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
        place = found + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(values_row + place, x, here & (place < CAPACITY))
        tl.store(ids_row + place, ids, here & (place < CAPACITY))
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
def _pick_truncated(
    logits, stride, vocab, groups, greedy, temperature, top_k, top_p, min_p, seeds, positions, sample_index,
    stat, peak, group_list, values, value_ids, state, tops, pivots, pivot_ids, pivot_scores,
    out_tokens, out_failed, sound,
    SOUND_GIVEN: tl.constexpr, MAX_K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    TILE_GROUPS: tl.constexpr, CAPACITY: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Rows whose token can be told now get it; the others a `state` and what `_finish` needs."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    random = tl.load(greedy + row) == 0
    k, p = row_top_k(top_k, row, vocab), tl.load(top_p + row)
    t = row_temperature(temperature, row)
    key0, key1 = row_key(seeds, positions, sample_index, row)
    index = tl.arange(0, GROUPS)
    raw = tl.max(tl.load(peak + row * groups + index, index < groups, NEG_INF), 0)
    top = scaled(raw, t)
    floor = min_p_floor(top, tl.load(min_p + row), NATIVE)
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
    _answer(out_tokens, out_failed, sound, row, token, score, raw, SOUND_GIVEN)


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
def _finish(
    logits, stride, vocab, groups, programs, temperature, top_k, top_p, min_p, seeds, positions, sample_index,
    stat, parts, state, tops, pivots, pivot_ids, pivot_scores, out_tokens, out_failed, sound,
    SOUND_GIVEN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PROGRAMS: tl.constexpr, TILE: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """What `_pick_truncated` left: accept the pivot, or draw from what is above it until one is accepted."""
    row = tl.program_id(0).to(tl.int64)
    todo = tl.load(state + row)
    if todo != DONE:
        base = logits + row * stride
        k, p, top = row_top_k(top_k, row, vocab), tl.load(top_p + row), tl.load(tops + row)
        t = row_temperature(temperature, row)
        floor = min_p_floor(top, tl.load(min_p + row), NATIVE)
        key0, key1 = row_key(seeds, positions, sample_index, row)
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
        else:
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
        _answer(out_tokens, out_failed, sound, row, token, score, top, SOUND_GIVEN)


@triton.jit
def _next_up(x):
    """The least float32 above x, which is finite."""
    key = ordered(x) + 1
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


# Host -----------------------------------------------------------------------------------------------------------------


def sample(
    logits: Tensor,
    tail: Tail,
    out_tokens: Tensor,
    out_failed: Tensor,
    *,
    greedy: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    sample_index: Tensor | None = None,
    sound: Tensor | None = None,
    tuning: Tuning | None = None,
) -> None:
    """One token a row, into `out_tokens` int64 [R] and `out_failed` int32 [R]. The logits are left as they are.

    Args:
        logits: [R, V] float32, bfloat16 or float16, rows contiguous; all arithmetic is float32 of what they hold.
        tail: what the rows need at most. The tensors it has no use for may be None.
        greedy: bool [R]; the row takes the highest logit, the lowest id of equals.
        temperature: float32 [R]; up to 0 counts as 1.
        top_k: int32 [R]; 0: all. top_p: float32 [R]; 1: all. min_p: float32 [R]; 0: all.
        seeds, positions, sample_index: int64 [R], the draw's key.
        sound: bool [R]; whether the raw logits were, where stages have changed them since. None: these are the raw
            ones. A row that is not sound fails with `BAD_LOGITS`, another without a possible token with
            `NOTHING_LEFT`; either has token 0.
        tuning: sizes, for tests and benchmarks.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return
    assert logits.stride(1) == 1, logits.stride()
    sizes = tuning or tuning_for(rows)
    groups = triton.cdiv(vocab, sizes.group)
    block = max(16, triton.next_power_of_2(groups))
    programs = triton.cdiv(groups, sizes.tile_groups * sizes.tiles)
    stat = logits.new_empty((rows, groups), dtype=torch.float32)
    common = {"GROUP": sizes.group, "NATIVE": NATIVE}
    tile = common | {"TILE_GROUPS": sizes.tile_groups, "TILES": sizes.tiles}
    where = (logits, logits.stride(0), vocab, groups)
    key = (seeds, positions, sample_index)
    peak = torch.empty_like(stat) if tail is Tail.TRUNCATION else None
    scan[(programs, rows)](
        *where, greedy, temperature, top_k, *key, stat, peak, TAIL=int(tail), MAX_K=sizes.max_k, **tile
    )
    out = (out_tokens, out_failed, sound)
    given = common | {"SOUND_GIVEN": sound is not None, "GROUPS": block}
    if tail is not Tail.TRUNCATION:
        _pick[(rows,)](*where, greedy, temperature, *key, stat, *out, GREEDY=tail is Tail.GREEDY, **given)
        return
    assert peak is not None
    _truncated(sizes, programs, where, (greedy, temperature, top_k, top_p, min_p, *key), stat, peak, out, given, tile)


def _truncated(sizes, programs, where, params, stat, peak, out, given, tile) -> None:
    """The three kernels behind the scan."""
    rows, vocab = where[0].shape
    groups = where[3]
    if triton.cdiv(vocab, sizes.slow_tile) > _MAX_TILES:
        raise ValueError(f"vocabularies of up to {_MAX_TILES * sizes.slow_tile} tokens can be truncated, not {vocab}")
    new = stat.new_empty
    state, pivot_ids = (new(rows, dtype=torch.int32) for _ in range(2))
    tops, pivots, pivot_scores = (new(rows) for _ in range(3))
    group_list, value_ids = new((rows, groups), dtype=torch.int32), new((rows, sizes.capacity), dtype=torch.int32)
    values, parts = new((rows, sizes.capacity)), new((rows, programs, 2), dtype=torch.float64)
    _, temperature, _, _, min_p, *key = params
    _pick_truncated[(rows,)](
        *where, *params, stat, peak, group_list, values, value_ids, state, tops, pivots, pivot_ids, pivot_scores, *out,
        MAX_K=sizes.max_k, TILE_GROUPS=min(16, sizes.tile_groups), CAPACITY=sizes.capacity, num_warps=8, **given,
    )  # fmt: skip
    weigh[(programs, rows)](*where, temperature, min_p, *key, state, tops, pivots, stat, parts, **tile)
    _finish[(rows,)](
        *where, programs, *params[1:], stat, parts, state, tops, pivots, pivot_ids, pivot_scores, *out,
        PROGRAMS=triton.next_power_of_2(programs), TILE=sizes.slow_tile, num_warps=16, **given,
    )  # fmt: skip
