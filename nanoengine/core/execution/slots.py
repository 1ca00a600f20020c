"""State of the running requests on the device: each has one row ("slot") of every table, from admission to release.

The host sends only what changed; a step gathers all it needs from these tables on the device. Those in the table buffer
are made once; ragged ones may become wider, and those over the vocabulary are made when a processor first needs them.
The last row is the dummy slot, which padding uses. Of what it sent the host keeps what lets a step skip work
(`host_...`), never a value that a token depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.api.errors import ConfigError
from nanoengine.api.processor_params import ColumnSpec, StandardOp
from nanoengine.api.processors import Need, RaggedColumn
from nanoengine.core.step import Int64, NewSlots, ProcessorColumn, StepPlan, SuppliedColumn, offsets_of
from nanoengine.kernels import step_inputs
from nanoengine.kernels.device import upload
from nanoengine.kernels.step_inputs import SlotState
from nanoengine.kernels.table_buffer import Key, Shapes, TableBuffer
from nanoengine.params.engine_plan import ProcessorPlan

MIN_RAGGED_WIDTH = 8
RANDOM, MIN_TOKENS, LOGPROBS = range(3)  # columns of `SlotTables.host_asks`
_PER_SLOT = ("num_tokens", "num_computed", "prompt_lens", "min_lens", "seeds", "sample_index")  # int64 [slots]


class FixedTable:
    """One value a slot, or `width` values: int32 or float32 in the table buffer (a bool is int32 0 or 1)."""

    def __init__(self, buffer: TableBuffer, key: Key, spec: ColumnSpec) -> None:
        self._buffer, self.key, self._spec = buffer, key, spec
        self.values = buffer.tables[key].fill_(spec.default)

    @staticmethod
    def dtype(spec: ColumnSpec) -> torch.dtype:
        """Of the table of such a column."""
        return torch.float32 if spec.dtype == "float32" else torch.int32

    def reset(self, slots: Int64) -> None:
        places = self._places(slots)
        self._buffer.write(self.key, places, np.full(len(places), self._spec.default))

    def write(self, slots: Int64, values: npt.NDArray[Any], offsets: npt.NDArray[np.int32]) -> None:
        self._buffer.write(self.key, self._places(slots), values)

    def _places(self, slots: Int64) -> Int64:
        width = self._spec.width
        return slots if width is None else (slots[:, None] * width + np.arange(width)).ravel()

    def gather(self, slots: Tensor) -> Tensor:
        """The column of rows in these slots, [R] or [R, width], of the dtype of its spec."""
        values = self.values.index_select(0, slots)
        return values != 0 if self._spec.dtype == "bool" else values


class MaskTable:
    """Bit masks have no table: a row's allows all, until a host state supplies another one for its draw."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)

    def reset(self, slots: Int64) -> None:
        pass

    def gather(self, slots: Tensor) -> Tensor:
        """int32 [R, words]."""
        return torch.full((len(slots), self._words), -1, dtype=torch.int32, device=slots.device)


class RaggedTable:
    """Several values a slot: [slots, width] with counts int32 [slots]. The width doubles when a longer row comes.

    It is not in the table buffer: what is written is uploaded at once.
    """

    def __init__(self, num_slots: int, spec: ColumnSpec, device: torch.device) -> None:
        self.default = spec.default
        shape = (num_slots, MIN_RAGGED_WIDTH)
        self.values = torch.full(shape, spec.default, dtype=getattr(torch, spec.dtype), device=device)
        self.counts = torch.zeros(num_slots, dtype=torch.int32, device=device)

    def reset(self, host_slots: Int64) -> None:
        slots = upload(host_slots, self.values.device)
        self.values.index_fill_(0, slots, self.default)
        self.counts.index_fill_(0, slots, 0)

    def write(self, host_slots: Int64, values: npt.NDArray[Any], offsets: npt.NDArray[np.int32]) -> None:
        counts, device = np.diff(offsets), self.values.device
        self._widen(int(counts.max(initial=0)))
        slots = upload(host_slots, device)
        self.values.index_fill_(0, slots, self.default)
        if len(values):
            rows, columns = ragged_places(offsets)
            where = slots[upload(rows, device)], upload(columns, device)
            self.values[where] = upload(values, device).to(self.values.dtype)
        self.counts[slots] = upload(counts.astype(np.int32), device)

    def _widen(self, width: int) -> None:
        if width > self.values.shape[1]:
            more = (1 << (width - 1).bit_length()) - self.values.shape[1]
            self.values = torch.nn.functional.pad(self.values, (0, more), value=self.default)

    def gather(self, slots: Tensor) -> RaggedColumn:
        """The column of rows in these slots."""
        return RaggedColumn(self.values.index_select(0, slots), self.counts.index_select(0, slots))


