"""The draw where each rank has a slice of the vocabulary: every rank's best as one number, whose maximum is the token.

Noise is made from the vocabulary's own ids, so the token is that of `sampling_triton.sample` over the whole row. The
references are `all_reduce.pack_keys` and `answer`.
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels import all_reduce
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.philox_triton import NATIVE
from nanoengine.kernels.sampling_scan_triton import (
    BAD_LOGITS,
    FINE,
    INF,
    NEG_INF,
    NOTHING_LEFT,
    column,
    entry_of,
    ordered,
    refine,
    row_key,
    row_temperature,
    scan,
)
from nanoengine.kernels.sampling_triton import Tail, Tuning, tuning_for

_BAD_KEY = tl.constexpr(all_reduce.BAD_KEY)
_FINE, _BAD, _NOTHING = tl.constexpr(FINE), tl.constexpr(BAD_LOGITS), tl.constexpr(NOTHING_LEFT)
_LOW_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _pick_key(
    logits, stride, vocab, groups, greedy, temperature, seeds, positions, sample_index, at, stat, out_keys,
    GREEDY: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, NATIVE: tl.constexpr, START: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The key of each row's best; `_BAD_KEY` where the slice has NaN or +inf."""
    row = tl.program_id(0).to(tl.int64)
    noisy, key0, key1 = False, 0, 0
    t = 1.0
    release_dependents(PDL)
    wait_for_inputs(PDL and not EARLY)
    if not GREEDY:
        entry = entry_of(at, row)
        noisy = column(greedy, entry) == 0
        key0, key1 = row_key(seeds, positions, sample_index, row, entry)
        t = row_temperature(temperature, entry)
    wait_for_inputs(PDL and EARLY)
    score, token, _, raw = refine(
        logits + row * stride, vocab, groups, stat + row * groups, noisy, t, key0, key1, NEG_INF,
        GROUP, GROUPS, NATIVE, START,
    )  # fmt: skip
    low = tl.where(score == NEG_INF, (tl.abs(raw) < INF).to(tl.int64), _LOW_WORD - token.to(tl.int64))
    key = (ordered(score).to(tl.int64) << 32) | low
    tl.store(out_keys + row, tl.where(raw < INF, key, _BAD_KEY))


def best_keys(
    logits: Tensor,
    tail: Tail,
    start: int,
    *,
    greedy: Tensor | None = None,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    sample_index: Tensor | None = None,
    at: Tensor | None = None,
    early: bool = False,
    tuning: Tuning | None = None,
) -> Tensor:
    """int64 [R]: the key of each row's best, to be compared with the other ranks'.

    Args:
        logits: [R, N], this rank's ids `start`, `start` + 1, …; as `sampling_triton.sample` takes them. N may be 0.
        tail: GREEDY or TEMPERATURE. The other arguments as there.
    """
    assert tail is not Tail.TRUNCATION, "truncation needs the whole row"
    rows, width = logits.shape
    if width == 0 or rows == 0:
        return all_reduce.no_keys(rows, logits.device)
    keys = torch.empty(rows, dtype=torch.int64, device=logits.device)
    assert logits.stride(1) == 1, logits.stride()
    sizes = tuning or tuning_for(rows)
    groups = triton.cdiv(width, sizes.group)
    programs = triton.cdiv(groups, sizes.tile_groups * sizes.tiles)
    stat = logits.new_empty((rows, groups), dtype=torch.float32)
    where = (logits, logits.stride(0), width, groups)
    key = (seeds, positions, sample_index, at)
    common = {"GROUP": sizes.group, "NATIVE": NATIVE, "START": start, "EARLY": early, **pdl_options(logits)}
    scan[(programs, rows)](
        *where, greedy, temperature, None, *key, stat, None,
        TAIL=int(tail), MAX_K=sizes.max_k, TILE_GROUPS=sizes.tile_groups, TILES=sizes.tiles, **common,
    )  # fmt: skip
    _pick_key[(rows,)](
        *where, greedy, temperature, *key, stat, keys,
        GREEDY=tail is Tail.GREEDY, GROUPS=max(16, triton.next_power_of_2(groups)), **common,
    )  # fmt: skip
    return keys


@triton.jit
def _answer_kernel(keys, out_tokens, out_failed, rows, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    here = i < rows
    key = tl.load(keys + i, here, 0)
    value = (key >> 32).to(tl.int32)
    lowest, highest = ordered(tl.full([BLOCK], NEG_INF, tl.float32)), ordered(tl.full([BLOCK], INF, tl.float32))
    low = key & _LOW_WORD
    nothing = (value == highest) | ((value == lowest) & (low == 1))
    bad = (value > highest) | ((value <= lowest) & (low != 1))
    failed = tl.where(bad, _BAD, tl.where(nothing, _NOTHING, _FINE))
    tl.store(out_tokens + i, tl.where(failed == _FINE, _LOW_WORD - low, 0), here)
    tl.store(out_failed + i, failed, here)


def answer(keys: Tensor, out_tokens: Tensor, out_failed: Tensor) -> None:
    """The highest keys int64 [R] -> tokens int64 [R] and failed int32 [R], as `sampling_triton.sample` gives them."""
    if len(keys):
        _answer_kernel[(1,)](keys, out_tokens, out_failed, len(keys), BLOCK=triton.next_power_of_2(len(keys)))
