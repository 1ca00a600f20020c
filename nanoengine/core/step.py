"""The two messages between scheduling and execution: `StepPlan` down, `StepResult` up.

Both are flat numpy arrays and slot numbers, never a request: they cross a process boundary as bytes, and a test
sends them through bytes and back. A *slot* is the stable row of the device tables that a running request owns; a *row*
is one request's share of one step; a *group* is a KV group (layers with equal KV needs). Ragged data are flat
values with offsets: item i is `values[offsets[i]:offsets[i + 1]]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nanoengine.api.deltas import LogprobRows

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

GRAPH_DECODE, GRAPH_MIXED, GRAPH_TAIL, GRAPH_MISSING = 1, 2, 4, 8  # bits of `StepResult.graphs`
POOL_LAST, POOL_ALL = 1, 2  # values of `StepPlan.pooled`
ROW_FINE, ROW_BAD_LOGITS, ROW_NOTHING_LEFT = 0, 1, 2  # values of `StepResult.failed`


def num_slots(max_num_seqs: int, spare_slots: int) -> int:
    """Slots that the scheduler gives and the device's tables have: `spare_slots` more than a step may have rows, but at
    most twice as many.

    A request whose last token is in flight has no row any more, but its slot until that token is committed; meanwhile
    another one takes its place in the batch.
    """
    return max_num_seqs + min(max_num_seqs, spare_slots)


def i32(values: Any = ()) -> Int32:
    return np.asarray(values, dtype=np.int32)


def i64(values: Any = ()) -> Int64:
    return np.asarray(values, dtype=np.int64)


def f32(values: Any = ()) -> Float32:
    return np.asarray(values, dtype=np.float32)


def flags(values: Any = ()) -> Bool:
    return np.asarray(values, dtype=np.bool_)


def offsets_of(counts: Any) -> Int32:
    """[N] counts -> [N + 1] offsets into the flat values."""
    out = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=out[1:])
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorColumn:
    """Values of one column of one logits processor for some new slots.

    Attributes:
        processor, column: which table of which processor they belong to.
        slots: int32 [N].
        values: flat, of the column's dtype (a scalar column has one value a slot).
        offsets: int32 [N + 1] into `values`.
    """

    processor: str
    column: str
    slots: Int32
    values: npt.NDArray[Any]
    offsets: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class SuppliedColumn:
    """Values of one column of one logits processor for some draws of one step, in place of those of their slots. They
    follow the plan, as they depend on tokens of the step before it.

    Attributes:
        processor, column: which column of which processor.
        draws: int32 [N]; entries of the plan's `logits_index`, which are sampled.
        values: flat, of the column's dtype. offsets: int32 [N + 1] into `values`.
    """

    processor: str
    column: str
    draws: Int32
    values: npt.NDArray[Any]
    offsets: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSlots:
    """Requests that enter the device tables with this step, or again: after a preemption or a withdrawn step. N slots.

    Attributes:
        slots: int32 [N].
        token_ids: int32, flat; all tokens known so far (prompt and, on re-admission, outputs).
        token_offsets: int32 [N + 1].
        prompt_lens: int32 [N]; tokens before it are prompt, the rest are outputs (counts are rebuilt from them).
        num_computed: int32 [N]; tokens whose KV is there already.
        seeds: int64 [N]; sample_index: int32 [N]; the draw's key, with the position.
        greedy: bool [N]; the row takes the arg-max: no noise is added.
        min_lens: int32 [N]; while a new token's position is below it, `stop_ids` are masked (`min_tokens`).
        stop_ids: int32, flat, with stop_offsets [N + 1]: the resolved stop set of each slot.
        num_logprobs: int32 [N]; -1: none; k: the chosen token's and the k best.
    """

    slots: Int32 = field(default_factory=i32)
    token_ids: Int32 = field(default_factory=i32)
    token_offsets: Int32 = field(default_factory=lambda: i32([0]))
    prompt_lens: Int32 = field(default_factory=i32)
    num_computed: Int32 = field(default_factory=i32)
    seeds: Int64 = field(default_factory=i64)
    sample_index: Int32 = field(default_factory=i32)
    greedy: Bool = field(default_factory=flags)
    min_lens: Int32 = field(default_factory=i32)
    stop_ids: Int32 = field(default_factory=i32)
    stop_offsets: Int32 = field(default_factory=lambda: i32([0]))
    num_logprobs: Int32 = field(default_factory=i32)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAppends:
    """Block-table writes: table[group[i], slot[i], index[i]] = block[i]. All int32 [K]."""

    group: Int32 = field(default_factory=i32)
    slot: Int32 = field(default_factory=i32)
    index: Int32 = field(default_factory=i32)
    block: Int32 = field(default_factory=i32)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one step computes. B rows (decode rows first, then prefill rows), T tokens, L logits positions.

    Attributes:
        step: running number of the step.
        new: slots that enter with this step; `columns`: their processors' values.
        appends: block-table writes, applied before the forward pass.
        slots: int32 [B]. num_decode_rows: the first rows, which continue a generated sequence.
        query_lens: int32 [B], at least 1 each; T is their sum.
        starts: int32 [B]; absolute position of each row's first token. For decode rows an upper bound: the device reads
            its own lengths, which are smaller once a row brings fewer tokens than its step had room for.
        drafts: int32 [B], or [0] where no row has any; so many of a decode row's last tokens are drafts: guesses of
            what is drawn before them. A draft counts if it is what was drawn.
        draft_tokens: int32, flat, in row order: the drafts of rows whose `starts` are exact; -1: one that the device
            made behind the draw before it.
        logits_index: int32 [L], ascending; which of the T tokens need logits. Of a row with drafts all do.
        logits_rows: int32 [L]; the row each of them belongs to.
        sampled: bool [L]; True: a token is drawn there. False: only the log-probs of the next prompt token are
            wanted (prompt_logprobs).
        prompt_logprobs: int32 [L]; how many best log-probs to report at a position that is not sampled (0 for
            sampled ones, whose number comes from the slot).
        pooled: int32 [B], or [0] where no row pools; of which of the row's tokens the hidden states are summed: 0 (of
            none), `POOL_LAST` or `POOL_ALL`. Rows that pool are prefill rows.
        late: nothing is drawn before `StepHandle.supply` has brought columns of some rows.
    """

    step: int = 0
    new: NewSlots = NewSlots()
    columns: tuple[ProcessorColumn, ...] = ()
    appends: BlockAppends = BlockAppends()
    slots: Int32 = field(default_factory=i32)
    num_decode_rows: int = 0
    query_lens: Int32 = field(default_factory=i32)
    starts: Int32 = field(default_factory=i32)
    drafts: Int32 = field(default_factory=i32)
    draft_tokens: Int32 = field(default_factory=i32)
    logits_index: Int32 = field(default_factory=i32)
    logits_rows: Int32 = field(default_factory=i32)
    sampled: Bool = field(default_factory=flags)
    prompt_logprobs: Int32 = field(default_factory=i32)
    pooled: Int32 = field(default_factory=i32)
    late: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        return int(self.query_lens.sum())