Table = FixedTable | MaskTable | RaggedTable


def overridden(column: Tensor | RaggedColumn, supplied: SuppliedColumn, default: float) -> Tensor | RaggedColumn:
    """A gathered column, with the supplied values in place of those of their rows (`draws`). May write in place."""
    if isinstance(column, Tensor):
        rows = upload(supplied.draws.astype(np.int64), column.device)
        column[rows] = upload(supplied.values, column.device).view(len(rows), *column.shape[1:])
        return column
    device, counts = column.counts.device, np.diff(supplied.offsets)
    rows, width = upload(supplied.draws.astype(np.int64), device), column.values.shape[1]
    wider = max(width, int(counts.max(initial=0)))
    own = np.full((len(counts), wider), default, dtype=supplied.values.dtype)
    own[ragged_places(supplied.offsets)] = supplied.values
    values = torch.nn.functional.pad(column.values, (0, wider - width), value=default)
    values[rows], column.counts[rows] = upload(own, device), upload(counts.astype(np.int32), device)
    return RaggedColumn(values, column.counts)


def ragged_places(offsets: npt.NDArray[np.int32]) -> tuple[Int64, Int64]:
    """For each flat value its row and its column in that row."""
    starts, counts = offsets[:-1].astype(np.int64), np.diff(offsets)
    rows = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return rows, np.arange(len(rows), dtype=np.int64) - starts[rows]


