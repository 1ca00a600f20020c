"""Reading logits by many programs a row: device functions and kernels that `sampling_triton` puts together."""

# ruff: noqa: N803, SIM102, SIM108
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from nanoengine.kernels import sampling
from nanoengine.kernels.pdl_triton import release_dependents, wait_for_inputs
from nanoengine.kernels.philox_triton import (
    HASTE,
    draw_key,
    log_exponential,
    mix_bits,
    noise_log2,
    token_bits,
)

GREEDY, TEMPERATURE, TRUNCATION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DONE, WEIGH, SLOW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What is left to do for a row: nothing; weigh what is likelier than its pivot; the slow way."""

FINE, BAD_LOGITS, NOTHING_LEFT = 0, 1, 2
"""`out_failed`: a token was drawn; the logits were not finite, or none was above -inf; truncation left none."""

_FINE, _BAD, _NOTHING = tl.constexpr(FINE), tl.constexpr(BAD_LOGITS), tl.constexpr(NOTHING_LEFT)

NEG_INF, INF = tl.constexpr(float("-inf")), tl.constexpr(float("inf"))
NO_ID = tl.constexpr(2**31 - 1)
PER_LN2 = tl.constexpr(1.4426950408889634)
LOG2_LN2 = tl.constexpr(-0.5287663729448977)
_WEIGHT_ONE = tl.constexpr(sampling._WEIGHT_ONE)
_MARGIN = tl.constexpr(HASTE + 0.01)
_WHOLE = tl.constexpr(2.0**23)  # from here on every float32 is a whole number


@triton.jit
def load_logits(base, ids, here):
    """float32; -inf where not `here`, inf for NaN: either means that the row is broken."""
    x = tl.load(base + ids, here, NEG_INF).to(tl.float32)
    return tl.where(x == x, x, INF)


@triton.jit
def ordered(x):
    """int32 keys in the order of the floats; -0.0 and 0.0 have one key."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def scaled(x, t):
    """x / t, rounded once (Triton's own division is not)."""
    return tl.div_rn(x, tl.zeros_like(x) + t)


@triton.jit
def weight(x, top, NATIVE: tl.constexpr):
    """exp(x - top) in whole units, rounded half to even, float64; as `sampling._weights`."""
    if NATIVE:
        w = libdevice.exp(x - top) * _WEIGHT_ONE
    else:
        w = tl.exp(x - top) * _WEIGHT_ONE
    return tl.where(w < _WHOLE, (w + _WHOLE) - _WHOLE, w).to(tl.float64)


@triton.jit
def min_p_floor(top, min_p, NATIVE: tl.constexpr):
    """The min-p threshold, as `sampling._min_p_threshold`."""
    m = tl.where(min_p > 0, min_p, 1.0)
    if NATIVE:
        log = libdevice.log(m)
    else:
        log = tl.log(m)
    return tl.where(min_p > 0, top + log, NEG_INF)


@triton.jit
def hasty_score(x, ids, key0, key1, per_ln2, NATIVE: tl.constexpr):
    """Score / ln 2 + `LOG2_LN2`, wrong by less than a `margin`. x: raw logits; per_ln2: log2(e) / temperature."""
    return x * per_ln2 - noise_log2(token_bits(key0, key1, ids), NATIVE)


@triton.jit
def margin(best):
    """How far below the best hasty score that of the true best may lie: the noise's errors, and the rounding."""
    return _MARGIN + tl.abs(best) * 2.0**-20


@triton.jit
def true_score(x, ids, key0, key1, noisy, NATIVE: tl.constexpr):
    """What the draw maximises. x: logits after temperature."""
    out = x
    if noisy:
        out = x - log_exponential(token_bits(key0, key1, ids), NATIVE)
    return out


@triton.jit
def entry_of(at, row):
    """Where the row's values are in the columns, int64: `at` [R] if they are whole tables, else as the rows are."""
    if at is None:
        return row
    else:
        return tl.load(at + row, cache_modifier=".cg").to(tl.int64)


@triton.jit
def column(values, entry):
    """A value of a column. `.cg`: before the wait this multiprocessor's own L1 may hold an old one."""
    return tl.load(values + entry, cache_modifier=".cg")


