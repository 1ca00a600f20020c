"""Device-resident state of running requests: one row ("slot") each, stable from admission to release.

The host sends only what changed; everything a step needs is gathered on the device from these tables. All tables are
made once. The last row is the dummy slot, which padding uses. Of what it wrote the host keeps a copy only to know what
no row wants (`wants`), never to compute with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.core.execution.stage import Need, RaggedColumn
from nanoengine.core.setup.plan import StagePlan
from nanoengine.core.setup.specs import ColumnSpec
from nanoengine.core.step import BlockAppends, NewSlots, StageColumn
from nanoengine.kernels.step_inputs import SlotState

MIN_RAGGED_WIDTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLimits:
    """Sizes of the tables. `max_blocks` is block-table columns; `num_groups` KV groups."""

    max_slots: int
    max_model_len: int
    vocab_size: int
    num_groups: int
    max_blocks: int


class ScalarTable:
    """One value a slot: [slots]."""

    def __init__(self, num_slots: int, spec: ColumnSpec, device: torch.device) -> None:
        self.default = spec.default
        self.values = torch.full((num_slots,), spec.default, dtype=getattr(torch, spec.dtype), device=device)

    def reset(self, slots: Tensor) -> None:
        self.values.index_fill_(0, slots, self.default)

    def write(self, slots: Tensor, values: Tensor, offsets: npt.NDArray[np.int32]) -> None:
        self.values[slots] = values.to(self.values.dtype)

    def gather(self, slots: Tensor) -> Tensor:
        return self.values.index_select(0, slots)


class RaggedTable:
    """Several values a slot: [slots, width] with counts [slots]. The width doubles when a longer row comes."""

    def __init__(self, num_slots: int, spec: ColumnSpec, device: torch.device) -> None:
        self.default = spec.default
        shape = (num_slots, MIN_RAGGED_WIDTH)
        self.values = torch.full(shape, spec.default, dtype=getattr(torch, spec.dtype), device=device)
        self.counts = torch.zeros(num_slots, dtype=torch.int32, device=device)

    def reset(self, slots: Tensor) -> None:
        self.values.index_fill_(0, slots, self.default)
        self.counts.index_fill_(0, slots, 0)

    def write(self, slots: Tensor, values: Tensor, offsets: npt.NDArray[np.int32]) -> None:
        counts = np.diff(offsets)
        self._widen(int(counts.max(initial=0)))
        self.values.index_fill_(0, slots, self.default)
        device = self.values.device
        if len(values):
            rows, columns = _ragged_index(counts, offsets)
            where = slots[staged(rows, device)], staged(columns, device)
            self.values[where] = values.to(self.values.dtype)
        self.counts[slots] = staged(counts.astype(np.int32), device)

    def _widen(self, width: int) -> None:
        old = self.values.shape[1]
        if width <= old:
            return
        wider = self.values.new_full((self.values.shape[0], 1 << (width - 1).bit_length()), self.default)
        wider[:, :old] = self.values
        self.values = wider

    def gather(self, slots: Tensor) -> RaggedColumn:
        return RaggedColumn(self.values.index_select(0, slots), self.counts.index_select(0, slots))


Table = ScalarTable | RaggedTable


def staged(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array on the device, without waiting for what the device is at: a copy from pageable memory would."""
    here = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        here = here.pin_memory()  # from torch's cache; kept until the copy is done
    return here.to(device, non_blocking=True)


def make_table(num_slots: int, spec: ColumnSpec, device: torch.device) -> Table:
    return (RaggedTable if spec.ragged else ScalarTable)(num_slots, spec, device)


