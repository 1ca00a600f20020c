"""The inputs of one step, gathered on the device from the slot tables into static buffers.

The buffers are made once at full size and every step takes views of their fronts, so eager runs, capture and replay
share one path, and nothing is rebuilt per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.api.attention import AttentionBackend, BatchLimits, StepInputs
from nanoengine.api.plugin_calls import name_of, plugin_step
from nanoengine.core.execution.slots import SlotTables, upload
from nanoengine.core.step import Int32, StepPlan
from nanoengine.kernels.step_inputs import StepInputBuffers

PREFILL_ROWS = 8  # a graph with prefill tokens has so many prefill rows
MAX_WRITES = 4096  # words that a graph writes to the slot tables; more are sent before it
_HEADER = 4  # words; the first is the number of writes


@dataclass(frozen=True, slots=True, order=True)
class StepSize:
    """The padded shape of a step, which a graph is captured for.

    decode_rows: rows of `query_len` tokens each. prefill_tokens: tokens of up to `PREFILL_ROWS` rows behind them; a
    decode step has none.
    """

    decode_rows: int
    prefill_tokens: int = 0
    query_len: int = 1

    @property
    def rows(self) -> int:
        return self.decode_rows + (PREFILL_ROWS if self.prefill_tokens else 0)

    @property
    def tokens(self) -> int:
        return self.decode_rows * self.query_len + self.prefill_tokens

    @property
    def longest(self) -> int:
        """The most tokens that a row may have."""
        return max(self.query_len, self.prefill_tokens)

    @property
    def plain(self) -> bool:
        """One token a row: token i is row i's, and nothing about the rows but their slots differs between steps."""
        return self.tokens == self.decode_rows


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """A plan in the form that a graph was captured for: one entry of `logits_index` a row.

    Attributes:
        logits_rows: int64 [L]; which of the graph's logits (one a row) belong to the original `logits_index`.
    """

    plan: StepPlan
    logits_rows: npt.NDArray[np.int64]


def pad(plan: StepPlan, size: StepSize, dummy_slot: int) -> PaddedStep:
    """`plan`, whose logits positions are all sampled, padded to `size`: decode rows of the dummy slot behind its
    decode rows, prefill rows without a token behind its prefill rows."""
    decode, logits_rows = plan.num_decode_rows, plan.logits_rows.astype(np.int64)
    ahead, behind = size.decode_rows - decode, size.rows - size.decode_rows - (plan.num_rows - decode)
    if not ahead and size.plain:
        return PaddedStep(plan, logits_rows)

    def spread(values: npt.NDArray[np.int32], between: int, last: int) -> npt.NDArray[np.int32]:
        middle, end = np.full(ahead, between, np.int32), np.full(behind, last, np.int32)
        return np.concatenate((values[:decode], middle, values[decode:], end))

    lens = spread(plan.query_lens, size.query_len, 0)
    logits_rows[logits_rows >= decode] += ahead
    sampled = np.zeros(size.rows, np.bool_)
    sampled[logits_rows] = True
    padded = replace(
        plan,
        slots=spread(plan.slots, dummy_slot, dummy_slot),
        query_lens=lens,
        starts=spread(plan.starts, 0, 0),
        num_decode_rows=size.decode_rows,
        logits_index=np.maximum(np.cumsum(lens, dtype=np.int32) - 1, 0),  # one a row: its last token
        logits_rows=np.arange(size.rows, dtype=np.int32),
        sampled=sampled,
    )
    return PaddedStep(padded, logits_rows)


def blank_plan(size: StepSize, dummy_slot: int, start: int) -> StepPlan:
    """A step of that size in which each decode row is the dummy slot's, at position `start`, and prefill rows have no
    token: what a graph is captured on."""
    plan = decode_plan(np.full(size.rows, dummy_slot, dtype=np.int32), start)
    if size.plain:
        return plan
    lens = np.zeros(size.rows, np.int32)
    lens[: size.decode_rows] = size.query_len
    return replace(plan, num_decode_rows=size.decode_rows, query_lens=lens, logits_index=np.zeros_like(plan.slots))


@dataclass(frozen=True, slots=True)
class GatheredStep:
    """Views of the static buffers: input_ids int32 [T], positions int64 [T], slots [B], logits_index [L]; one
    `StepInputs` a KV group. Indices are int64, or int32 where a kernel gathered."""

    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    logits_index: Tensor
    groups: tuple[StepInputs, ...]


