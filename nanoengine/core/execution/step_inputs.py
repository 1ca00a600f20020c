"""The inputs of a step: what the host sends in one upload, and what is gathered from the slot tables on the device.

An eager step and a graph do the same: write what the plan brings into the slot tables, gather into static buffers, and
give the attention backends their views. Only a graph has it captured, for one padded size of step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nanoengine.api.attention import AttentionBackend, BatchLimits, StepInputs
from nanoengine.api.plugin_calls import name_of, plugin_step
from nanoengine.core.execution.slots import SlotTables
from nanoengine.core.step import Int32, Int64, StepPlan, offsets_of
from nanoengine.kernels.host_ring import HostRing
from nanoengine.kernels.step_inputs import StepInputBuffers
from nanoengine.kernels.table_buffer import ALIGNMENT

PREFILL_ROWS, MOST_PREFILL_ROWS = 8, 64  # of a graph with prefill tokens: up to FEW_TOKENS of them, and of more
FEW_TOKENS = 2048
MAX_WRITES = 4096  # words that a step writes to the slot tables; more are sent before it


@dataclass(frozen=True, slots=True, order=True)
class StepSize:
    """The padded shape of a step, which a graph is captured for.

    decode_rows: rows of up to `query_len` tokens each: more than one where rows have drafts. prefill_tokens: tokens of
    up to `prefill_rows` rows behind them; a decode step has none.
    """

    decode_rows: int
    prefill_tokens: int = 0
    query_len: int = 1

    @property
    def prefill_rows(self) -> int:
        few = PREFILL_ROWS if self.prefill_tokens else 0
        return few if self.prefill_tokens <= FEW_TOKENS else MOST_PREFILL_ROWS

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    @property
    def tokens(self) -> int:
        return self.decode_rows * self.query_len + self.prefill_tokens

    @property
    def logits(self) -> int:
        """How many tokens have logits: the last one of each row, or all where rows have drafts."""
        return self.tokens if self.query_len > 1 else self.rows

    @property
    def longest(self) -> int:
        """The most tokens that a row may have."""
        return max(self.query_len, self.prefill_tokens)

    @property
    def plain(self) -> bool:
        """One token a row: token i is row i's, and nothing about the rows but their slots differs between steps."""
        return self.tokens == self.decode_rows


def pad(plan: StepPlan, size: StepSize, dummy_slot: int) -> tuple[StepPlan, Int64]:
    """`plan`, all of whose logits positions are sampled, in the form that a graph of `size` was captured for: decode
    rows of the dummy slot behind its decode rows, without a token where rows have drafts; prefill rows without a token
    behind its prefill rows; logits of each row's last token, or of all tokens, those behind the last row too. With it
    int64 [L]: which of these logits are the plan's own."""
    decode, own = plan.num_decode_rows, plan.logits_rows.astype(np.int64)
    more_decode, drafts = size.decode_rows - decode, size.query_len > 1
    if not more_decode and size.plain:
        return plan, own

    def spread(values: Int32, fill: int = 0) -> Int32:
        out = np.full(size.rows, fill, np.int32)
        out[:decode], out[size.decode_rows : plan.num_rows + more_decode] = values[:decode], values[decode:]
        return out

    lens = spread(plan.query_lens)
    lens[decode : size.decode_rows] = not drafts
    if drafts:
        own, index = plan.logits_index.astype(np.int64), np.arange(size.tokens, dtype=np.int32)
        rows = np.pad(plan.logits_rows, (0, size.tokens - len(own)))
    else:
        own[own >= decode] += more_decode
        index, rows = np.maximum(np.cumsum(lens, dtype=np.int32) - 1, 0), np.arange(size.rows, dtype=np.int32)
    padded = replace(
        plan,
        slots=spread(plan.slots, dummy_slot),
        query_lens=lens,
        starts=spread(plan.starts),
        drafts=spread(plan.drafts) if drafts else plan.drafts,
        num_decode_rows=size.decode_rows,
        logits_index=index,
        logits_rows=rows,
        sampled=np.bincount(own, minlength=size.logits) > 0,
    )
    return padded, own


def decode_plan(slots: Int32, start: int) -> StepPlan:
    """A step that continues each of `slots` by one token from position `start`, and draws."""
    count = len(slots)
    rows = np.arange(count, dtype=np.int32)
    return StepPlan(
        slots=slots,
        num_decode_rows=count,
        query_lens=np.ones(count, dtype=np.int32),
        starts=np.full(count, start, dtype=np.int32),
        logits_index=rows,
        logits_rows=rows,
        sampled=np.ones(count, dtype=np.bool_),
        prompt_logprobs=np.zeros(count, dtype=np.int32),
    )