def _ragged_index(
    counts: npt.NDArray[Any], offsets: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each flat value its row and its column in that row, both int64."""
    rows = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    columns = np.arange(int(counts.sum()), dtype=np.int64) - offsets[:-1].astype(np.int64)[rows]
    return rows, columns


class SlotTables:
    """The tables, and the writes that a step plan brings."""

    def __init__(self, limits: SlotLimits, stages: Sequence[StagePlan], device: torch.device) -> None:
        self.limits, self.device = limits, device
        n = limits.max_slots + 1
        self.dummy_slot = limits.max_slots

        def table(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token_ids = table(n, limits.max_model_len + 1, dtype=torch.int32)
        self.block_tables = table(limits.num_groups, n, limits.max_blocks, dtype=torch.int32)
        self.num_tokens = table(n, dtype=torch.int64)  # known tokens; the length that counts
        self.num_computed = table(n, dtype=torch.int64)  # of them, those whose KV is there
        self.prompt_lens = table(n, dtype=torch.int64)
        self.seeds = table(n, dtype=torch.int64)
        self.sample_index = table(n, dtype=torch.int64)
        self.greedy = torch.ones(n, dtype=torch.bool, device=device)
        self.min_lens = table(n, dtype=torch.int64)
        self.stop_ids = RaggedTable(n, ColumnSpec(dtype="int64", ragged=True), device)
        self.columns: Mapping[str, Mapping[str, Table]] = {
            stage.name: {name: make_table(n, spec, device) for name, spec in stage.columns.items()} for stage in stages
        }
        self._output_counts: Tensor | None = None
        self._prompt_mask: Tensor | None = None
        # host side: what each slot wants, to skip what no row of a step wants
        self.host_greedy = np.ones(n, dtype=np.bool_)
        self.host_num_logprobs = np.full(n, -1, dtype=np.int32)
        self.host_min_tokens = np.zeros(n, dtype=np.bool_)
        self.host_wants = {stage.name: np.zeros(n, dtype=np.bool_) for stage in stages}

    @property
    def keeps_history(self) -> bool:
        """Whether counts or masks over the vocabulary are kept, because somebody asked for them."""
        return self._output_counts is not None or self._prompt_mask is not None

    @property
    def state(self) -> SlotState:
        """The tables that step inputs are gathered from and drawn tokens written to."""
        return SlotState(
            token_ids=self.token_ids,
            num_tokens=self.num_tokens,
            num_computed=self.num_computed,
            block_tables=self.block_tables,
            output_counts=self._output_counts,
        )

    def put(self, array: npt.NDArray[Any]) -> Tensor:
        """A host array on the device."""
        return staged(array, self.device)

    def admit(self, new: NewSlots) -> None:
        """Enter new slots: every column of theirs is overwritten, so that nothing of the last owner stays."""
        if not len(new.slots):
            return
        counts = np.diff(new.token_offsets)
        given = {
            "num_tokens": counts, "num_computed": new.num_computed, "prompt_lens": new.prompt_lens,
            "seeds": new.seeds, "sample_index": new.sample_index, "min_lens": new.min_lens, "greedy": new.greedy,
        }  # fmt: skip
        slots, *values = self.put(np.stack((new.slots, *given.values())).astype(np.int64)).unbind()  # one upload
        for name, value in zip(given, values, strict=True):
            table: Tensor = getattr(self, name)
            table[slots] = value.to(table.dtype)
        rows, columns = _ragged_index(counts, new.token_offsets)
        row, column, ids = self.put(np.stack((rows, columns, new.token_ids.astype(np.int64)))).unbind()
        self.token_ids[slots[row], column] = ids.to(torch.int32)
        self.block_tables.index_fill_(1, slots, 0)
        self.stop_ids.write(slots, self.put(new.stop_ids), new.stop_offsets)
        for stage, tables in self.columns.items():
            if self.host_wants[stage][new.slots].any():  # else nobody has written there since the last reset
                for one in tables.values():
                    one.reset(slots)
        self._remember(new)
        self._rebuild_history(new)

    def _remember(self, new: NewSlots) -> None:
        self.host_greedy[new.slots] = new.greedy
        self.host_num_logprobs[new.slots] = new.num_logprobs
        self.host_min_tokens[new.slots] = new.min_lens > new.prompt_lens
        for wants in self.host_wants.values():
            wants[new.slots] = False

    def set_columns(self, changes: Sequence[StageColumn]) -> None:
        for change in changes:
            self.host_wants[change.stage][change.slots] = True  # first: what says no is taken to hold the defaults
            slots = self.put(change.slots.astype(np.int64))
            self.columns[change.stage][change.column].write(slots, self.put(change.values), change.offsets)

    def append_blocks(self, appends: BlockAppends) -> None:
        if len(appends.slot):
            packed = np.stack((appends.group, appends.slot, appends.index, appends.block)).astype(np.int64)
            group, slot, index, block = self.put(packed).unbind()
            self.block_tables[group, slot, index] = block.to(torch.int32)

    def history(self, need: Need) -> Tensor:
        """The table behind a `Need`; counts and masks over the vocabulary are made when first asked for."""
        shape = (self.limits.max_slots + 1, self.limits.vocab_size)
        if need is Need.TOKEN_IDS:
            return self.token_ids
        if need is Need.OUTPUT_COUNTS:
            if self._output_counts is None:
                self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
                self._rebuild_all()
            return self._output_counts
        if self._prompt_mask is None:
            self._prompt_mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self._rebuild_all()
        return self._prompt_mask

    def _rebuild_history(self, new: NewSlots) -> None:
        """Counts and prompt masks of new slots, from their tokens (again, after a preemption)."""
        if self._output_counts is None and self._prompt_mask is None:
            return
        counts = np.diff(new.token_offsets)
        rows, columns = _ragged_index(counts, new.token_offsets)
        is_prompt = columns < new.prompt_lens[rows]
        slots = new.slots.astype(np.int64)[rows]
        self._fill_history(new.slots, slots, new.token_ids, is_prompt)

    def _rebuild_all(self) -> None:
        """For slots that were running before anyone asked: from the device's own tokens."""
        columns = torch.arange(self.token_ids.shape[1], device=self.device)
        known = columns < self.num_tokens[:, None]
        prompt = columns < self.prompt_lens[:, None]
        ids = self.token_ids.long()
        if self._output_counts is not None:
            self._output_counts.zero_().scatter_add_(1, ids, (known & ~prompt).int())
        if self._prompt_mask is not None:
            hits = torch.zeros_like(self._prompt_mask, dtype=torch.int32)
            self._prompt_mask.copy_(hits.scatter_add_(1, ids, prompt.int()) > 0)

    def _fill_history(
        self,
        new: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int32],
        is_prompt: npt.NDArray[np.bool_],
    ) -> None:
        fresh = self.put(new.astype(np.int64))
        if self._output_counts is not None:
            self._output_counts.index_fill_(0, fresh, 0)
            where = self.put(slots[~is_prompt]), self.put(ids[~is_prompt].astype(np.int64))
            one = torch.ones((), dtype=torch.int32, device=self.device)
            self._output_counts.index_put_(where, one, accumulate=True)
        if self._prompt_mask is not None:
            self._prompt_mask.index_fill_(0, fresh, False)
            where = self.put(slots[is_prompt]), self.put(ids[is_prompt].astype(np.int64))
            self._prompt_mask.index_put_(where, torch.ones((), dtype=torch.bool, device=self.device))

    def record(self, slots: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Write drawn tokens to their slots and count them: a step's last act. All int64 [S]."""
        self.token_ids[slots, positions] = token_ids.to(torch.int32)
        self.num_tokens[slots] = positions + 1
        if self._output_counts is not None:
            one = torch.ones((), dtype=torch.int32, device=self.device)
            self._output_counts.index_put_((slots, token_ids), one, accumulate=True)

    def advance(self, slots: Tensor, query_lens: Tensor) -> None:
        self.num_computed.index_add_(0, slots, query_lens)