class StepBuffers:
    """Static buffers for up to `limits.max_rows` rows and `limits.max_tokens` tokens."""

    def __init__(self, limits: BatchLimits, num_groups: int, device: torch.device, *, fused: bool = False) -> None:
        """`fused`: gather by one Triton kernel instead of torch operations."""
        rows, tokens = limits.max_rows + PREFILL_ROWS, limits.max_tokens  # a mixed graph pads with further rows
        self.limits, self.max_rows = limits, rows
        self._kernels: Any = None
        self.fused = fused
        if fused:
            from nanoengine.kernels import step_inputs_triton

            self._kernels = step_inputs_triton

        def make(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.input_ids = make(tokens, dtype=torch.int32)
        self.positions = make(tokens, dtype=torch.int64)
        self.seq_lens = make(rows, dtype=torch.int32)
        if fused:  # in one piece, as they are sent: slots, offsets, and what wants logits
            self.sent = make(2 * rows + 1 + tokens, dtype=torch.int32)
            self.slots, self.query_start_loc, self.logits_index = self.sent.split_with_sizes((rows, rows + 1, tokens))
        else:
            self.row_of_token = make(tokens, dtype=torch.int64)
            self.offset_in_row = make(tokens, dtype=torch.int64)
            self.slots = make(rows, dtype=torch.int64)
            self.query_lens = make(rows, dtype=torch.int64)
            self.query_start_loc = make(rows + 1, dtype=torch.int32)
            self.logits_index = make(tokens, dtype=torch.int64)
        self.block_tables = make(num_groups, rows, limits.max_blocks, dtype=torch.int32)
        self.slot_mapping = make(num_groups, tokens, dtype=torch.int64)
        self.decode_start_loc = torch.arange(rows + 1, dtype=torch.int32, device=device)

    def gather(self, plan: StepPlan, tables: SlotTables) -> GatheredStep:
        """Fill the buffers for `plan`. Positions come from the device's own lengths, not from the plan's."""
        rows, tokens = plan.num_rows, plan.num_tokens
        assert rows <= self.max_rows
        assert tokens <= self.limits.max_tokens
        if self._kernels is not None:
            return self._gather_fused(plan, tables, rows, tokens)
        self._put_plan(plan, tables, rows, tokens)
        slots, row_of_token = self.slots[:rows], self.row_of_token[:tokens]
        computed = tables.num_computed.index_select(0, slots)
        token_slots = slots.index_select(0, row_of_token)
        positions = self.positions[:tokens]
        torch.add(computed.index_select(0, row_of_token), self.offset_in_row[:tokens], out=positions)
        self.input_ids[:tokens].copy_(tables.token_ids[token_slots, positions])
        self.seq_lens[:rows].copy_(computed + self.query_lens[:rows])
        groups = tuple(self._group(g, plan, tables, token_slots) for g in range(tables.limits.num_groups))
        return GatheredStep(
            self.input_ids[:tokens],
            positions,
            slots,
            self.logits_index[: len(plan.logits_index)],
            groups,
        )

    def _gather_fused(self, plan: StepPlan, tables: SlotTables, rows: int, tokens: int) -> GatheredStep:
        """One upload, one kernel. A decode step's offsets are always the same, and stand ready."""
        if plan.num_decode_rows == rows == tokens:
            start_loc, wanted = self.decode_start_loc[: rows + 1], len(plan.logits_index)
            packed = plan.slots
            logits_index = self.decode_start_loc[:wanted]
        else:
            start_loc, logits_index = self.query_start_loc[: rows + 1], self.logits_index[: len(plan.logits_index)]
            packed = self._packed(plan, rows)
        upload(packed, self.sent.device, self.sent)
        slots = self.slots[:rows]
        self.run_gather(tables, slots, start_loc, int(plan.query_lens.max()))
        return self.views(plan, slots, start_loc, logits_index, tokens)

    def run_gather(
        self, tables: SlotTables, slots: Tensor, start_loc: Tensor, longest: int, pad_tokens: int = 0
    ) -> None:
        """The kernel alone. longest: the most tokens of a row. pad_tokens: so many have a place in the cache."""
        self._kernels.gather(
            tables.state,
            slots,
            start_loc,
            StepInputBuffers(
                input_ids=self.input_ids,
                positions=self.positions,
                seq_lens=self.seq_lens,
                slot_mapping=self.slot_mapping,
                block_tables=self.block_tables,
            ),
            block_size=self.limits.block_size,
            max_query_len=longest,
            pad_tokens=pad_tokens,
        )

    def views(
        self, plan: StepPlan, slots: Tensor, start_loc: Tensor, logits_index: Tensor, tokens: int
    ) -> GatheredStep:
        """Of what was gathered for `plan`; tokens: its own, or more where it is padded."""
        groups = tuple(self._view(g, plan, start_loc, plan.num_rows, tokens) for g in range(len(self.block_tables)))
        return GatheredStep(self.input_ids[:tokens], self.positions[:tokens], slots, logits_index, groups)

    def _packed(self, plan: StepPlan, rows: int) -> Int32:
        """As `sent`."""
        most = self.max_rows
        packed = np.zeros(2 * most + 1 + len(plan.logits_index), dtype=np.int32)
        packed[:rows] = plan.slots
        np.cumsum(plan.query_lens, out=packed[most + 1 : most + 1 + rows])
        packed[2 * most + 1 :] = plan.logits_index
        return packed

    def _view(self, group: int, plan: StepPlan, start_loc: Tensor, rows: int, tokens: int) -> StepInputs:
        return StepInputs(
            block_tables=self.block_tables[group, :rows],
            seq_lens=self.seq_lens[:rows],
            query_start_loc=start_loc,
            slot_mapping=self.slot_mapping[group, :tokens],
            positions=self.positions[:tokens],
            num_decode_rows=plan.num_decode_rows,
            query_lens_host=tuple(plan.query_lens.tolist()),
            seq_lens_host=tuple((plan.starts + plan.query_lens).tolist()),
        )

    def _put_plan(self, plan: StepPlan, tables: SlotTables, rows: int, tokens: int) -> None:
        lens = plan.query_lens.astype(np.int64)
        start = np.zeros(rows + 1, dtype=np.int32)
        np.cumsum(lens, out=start[1:])
        row_of_token = np.repeat(np.arange(rows, dtype=np.int64), lens)
        offsets = np.arange(tokens, dtype=np.int64) - start[:-1][row_of_token]
        sent = (
            (self.slots, plan.slots.astype(np.int64)),
            (self.query_lens, lens),
            (self.query_start_loc, start),
            (self.row_of_token, row_of_token),
            (self.offset_in_row, offsets),
            (self.logits_index, plan.logits_index.astype(np.int64)),
        )
        for buffer, values in sent:
            upload(values, tables.device, buffer)

    def _group(self, group: int, plan: StepPlan, tables: SlotTables, token_slots: Tensor) -> StepInputs:
        rows, tokens, size = plan.num_rows, plan.num_tokens, self.limits.block_size
        positions = self.positions[:tokens]
        block_tables = self.block_tables[group, :rows]
        torch.index_select(tables.block_tables[group], 0, self.slots[:rows], out=block_tables)
        columns = torch.arange(block_tables.shape[1], device=block_tables.device)
        block_tables.masked_fill_(columns * size >= self.seq_lens[:rows, None], 0)
        blocks = tables.block_tables[group][token_slots, positions // size].long()
        slot_mapping = self.slot_mapping[group, :tokens]
        torch.add(blocks * size, positions % size, out=slot_mapping)
        return self._view(group, plan, self.query_start_loc[: rows + 1], rows, tokens)


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


class StepGather:
    """Gathers a step's inputs from the slot tables, and hands them to the attention backends."""

    def __init__(self, buffers: StepBuffers, tables: SlotTables, backends: Sequence[AttentionBackend]) -> None:
        self.buffers, self.tables, self._backends = buffers, tables, backends
        self._class = type(backends[0])
        self._where = f"{name_of(self._class)}.fill"

    def __call__(self, plan: StepPlan) -> GatheredStep:
        """As an eager launch does."""
        inputs = self.buffers.gather(plan, self.tables)
        self.fill(inputs)
        return inputs

    def fill(self, inputs: GatheredStep) -> None:
        with plugin_step(self._where, self._class):
            for backend, group in zip(self._backends, inputs.groups, strict=True):
                backend.fill(group)


@dataclass(frozen=True, slots=True)
class RowInputs:
    """Views, int32, of R rows: slots [R]; offsets of the rows' tokens [R + 1]; which row has drawn which token [R]
    (None: each its own); which tokens want logits [R], one a row."""

    slots: Tensor
    query_start_loc: Tensor
    token_of_row: Tensor | None
    logits_index: Tensor


class GraphInputs:
    """What a graph's step needs from the host, in one upload; the graph does the rest.

    A graph begins with writing what the plan brings into the slot tables and gathering the step's inputs from them, so
    nothing is launched in front of it. One buffer serves all graphs: each reads its rows at the front, and the writes
    behind them.
    """

    def __init__(self, buffers: StepBuffers, tables: SlotTables) -> None:
        from nanoengine.kernels import step_inputs_triton

        self._kernels: Any = step_inputs_triton
        self._buffers, self._tables = buffers, tables
        words = _HEADER + 4 * (buffers.max_rows + 4) + 2 * MAX_WRITES
        self.sent = torch.zeros(words, dtype=torch.int32, device=tables.device)

    def rows(self, size: StepSize) -> RowInputs:
        """Where a graph of that size finds them."""
        parts = [self.sent[at : at + count] for at, count in self._places(size)]
        if size.plain:
            return plain_rows(self._buffers, parts[0])
        return RowInputs(parts[0], parts[1], parts[2], parts[3])

    @staticmethod
    def _places(size: StepSize) -> list[tuple[int, int]]:
        """(first word, words) of the slots and, unless rows are plain, offsets, tokens of rows and logits index; at
        last (first word of the writes, 0). Each at a multiple of 16 bytes."""
        places, at, rows = [], _HEADER, size.rows
        for count in (rows,) if size.plain else (rows, rows + 1, rows, rows):
            places.append((at, count))
            at = -(-(at + count) // 4) * 4
        return [*places, (at, 0)]

    def send(self, plan: StepPlan, size: StepSize) -> None:
        """The rows of a padded plan and the pending writes, without waiting for the device."""
        buffer, rows = self._tables.buffer, plan.num_rows
        writes = buffer.pending_writes()
        if writes.shape[1] > MAX_WRITES:
            self._tables.flush()
            writes = writes[:, :0]
        *places, (first, _) = self._places(size)
        count = writes.shape[1]
        packed = np.zeros(first + 2 * count, dtype=np.int32)
        packed[0] = count
        values: tuple[Int32, ...] = (plan.slots,)
        if not size.plain:
            start_loc = np.zeros(rows + 1, dtype=np.int32)
            np.cumsum(plan.query_lens, out=start_loc[1:])
            values = (plan.slots, start_loc, _tokens_of_rows(plan), plan.logits_index)
        for (at, words), each in zip(places, values, strict=True):
            packed[at : at + words] = each
        packed[first : first + count], packed[first + count :] = writes
        upload(packed, self.sent.device, self.sent)
        buffer.clear_pending()

    def run(self, plan: StepPlan, size: StepSize) -> GatheredStep:
        """Write and gather, on the device alone: what a graph begins with. plan: any of that size."""
        buffers, tables, inputs = self._buffers, self._tables, self.rows(size)
        first, _ = self._places(size)[-1]
        self._kernels.scatter_counted(tables.buffer.words, self.sent, first, MAX_WRITES)
        pad_tokens = size.tokens if size.prefill_tokens else 0
        buffers.run_gather(tables, inputs.slots, inputs.query_start_loc, size.longest, pad_tokens)
        return buffers.views(plan, inputs.slots, inputs.query_start_loc, inputs.logits_index, size.tokens)

    def blank(self) -> None:
        """Rows of the dummy slot, without a token, wherever a graph may look for them."""
        self.sent.fill_(self._tables.dummy_slot)


def plain_rows(buffers: StepBuffers, slots: Tensor) -> RowInputs:
    """Rows of one token each, the slots of which are given."""
    start_loc = buffers.decode_start_loc
    return RowInputs(slots, start_loc[: len(slots) + 1], None, start_loc[: len(slots)])


def _tokens_of_rows(plan: StepPlan) -> Int32:
    """[B]: which of the plan's logits draws the row's token, -1: none."""
    out = np.full(plan.num_rows, -1, dtype=np.int32)
    drawn = np.flatnonzero(plan.sampled)
    out[plan.logits_rows[drawn]] = drawn
    return out