@dataclass(frozen=True, slots=True)
class StepRows:
    """Rows of a step on the device, int32.

    Attributes:
        slots: [B]. query_start_loc: [B + 1], offsets of the rows' tokens.
        token_of_row: [B]; which of the drawn tokens is the row's first, -1: none. None: each row draws its own.
        logits_index: [L]; which tokens want logits.
        drafts: [B]; how many drafts each row has. None: no row has any.
    """

    slots: Tensor
    query_start_loc: Tensor
    token_of_row: Tensor | None
    logits_index: Tensor
    drafts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GatheredStep:
    """Views of the static buffers: input_ids int32 [T], positions int64 [T]; one `StepInputs` a KV group."""

    rows: StepRows
    input_ids: Tensor
    positions: Tensor
    groups: tuple[StepInputs, ...]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where in `StepBuffers.sent` things are, each at a multiple of 16 bytes.

    rows: slots and, unless rows are plain, offsets, token of each row, logits index, and drafts where there are some.
    writes: the first word of them.
    """

    rows: tuple[slice, ...]
    writes: int


class StepBuffers:
    """Static buffers for up to `limits.max_rows` rows and `limits.max_tokens` tokens. They are made once; every step
    takes views of their fronts.

    Attributes:
        sent: int32; what the host sends in a step: the number of writes to the tables, its turn, the rows, the writes.
        out: what is gathered.
    """

    def __init__(self, limits: BatchLimits, tables: SlotTables, backends: Sequence[AttentionBackend]) -> None:
        """backends: one a KV group."""
        rows, tokens = limits.max_rows + MOST_PREFILL_ROWS, limits.max_tokens  # a mixed graph pads with further rows
        groups, device = tables.limits.num_groups, tables.device
        self.limits, self.max_rows, self.tables, self._backends = limits, rows, tables, backends
        self._backend_class = type(backends[0])
        self._fill_name = f"{name_of(self._backend_class)}.fill"
        words = _layout(rows, max(rows, tokens), plain=False, drafts=True).writes + 2 * MAX_WRITES
        self.outgoing = HostRing((words,), device)
        self.sent = torch.zeros(words, dtype=torch.int32, device=device)
        self.out = StepInputBuffers(
            input_ids=torch.zeros(tokens, dtype=torch.int32, device=device),
            positions=torch.zeros(tokens, dtype=torch.int64, device=device),
            seq_lens=torch.zeros(rows, dtype=torch.int32, device=device),
            slot_mapping=torch.zeros(groups, tokens, dtype=torch.int64, device=device),
            block_tables=torch.zeros(groups, rows, limits.max_blocks, dtype=torch.int32, device=device),
        )
        self._plain_start_loc = torch.arange(rows + 1, dtype=torch.int32, device=device)

    def blank_plan(self, size: StepSize) -> StepPlan:
        """A step of that size in which each decode row is the dummy slot's, at the last position, and prefill rows have
        no token: what a graph is captured on."""
        slots = np.full(size.rows, self.tables.dummy_slot, dtype=np.int32)
        plan = decode_plan(slots, self.limits.max_model_len - size.query_len)
        if size.plain:
            return plan
        if size.query_len > 1:
            index = np.arange(size.tokens, dtype=np.int32)
            lens, sampled = np.full(size.rows, size.query_len, np.int32), np.ones_like(index, np.bool_)
            plan = replace(plan, drafts=lens - 1, query_lens=lens, logits_index=index, sampled=sampled)
            return replace(plan, logits_rows=index // size.query_len)
        lens = (plan.logits_rows < size.decode_rows).astype(np.int32)
        return replace(plan, num_decode_rows=size.decode_rows, query_lens=lens, logits_index=np.zeros_like(plan.slots))

    def gather(self, plan: StepPlan) -> GatheredStep:
        """The inputs of an eager step: one upload, the pending writes to the tables, and the gathering."""
        assert plan.num_rows <= self.max_rows
        assert plan.num_tokens <= self.limits.max_tokens
        layout, num_writes = self.send(plan, np.arange(np.count_nonzero(plan.sampled)))
        if num_writes:
            writes = self.sent[layout.writes :][: 2 * num_writes]
            self.tables.kernels.scatter(self.tables.buffer.words, writes)
        self.tables.buffer.clear_pending()
        return self._gather(plan, self._rows(layout), plan.num_tokens, int(plan.query_lens.max()))

    def gather_in_graph(self, plan: StepPlan, size: StepSize) -> GatheredStep:
        """The same of what was sent for a padded plan, on the device alone. `plan`: any of that size."""
        layout = _layout(size.rows, size.logits, plain=size.plain, drafts=size.query_len > 1)
        self.tables.kernels.scatter_counted(self.tables.buffer.words, self.sent, layout.writes, MAX_WRITES)
        return self._gather(plan, self._rows(layout), size.tokens, size.longest, padded=not size.plain)

    def send(self, plan: StepPlan, drawn: Int64) -> tuple[_Layout, int]:
        """Upload the plan's rows and the pending writes, without waiting. Returns how many writes are to be applied.

        `drawn`: int64 [S], ascending, for each sampled position which of the drawn tokens is its own.
        """
        writes = self.tables.buffer.pending_writes()
        if writes.shape[1] > MAX_WRITES:
            self.tables.flush()
            writes = writes[:, :0]
        drafts = len(plan.drafts) > 0
        plain = plan.num_decode_rows == plan.num_rows == plan.num_tokens and not drafts
        layout = _layout(plan.num_rows, len(plan.logits_index), plain=plain, drafts=drafts)
        packed, end = self.outgoing.next(), layout.writes + writes.size
        packed[:2] = writes.shape[1], self.outgoing.turn
        packed[layout.writes : end] = writes.ravel()
        rows: tuple[Int32, ...] = (plan.slots,)
        if not plain:
            token_of_row = np.full(plan.num_rows, -1, dtype=np.int32)
            token_of_row[plan.logits_rows[plan.sampled][::-1]] = drawn[::-1]  # a row's first draw is written last
            rows = (plan.slots, offsets_of(plan.query_lens), token_of_row, plan.logits_index)
            rows += (plan.drafts,) if drafts else ()
        for place, values in zip(layout.rows, rows, strict=True):
            packed[place] = values
        self.outgoing.send(end, self.sent)
        return layout, writes.shape[1]

    def _rows(self, layout: _Layout) -> StepRows:
        views = [self.sent[part] for part in layout.rows]
        if len(views) == 1:  # token i is row i's
            start_loc, count = self._plain_start_loc, len(views[0])
            return StepRows(views[0], start_loc[: count + 1], None, start_loc[:count])
        return StepRows(*views)

    def _gather(
        self, plan: StepPlan, rows: StepRows, tokens: int, longest: int, *, padded: bool = False
    ) -> GatheredStep:
        """longest: the most tokens of a row. padded: of the tokens those behind the last row have a place in the cache,
        and only the device knows how many."""
        out, count = self.out, len(rows.slots)
        self.tables.kernels.gather(
            self.tables.state, rows.slots, rows.query_start_loc, out, block_size=self.limits.block_size,
            max_query_len=longest, num_tokens=None if padded else tokens, pad_tokens=tokens if padded else 0,
        )  # fmt: skip
        decode, queries = plan.num_decode_rows, 1
        if len(plan.drafts):
            queries = int(plan.query_lens[:decode].max())
            if queries > self._backend_class.capabilities.decode_queries:
                decode, queries = 0, 1  # they are prefill rows to it
        lens, ends = tuple(plan.query_lens.tolist()), tuple((plan.starts + plan.query_lens).tolist())
        groups = tuple(
            StepInputs(
                block_tables=block_tables[:count],
                seq_lens=out.seq_lens[:count],
                query_start_loc=rows.query_start_loc,
                slot_mapping=slot_mapping[:tokens],
                positions=out.positions[:tokens],
                num_decode_rows=decode,
                decode_query_len=queries,
                query_lens_host=lens,
                seq_lens_host=ends,
            )
            for block_tables, slot_mapping in zip(out.block_tables, out.slot_mapping, strict=True)
        )
        with plugin_step(self._fill_name, self._backend_class):
            for backend, group in zip(self._backends, groups, strict=True):
                backend.fill(group)
        return GatheredStep(rows, out.input_ids[:tokens], out.positions[:tokens], groups)


def _layout(rows: int, logits: int, *, plain: bool, drafts: bool = False) -> _Layout:
    """For so many rows, and positions that want logits. plain: one token a row, and logits of each. drafts: some rows
    have drafts."""
    parts, at = [], ALIGNMENT
    for count in (rows,) if plain else (rows, rows + 1, rows, logits, *[rows] * drafts):
        parts.append(slice(at, at + count))
        at = -(-(at + count) // ALIGNMENT) * ALIGNMENT
    return _Layout(tuple(parts), at)