class VocabHistory:
    """Which tokens each slot has, as tables over the vocabulary. Each is made when a processor first needs it.

    Attributes:
        tables: OUTPUT_COUNTS: int32 [slots, V]; how often a slot drew each id. PROMPT_MASK: bool [slots, V]; which ids
            its prompt holds.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (num_slots, vocab_size), device
        self.tables: dict[Need, Tensor] = {}

    def make(self, need: Need, token_ids: Tensor, wanted: Tensor) -> None:
        """From the wanted ones of all slots' tokens, both [slots, max_model_len + 1]."""
        counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        counts.scatter_add_(1, token_ids.long(), wanted.int())
        self.tables[need] = counts if need is Need.OUTPUT_COUNTS else counts > 0

    def enter(self, new: NewSlots) -> None:
        """New slots, from their tokens; after a preemption they bring generated ones, too."""
        if not self.tables:
            return
        rows, columns = ragged_places(new.token_offsets)
        is_prompt = columns < new.prompt_lens[rows]
        slots, ids = new.slots.astype(np.int64), new.token_ids.astype(np.int64)
        fresh = upload(slots, self._device)
        for need, table in self.tables.items():
            table.index_fill_(0, fresh, 0)
            those = is_prompt if need is Need.PROMPT_MASK else ~is_prompt
            where = upload(slots[rows[those]], self._device), upload(ids[those], self._device)
            table.index_put_(where, table.new_ones(()), accumulate=need is Need.OUTPUT_COUNTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLimits:
    """Sizes of the tables. `max_blocks` is block-table columns; `num_groups` KV groups."""

    max_slots: int
    max_model_len: int
    vocab_size: int
    num_groups: int
    max_blocks: int


class SlotTables:
    """All tables, and what a step plan writes to them: pending until `flush` sends it.

    Attributes:
        dummy_slot: the last slot. columns: processor -> column -> its table. stop_ids: stop set of each slot that has
            `min_tokens`.
        token_ids: int32 [slots, max_model_len + 1]. block_tables: int32 [groups, slots, max_blocks].
        num_tokens, num_computed: int64 [slots]; known tokens, and how many of them have their KV. The lengths that
            count: the host's are upper bounds.
        prompt_lens, min_lens, seeds, sample_index: int64 [slots]. greedy: int32 [slots], 0 or 1.
        specs: of each (processor, column).
        host_num_logprobs: int32 [slots], -1: none. host_asks: bool [slots, 3 + P]; what the draws of a slot ask for:
            `RANDOM` (it is not greedy), `MIN_TOKENS`, `LOGPROBS`, and each processor at its place in `asks_of`, whose
            columns else hold their defaults.
    """

    def __init__(
        self, limits: SlotLimits, processors: Sequence[ProcessorPlan], device: torch.device, *, fused: bool = False
    ) -> None:
        """`fused`: tables are written and read by Triton kernels instead of torch operations."""
        self.limits, self.device, self.dummy_slot = limits, device, limits.max_slots
        self.kernels: Any = step_inputs
        if fused:
            from nanoengine.kernels import step_inputs_triton

            self.kernels = step_inputs_triton
        n = limits.max_slots + 1
        self.specs = {(one.name, column): spec for one in processors for column, spec in one.columns.items()}
        self._make_tables(n)
        self.stop_ids = RaggedTable(n, ColumnSpec(dtype="int64", ragged=True), device)
        self.vocab_history = VocabHistory(n, limits.vocab_size, device)
        self.host_num_logprobs = np.full(n, -1, dtype=np.int32)
        self.asks_of = {processor.name: place for place, processor in enumerate(processors, LOGPROBS + 1)}
        self.host_asks = np.zeros((n, LOGPROBS + 1 + len(processors)), dtype=np.bool_)

    def _make_tables(self, n: int) -> None:
        width, groups, blocks = self.limits.max_model_len + 1, self.limits.num_groups, self.limits.max_blocks
        shapes: Shapes = {"token_ids": ((n, width), torch.int32), "block_tables": ((groups, n, blocks), torch.int32)}
        shapes |= dict.fromkeys(_PER_SLOT, ((n,), torch.int64))
        shapes |= {"greedy": ((n,), torch.int32)}
        for key, spec in self.specs.items():
            if not (spec.ragged or spec.op is StandardOp.BITMASK):
                shapes[key] = (n,) if spec.width is None else (n, spec.width), FixedTable.dtype(spec)
        try:
            self.buffer = TableBuffer(shapes, self.device)
        except OverflowError as error:
            raise ConfigError(
                "the tables of so many slots take more than 8 GiB: lower engine.max_num_seqs, engine.spare_slots or "
                "engine.max_model_len, or raise engine.block_size"
            ) from error
        self.columns: dict[str, dict[str, Table]] = {}
        for key, spec in self.specs.items():
            table: Table = MaskTable(self.limits.vocab_size)
            if spec.ragged or key in shapes:
                table = RaggedTable(n, spec, self.device) if spec.ragged else FixedTable(self.buffer, key, spec)
            self.columns.setdefault(key[0], {})[key[1]] = table
        made = self.buffer.tables
        self.token_ids, self.block_tables = made["token_ids"], made["block_tables"]
        self.num_tokens, self.num_computed = made["num_tokens"], made["num_computed"]
        self.prompt_lens, self.min_lens = made["prompt_lens"], made["min_lens"]
        self.seeds, self.sample_index = made["seeds"], made["sample_index"]
        self.greedy = made["greedy"].fill_(1)

    @property
    def state(self) -> SlotState:
        """The tables that step inputs are gathered from and drawn tokens written to."""
        return SlotState(
            token_ids=self.token_ids,
            num_tokens=self.num_tokens,
            num_computed=self.num_computed,
            block_tables=self.block_tables,
            output_counts=self.vocab_history.tables.get(Need.OUTPUT_COUNTS),
        )

    def write(self, plan: StepPlan) -> None:
        """What the plan brings: new slots, their columns, and blocks that are appended."""
        if self.buffer.pending:  # of a launch that failed before they were sent
            self.buffer.will_overlap()
        if len(plan.new.slots):
            self._admit(plan.new)
        for column in plan.columns:
            self._set_column(column)
        if len(plan.draft_tokens):
            rows, behind = ragged_places(offsets_of(plan.drafts))
            places = plan.slots[rows].astype(np.int64) * self.token_ids.shape[1] + plan.starts[rows] + 1 + behind
            of_host = plan.draft_tokens >= 0
            self.buffer.write("token_ids", places[of_host], plan.draft_tokens[of_host])
        appends = plan.appends
        if len(appends.slot):  # behind a slot's last block its table holds whatever an earlier owner left
            _, slots, width = self.block_tables.shape
            row = appends.group.astype(np.int64) * slots + appends.slot
            self.buffer.write("block_tables", row * width + appends.index, appends.block)

    def _admit(self, new: NewSlots) -> None:
        """All that a new slot's row holds is written, so that nothing of its last owner stays."""
        slots, counts = new.slots.astype(np.int64), np.diff(new.token_offsets)
        lengths = counts, new.num_computed, new.prompt_lens, new.min_lens, new.seeds, new.sample_index
        self.buffer.write_each(_PER_SLOT, slots, lengths)
        self.buffer.write("greedy", slots, new.greedy)
        rows, columns = ragged_places(new.token_offsets)
        self.buffer.write("token_ids", slots[rows] * self.token_ids.shape[1] + columns, new.token_ids)
        min_tokens = new.min_lens > new.prompt_lens
        if min_tokens.any():  # no other slot's stop set is read
            self.stop_ids.write(slots, new.stop_ids, new.stop_offsets)
        stale = np.logical_or.reduce(self.host_asks[slots])
        for processor, tables in self.columns.items():
            if stale[self.asks_of[processor]]:  # else they hold their defaults
                self.buffer.will_overlap()
                for table in tables.values():
                    table.reset(slots)
        asks = np.zeros((len(slots), len(stale)), dtype=np.bool_)
        asks[:, RANDOM], asks[:, MIN_TOKENS], asks[:, LOGPROBS] = ~new.greedy, min_tokens, new.num_logprobs >= 0
        self.host_asks[slots], self.host_num_logprobs[slots] = asks, new.num_logprobs
        self.vocab_history.enter(new)

    def _set_column(self, column: ProcessorColumn) -> None:
        self.host_asks[column.slots, self.asks_of[column.processor]] = True  # first: False means defaults
        table = self.columns[column.processor][column.column]
        assert not isinstance(table, MaskTable), "a mask is supplied, not packed"
        table.write(column.slots.astype(np.int64), column.values, column.offsets)

    def flush(self) -> None:
        """Send the pending writes; everything launched from here on sees them."""
        if self.buffer.pending:
            self.kernels.scatter(self.buffer.words, upload(self.buffer.pending_writes().ravel(), self.device))
            self.buffer.clear_pending()

    def history(self, need: Need) -> Tensor:
        """The table of a `Need`, made if it is not there yet."""
        if need is Need.TOKEN_IDS:
            return self.token_ids
        if need not in self.vocab_history.tables:
            columns = torch.arange(self.token_ids.shape[1], device=self.device)
            wanted = is_prompt = columns < self.prompt_lens[:, None]
            if need is Need.OUTPUT_COUNTS:
                wanted = (columns < self.num_tokens[:, None]) & ~is_prompt
            self.vocab_history.make(need, self.token_ids, wanted)
        return self.vocab_history.tables[need]