@triton.jit
def row_temperature(temperature, entry):
    t = column(temperature, entry)
    return tl.where(t > 0, t, 1.0)


@triton.jit
def row_top_k(top_k, entry, vocab):
    """0: all."""
    k = column(top_k, entry)
    return tl.where((k > 0) & (k < vocab), k, 0)


@triton.jit
def row_key(seeds, positions, sample_index, row, entry):
    """positions: by row, of any width."""
    return draw_key(column(seeds, entry), column(positions, row).to(tl.int64), column(sample_index, entry))


@triton.jit
def scan(
    logits, stride, vocab, groups, greedy, temperature, top_k, seeds, positions, sample_index, at, stat, peak,
    TAIL: tl.constexpr, MAX_K: tl.constexpr, GROUP: tl.constexpr, TILE_GROUPS: tl.constexpr, TILES: tl.constexpr,
    NATIVE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr, START: tl.constexpr = 0,
    words=None, raw_tops=None,
):  # fmt: skip
    """stat [R, groups]: highest hasty score of each group, or highest logit where the row is greedy or `listed`.

    peak [R, groups] (truncation only): highest logit. inf if the group has a NaN. START: the first column's id. EARLY:
    all but the logits is read before the wait. words [R, ceil(vocab / 32)]: a bit mask, which is applied first, to the
    logits in memory too; then raw_tops [R, programs]: highest raw logit of each program, inf if it has a NaN.
    """
    row = tl.program_id(1).to(tl.int64)
    base = logits + row * stride
    release_dependents(PDL)
    wait_for_inputs(PDL and not EARLY)
    if TAIL != GREEDY:
        entry = entry_of(at, row)
        noisy = column(greedy, entry) == 0
        if TAIL == TRUNCATION:
            k = row_top_k(top_k, entry, vocab)
            noisy = noisy & ((k == 0) | (k > MAX_K))
        key0, key1 = row_key(seeds, positions, sample_index, row, entry)
        per_ln2 = PER_LN2 / row_temperature(temperature, entry)
    wait_for_inputs(PDL and EARLY)
    raw = tl.full([TILE_GROUPS], NEG_INF, tl.float32)
    for t in range(TILES):
        g = (tl.program_id(0) * TILES + t) * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
        ids = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = load_logits(base, ids, ids < vocab)
        if words is not None:
            raw = tl.maximum(raw, tl.max(x, 1))
            at_word, count = g[:, None] * (GROUP // 32) + tl.arange(0, GROUP // 32)[None, :], tl.cdiv(vocab, 32)
            bits = tl.load(words + row * count + at_word, at_word < count, -1)[:, :, None]
            removed = ((bits >> tl.arange(0, 32)[None, None, :]) & 1).reshape(TILE_GROUPS, GROUP) == 0
            removed = removed & (ids < vocab)
            tl.store(base + ids, NEG_INF, removed)
            x = tl.where(removed, NEG_INF, x)
        if TAIL == TRUNCATION:
            tl.store(peak + row * groups + g, tl.max(x, 1), g < groups)
        if TAIL != GREEDY:
            if noisy:
                if START % GROUP == 0:  # ids of a group differ in the low bits only: the key goes to the group's part
                    first = (START + g * GROUP).to(tl.uint32) ^ key0
                    mixed = first[:, None] ^ tl.arange(0, GROUP).to(tl.uint32)[None, :]
                else:
                    mixed = (START + ids).to(tl.uint32) ^ key0
                x = x * per_ln2 - noise_log2(mix_bits(mixed, key1), NATIVE)
        tl.store(stat + row * groups + g, tl.max(x, 1), g < groups)
    if words is not None:
        tl.store(raw_tops + row * tl.num_programs(0) + tl.program_id(0), tl.max(raw, 0))


@triton.jit
def refine(
    base, vocab, groups, stat_row, noisy, t, key0, key1, over,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, NATIVE: tl.constexpr, START: tl.constexpr = 0,
):  # fmt: skip
    """The true best among the logits / t >= over, from the groups whose `stat` says that they may hold it.

    START: the first column's id.

    Returns (its score, its id, its logit / t, the highest raw logit of those groups). Where the best stat is not finite
    the last of the four tells a broken row from one that its temperature made overflow.
    """
    index = tl.arange(0, GROUPS)
    stat = tl.load(stat_row + index, index < groups, NEG_INF)
    best = tl.max(stat, 0)
    usual = tl.abs(best) < INF
    wanted = (index < groups) & tl.where(usual, stat >= best - tl.where(noisy, margin(best), 0.0), stat == best)
    first = tl.min(tl.where(wanted, index, NO_ID), 0)
    wanted = wanted & (noisy | (index == first))
    todo = tl.sum(wanted.to(tl.int32), 0)
    raw = tl.full([], float("-inf"), tl.float32)
    score = tl.full([], float("-inf"), tl.float32)
    value = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    last = tl.full([], -1, tl.int32)
    while (todo > 0) & (raw < INF):
        last = tl.min(tl.where(wanted & (index > last), index, NO_ID), 0)
        ids = last * GROUP + tl.arange(0, GROUP)
        x = load_logits(base, ids, ids < vocab)
        raw = tl.maximum(raw, tl.max(x, 0))
        if noisy:
            x = scaled(x, t)
        scores = tl.where(x >= over, true_score(x, START + ids, key0, key1, noisy, NATIVE), NEG_INF)
        highest = tl.max(scores, 0)
        if highest > score:  # groups come in ascending order: of equals the first stays
            score = highest
            token = START + tl.min(tl.where(scores == highest, ids, NO_ID), 0)
            value = tl.max(tl.where(START + ids == token, x, NEG_INF), 0)
        todo -= 1
    return score, token, value, raw


@triton.jit
def weigh(
    logits, stride, vocab, groups, temperature, top_p, min_p, seeds, positions, sample_index, at,
    state, tops, pivots, stat, parts,
    GROUP: tl.constexpr, TILE_GROUPS: tl.constexpr, TILES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """For rows in state `WEIGH`: parts [R, programs, 2] float64: weight of all, and of what is above the pivot.

    And stat [R, groups] anew: highest hasty score among what is above the pivot and not below the min-p floor.
    """
    row = tl.program_id(1).to(tl.int64)
    if tl.load(state + row) == WEIGH:
        base = logits + row * stride
        entry = entry_of(at, row)
        t, top, pivot = row_temperature(temperature, entry), tl.load(tops + row), tl.load(pivots + row)
        floor = min_p_floor(top, column(min_p, entry), NATIVE)
        key0, key1 = row_key(seeds, positions, sample_index, row, entry)
        weighed = column(top_p, entry) < 1
        every = tl.zeros([TILE_GROUPS], tl.float64)
        above = tl.zeros([TILE_GROUPS], tl.float64)
        for i in range(TILES):
            g = (tl.program_id(0) * TILES + i) * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
            ids = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            raw = load_logits(base, ids, ids < vocab)
            x = scaled(raw, t)
            if weighed:
                w = weight(x, top, NATIVE)
                every += tl.sum(w, 1)
                above += tl.sum(tl.where(x > pivot, w, 0.0), 1)
            hasty = hasty_score(raw, ids, key0, key1, PER_LN2 / t, NATIVE)
            hasty = tl.where((x > pivot) & (x >= floor), hasty, NEG_INF)
            tl.store(stat + row * groups + g, tl.max(hasty, 1), g < groups)
        part = parts + (row * tl.num_programs(0) + tl.program_id(0)) * 2
        tl.store(part, tl.sum(every, 0))
        tl.store(part + 1, tl.sum(above, 0))


@triton.jit
def answer(out_tokens, out_failed, raw_tops, row, token, score, raw, RAW_TOPS: tl.constexpr):
    """raw: highest logit, as far as it matters here. raw_tops [R, RAW_TOPS]: of parts of the row before any stage, NaN
    or inf if it has a NaN; without any, `raw` is it."""
    fine = (tl.abs(raw) < INF) & (tl.abs(score) < INF)
    if RAW_TOPS:
        i = tl.arange(0, triton.next_power_of_2(RAW_TOPS))
        raw = tl.max(tl.load(raw_tops + row * RAW_TOPS + i, i < RAW_TOPS, NEG_INF), 0)
    good = tl.abs(raw) < INF
    tl.store(out_tokens + row, tl.where(fine & good, token, 0).to(tl.int64))
    tl.store(out_failed + row, tl.where(good, tl.where(fine, _FINE, _NOTHING), _BAD))
