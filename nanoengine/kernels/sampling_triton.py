"""Temperature, truncation and draw over a large vocabulary without a sort, in Triton. The reference is `sampling`.

The vocabulary is read in *groups* of 128 ids by several programs a row (`scan`), each group leaving one number: its
highest logit (greedy rows and rows with top-k) or its highest score by a noise made in haste, wrong by less than a
known bound. One program a row (`_pick`) then looks exactly only at the groups that can hold the winner: one, mostly.

Truncation needs no sort either:

- The k-th highest of the groups' maxima is a lower bound of the k-th highest logit. What reaches it, a little more than
  k logits, is collected, and top-k, top-p, min-p and draw happen in registers.
- Without top-k: a draw from what truncation leaves is the draw from everything whenever the latter's token is left. So
  the winner over the whole row stands if what is strictly likelier weighs less than top_p of the whole (`weigh`, one
  more read). If not, all that is not likelier than it is out too, and the next is drawn from the rest (`finish`).

Weights are whole numbers, whose float64 sums are exact in any order, so neither the split nor the batch has a say in a
threshold. No atomics. Grids depend on the shape and the `Tail` alone; all else is read on the device.
"""

# ruff: noqa: N803
from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.philox_triton import NATIVE
from nanoengine.kernels.sampling_scan_triton import (
    BAD_LOGITS,
    FINE,
    NEG_INF,
    NOTHING_LEFT,
    answer,
    column,
    entry_of,
    refine,
    row_key,
    row_temperature,
    scan,
    weigh,
)
from nanoengine.kernels.sampling_truncation_triton import finish, pick_truncated

__all__ = ["BAD_LOGITS", "FINE", "NOTHING_LEFT", "Tail", "Tuning", "sample", "tuning_for"]

_MAX_TILES = 255  # of one row in `finish`, whose counters have 8 bits


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
        collect_groups: groups read at once where the k highest are collected.
        rounds: how often all programs weigh what is above a pivot, before one program goes on alone.
    """

    group: int = 128
    tile_groups: int = 16
    tiles: int = 4
    capacity: int = 1024
    max_k: int = 256
    slow_tile: int = 4096
    collect_groups: int = 16
    rounds: int = 2


def tuning_for(rows: int) -> Tuning:
    """With few rows, many small programs each; with many, programs that read more. Measured on an H200."""
    if rows <= 16:
        return Tuning(tile_groups=8, tiles=1, collect_groups=32)
    return Tuning(tiles=1) if rows < 64 else Tuning()


@triton.jit
def _pick(
    logits, stride, vocab, groups, greedy, temperature, seeds, positions, sample_index, at, stat,
    out_tokens, out_failed, raw_tops,
    GREEDY: tl.constexpr, RAW_TOPS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, NATIVE: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token of each row without truncation."""
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
        logits + row * stride, vocab, groups, stat + row * groups, noisy, t, key0, key1, NEG_INF, GROUP, GROUPS, NATIVE
    )
    answer(out_tokens, out_failed, raw_tops, row, token, score, raw, RAW_TOPS)


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
    at: Tensor | None = None,
    early: bool = False,
    raw_tops: Tensor | None = None,
    mask: Tensor | None = None,
    tuning: Tuning | None = None,
) -> None:
    """One token a row, into `out_tokens` int64 [R] and `out_failed` int32 [R]. Without a mask the logits are left as
    they are.

    Args:
        logits: [R, V] float32, bfloat16 or float16, rows contiguous; all arithmetic is float32 of what they hold.
        tail: what the rows need at most. The tensors it has no use for may be None.
        greedy: bool or int32 [R]; the row takes the highest logit, the lowest id of equals.
        temperature: float32 [R]; up to 0 counts as 1.
        top_k: int32 [R]; 0: all. top_p: float32 [R]; 1: all. min_p: float32 [R]; 0: all.
        seeds, positions, sample_index: int64 [R], the draw's key. Positions may be int32.
        at: int32 [R]; where in the other columns a row's values are: then these are tables of any length. None: by row.
        early: columns, positions and `at` are complete even where kernels start ahead of their inputs (`pdl_triton`).
        raw_tops: float32 [R]; each row's highest raw logit or a NaN, where stages have changed them since. None: these
            are the raw ones. A row whose highest is not finite fails with `BAD_LOGITS`, another without a possible
            token with `NOTHING_LEFT`; either has token 0.
        mask: int32 [R, ceil(V / 32)], contiguous, as `bitmask.mask_bits_` has it: applied in place, to raw logits.
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
    if mask is not None:
        assert raw_tops is None and mask.is_contiguous() and mask.shape == (rows, triton.cdiv(vocab, 32)), mask.shape
        assert not sizes.group % 32, sizes.group
        raw_tops = stat.new_empty((rows, programs))
    common = {"GROUP": sizes.group, "NATIVE": NATIVE}
    tile = common | {"TILE_GROUPS": sizes.tile_groups, "TILES": sizes.tiles}
    where = (logits, logits.stride(0), vocab, groups)
    key = (seeds, positions, sample_index, at)
    start = {"EARLY": early, **pdl_options(logits)}
    peak = torch.empty_like(stat) if tail is Tail.TRUNCATION else None
    scan[(programs, rows)](
        *where, greedy, temperature, top_k, *key, stat, peak, TAIL=int(tail), MAX_K=sizes.max_k, **tile, **start,
        words=mask, raw_tops=None if mask is None else raw_tops,
    )  # fmt: skip
    out = (out_tokens, out_failed, raw_tops)
    given = common | {"RAW_TOPS": 0 if raw_tops is None else raw_tops.numel() // rows, "GROUPS": block}
    if tail is not Tail.TRUNCATION:
        _pick[(rows,)](*where, greedy, temperature, *key, stat, *out, GREEDY=tail is Tail.GREEDY, **given, **start)
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
    _, temperature, _, top_p, min_p, *key = params
    marks = (state, tops, pivots)
    drawn = (pivot_ids, pivot_scores)
    pick_truncated[(rows,)](
        *where, *params, stat, peak, group_list, values, value_ids, *marks, *drawn, *out,
        MAX_K=sizes.max_k, TILE_GROUPS=sizes.collect_groups, CAPACITY=sizes.capacity, num_warps=8, **given,
    )  # fmt: skip
    narrow = min(8, sizes.tile_groups)  # float64 sums take registers
    weighing = tile | {"TILE_GROUPS": narrow, "TILES": sizes.tile_groups * sizes.tiles // narrow}
    for left in reversed(range(sizes.rounds)):
        weigh[(programs, rows)](*where, temperature, top_p, min_p, *key, *marks, stat, parts, **weighing)
        finish[(rows,)](
            *where, programs, *params[1:], stat, parts, *marks, *drawn, *out,
            PROGRAMS=triton.next_power_of_2(programs), TILE=sizes.slow_tile, LAST=left == 0,
            num_warps=16 if left == 0 else 4, **given,
        )  # fmt: skip