NO_LOGPROBS = LogprobRows()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step produced. B rows as in its plan.

    Attributes:
        step: the plan's number.
        token_ids: int32, flat, new tokens in row order; counts: int32 [B] (0 for a chunk that was not sampled, up to 1
            + its drafts for a row that has some: the drafts that count, and the token drawn behind them).
        failed: int32 [B]; `ROW_FINE`, `ROW_BAD_LOGITS` (its raw logits, or its sum of hidden states, were not finite)
            or `ROW_NOTHING_LEFT` (after the logits processors no token was possible). A failed row has count 0. A
            failure behind a draft cuts the row before it: the next step shows it again.
        sampled_logprobs: one entry a draw whose slot asked for log-probs: in each row first those that count. Those of
            a failed row mean nothing.
        prompt_logprobs: one entry a prompt position that asked.
        pooled: float32, flat; the sum of each row that pools, [P, hidden size].
        graphs: which parts ran as replayed CUDA graphs: a sum of `GRAPH_DECODE`, `GRAPH_MIXED`, `GRAPH_TAIL`; or
            `GRAPH_MISSING`: none, as its capture failed.
    """

    step: int = 0
    token_ids: Int32 = field(default_factory=i32)
    counts: Int32 = field(default_factory=i32)
    failed: Int32 = field(default_factory=i32)
    sampled_logprobs: LogprobRows = NO_LOGPROBS
    prompt_logprobs: LogprobRows = NO_LOGPROBS
    pooled: Float32 = field(default_factory=f32)
    graphs: int = 0
