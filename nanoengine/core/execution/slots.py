"""Device-resident state of running requests: one row ("slot") each, stable from admission to release.

The host sends only what changed; everything a step needs is gathered on the device from these tables. All tables are
made once. The last row is the dummy slot, which padding uses. Of what it wrote the host keeps a copy only to know what
no row wants (`wants`), never to compute with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.api.errors import ConfigError
from nanoengine.api.processors import Need, RaggedColumn
from nanoengine.api.specs import ColumnSpec, StandardOp
from nanoengine.core.step import BlockAppends, NewSlots, ProcessorColumn
from nanoengine.kernels import step_inputs
from nanoengine.kernels.step_inputs import SlotState
from nanoengine.params.engine_plan import ProcessorPlan

MIN_RAGGED_WIDTH = 8
_LENGTHS = ("num_tokens", "num_computed", "prompt_lens", "min_lens", "seeds", "sample_index")  # int64 [slots]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLimits:
    """Sizes of the tables. `max_blocks` is block-table columns; `num_groups` KV groups."""

    max_slots: int
    max_model_len: int
    vocab_size: int
    num_groups: int
    max_blocks: int


class ScalarTable:
    """One value a slot: [slots], int32 or float32 in the arena (bool: 0 or 1 as int32)."""

    def __init__(self, num_slots: int, spec: ColumnSpec, arena: Arena) -> None:
        self._arena, self._num_slots, self._dtype = arena, num_slots, getattr(torch, spec.dtype)
        self._words = torch.float32 if self._dtype is torch.float32 else torch.int32
        self._host = np.dtype(np.float32 if self._words is torch.float32 else np.int32)
        self._default = spec.default
        self.first = arena.reserve(num_slots, 4)  # word
        self.values = arena.words  # until `make`

    def make(self) -> None:
        """When the arena is there."""
        self.values = self._arena.view(self.first, (self._num_slots,), self._words)
        self.values.fill_(self._default)

    def reset(self, slots: Ints) -> None:
        self._arena.write(self.first, slots, np.full(len(slots), self._default, self._host))

    def write(self, slots: Ints, values: npt.NDArray[Any], offsets: npt.NDArray[np.int32]) -> None:
        self._arena.write(self.first, slots, values.astype(self._host))

    def gather(self, slots: Tensor) -> Tensor:
        values = self.values.index_select(0, slots)
        return values != 0 if self._dtype is torch.bool else values


class RaggedTable:
    """Several values a slot: [slots, width] with counts [slots]. The width doubles when a longer row comes."""

    def __init__(self, num_slots: int, spec: ColumnSpec, device: torch.device) -> None:
        self.default = spec.default
        shape = (num_slots, MIN_RAGGED_WIDTH)
        self.values = torch.full(shape, spec.default, dtype=getattr(torch, spec.dtype), device=device)
        self.counts = torch.zeros(num_slots, dtype=torch.int32, device=device)

    def reset(self, host_slots: Ints) -> None:
        slots = staged(host_slots, self.values.device)
        self.values.index_fill_(0, slots, self.default)
        self.counts.index_fill_(0, slots, 0)

    def write(self, host_slots: Ints, values: npt.NDArray[Any], offsets: npt.NDArray[np.int32]) -> None:
        counts, device = np.diff(offsets), self.values.device
        self._widen(int(counts.max(initial=0)))
        slots = staged(host_slots, device)
        self.values.index_fill_(0, slots, self.default)
        if len(values):
            rows, columns = _ragged_index(counts, offsets)
            where = slots[staged(rows, device)], staged(columns, device)
            self.values[where] = staged(values, device).to(self.values.dtype)
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


def _ragged_index(
    counts: npt.NDArray[Any], offsets: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each flat value its row and its column in that row, both int64."""
    rows = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    columns = np.arange(int(counts.sum()), dtype=np.int64) - offsets[:-1].astype(np.int64)[rows]
    return rows, columns


class SlotTables:
    """The tables, and the writes that a step plan brings: they wait for `flush`, which sends them all at once."""

    def __init__(
        self, limits: SlotLimits, processors: Sequence[ProcessorPlan], device: torch.device, *, fused: bool = False
    ) -> None:
        """`fused`: write by a Triton kernel instead of torch operations."""
        self.limits, self.device = limits, device
        n = limits.max_slots + 1
        self.dummy_slot = limits.max_slots
        self._kernels: Any = step_inputs
        if fused:
            from nanoengine.kernels import step_inputs_triton

            self._kernels = step_inputs_triton
        self.arena = Arena(device)
        shapes = {
            "token_ids": ((n, limits.max_model_len + 1), torch.int32),
            "block_tables": ((limits.num_groups, n, limits.max_blocks), torch.int32),
            "greedy": ((n,), torch.int32),
        } | dict.fromkeys(_LENGTHS, ((n,), torch.int64))  # fmt: skip
        self.first = {name: self.arena.reserve(math.prod(shape), dt.itemsize) for name, (shape, dt) in shapes.items()}
        scalars: list[ScalarTable] = []

        def column(spec: ColumnSpec) -> Table:
            if spec.ragged:
                return RaggedTable(n, spec, device)
            scalars.append(ScalarTable(n, spec, self.arena))
            return scalars[-1]

        self.columns: Mapping[str, Mapping[str, Table]] = {
            processor.name: {name: column(spec) for name, spec in processor.columns.items()} for processor in processors
        }
        self.arena.make()
        for table in scalars:
            table.make()
        made = {name: self.arena.view(self.first[name], shape, dtype) for name, (shape, dtype) in shapes.items()}
        self.token_ids, self.block_tables = made["token_ids"], made["block_tables"]
        self.num_tokens = made["num_tokens"]  # known tokens; the length that counts
        self.num_computed = made["num_computed"]  # of them, those whose KV is there
        self.prompt_lens, self.min_lens = made["prompt_lens"], made["min_lens"]
        self.seeds, self.sample_index = made["seeds"], made["sample_index"]
        self.greedy = made["greedy"].fill_(1)  # int32, 0 or 1
        self.stop_ids = RaggedTable(n, ColumnSpec(dtype="int64", ragged=True), device)
        self._output_counts: Tensor | None = None
        self._prompt_mask: Tensor | None = None
        # host side: what each slot wants, to skip what no row of a step wants
        self.host_greedy = np.ones(n, dtype=np.bool_)
        self.host_num_logprobs = np.full(n, -1, dtype=np.int32)
        self.host_min_tokens = np.zeros(n, dtype=np.bool_)
        self.host_wants = {processor.name: np.zeros(n, dtype=np.bool_) for processor in processors}
        self._zero_temperature = {
            (processor.name, name): np.zeros(n, dtype=np.bool_)
            for processor in processors
            for name, spec in processor.columns.items()
            if spec.op is StandardOp.TEMPERATURE
        }

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
        if self.arena.pending:  # of a launch that did not come so far
            self.arena.will_overlap()
        if not len(new.slots):
            return
        slots, counts = new.slots.astype(np.int64), np.diff(new.token_offsets)
        lengths: list[npt.NDArray[Any]] = [
            counts, new.num_computed, new.prompt_lens, new.min_lens, new.seeds, new.sample_index
        ]  # fmt: skip
        for name, values in zip(_LENGTHS, lengths, strict=True):
            self.arena.write(self.first[name], slots, values.astype(np.int64))
        self.arena.write(self.first["greedy"], slots, new.greedy.astype(np.int32))
        rows, columns = _ragged_index(counts, new.token_offsets)
        at = slots[rows] * self.token_ids.shape[1] + columns
        self.arena.write(self.first["token_ids"], at, new.token_ids)
        if (new.min_lens > new.prompt_lens).any():  # nobody else's stop set is read
            self.stop_ids.write(slots, new.stop_ids, new.stop_offsets)
        for processor, tables in self.columns.items():
            if self.host_wants[processor][new.slots].any():  # else nobody has written there since the last reset
                self.arena.will_overlap()
                for one in tables.values():
                    one.reset(slots)
        self._remember(new)
        self._rebuild_history(new)

    def _remember(self, new: NewSlots) -> None:
        self.host_greedy[new.slots] = new.greedy
        self.host_num_logprobs[new.slots] = new.num_logprobs
        self.host_min_tokens[new.slots] = new.min_lens > new.prompt_lens
        for of_slots in (*self.host_wants.values(), *self._zero_temperature.values()):
            of_slots[new.slots] = False

    def set_columns(self, changes: Sequence[ProcessorColumn]) -> None:
        for change in changes:
            self.host_wants[change.processor][change.slots] = True  # first: what says no is taken to hold the defaults
            table = self.columns[change.processor][change.column]
            table.write(change.slots.astype(np.int64), change.values, change.offsets)
            self._set_greedy(change)

    def _set_greedy(self, change: ProcessorColumn) -> None:
        """A row takes the arg-max from the step on that brings temperature 0, until one brings another."""
        zero = self._zero_temperature.get((change.processor, change.column))
        if zero is None:
            return
        slots = change.slots.astype(np.int64)
        zero[slots] = change.values == 0
        greedy = np.logical_or.reduce([each[slots] for each in self._zero_temperature.values()])
        turned = greedy != self.host_greedy[slots]
        if turned.any():
            self.arena.will_overlap()
            self.arena.write(self.first["greedy"], slots[turned], greedy[turned].astype(np.int32))
            self.host_greedy[slots] = greedy

    def append_blocks(self, appends: BlockAppends) -> None:
        """Behind a slot's last block its table holds whatever an earlier owner left."""
        if len(appends.slot):
            _, slots, width = self.block_tables.shape
            row = appends.group.astype(np.int64) * slots + appends.slot
            self.arena.write(self.first["block_tables"], row * width + appends.index, appends.block)

    def flush(self) -> None:
        """Send the writes; from here on everything launched sees them."""
        self.arena.flush(self._kernels)

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

    def forget_history(self) -> None:
        """Drop the tables over the vocabulary; they are made again for who asks."""
        self._output_counts = self._prompt_mask = None

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


_ALIGNMENT = 4  # words; kernels read pointers that are multiples of 16 bytes faster

Ints = npt.NDArray[np.int64]


def staged(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array on the device, without waiting for what the device is at: a copy from pageable memory would."""
    here = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        here = here.pin_memory()  # from torch's cache; kept until the copy is done
    return here.to(device, non_blocking=True)


class Arena:
    """Tables of 4- and 8-byte elements over one int32 tensor, and the writes to them that wait to be sent.

    `reserve` first, for each; then `make` and `view`; then `write` and `flush`. Writes take effect in their order, at
    `flush`: what was written before something raised is sent by the next one.

    All that the host writes to them in a step is one upload and one kernel.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.words = torch.empty(0, dtype=torch.int32, device=device)
        self._size = 0
        self._offsets: list[Ints] = []
        self._values: list[npt.NDArray[np.int32]] = []
        self._overlap = False

    def reserve(self, count: int, itemsize: int) -> int:
        """Room for a table of `count` elements; returns its first word. `ConfigError` for more than indices reach."""
        assert itemsize in (4, 8), itemsize
        first = -(-self._size // _ALIGNMENT) * _ALIGNMENT
        self._size = first + count * itemsize // 4
        if self._size >= 1 << 31:
            raise ConfigError(
                "the tables of so many slots take more than 8 GiB: lower engine.max_num_seqs, engine.spare_slots or "
                "engine.max_model_len, or raise engine.block_size"
            )
        return first

    def make(self) -> None:
        """All tables, zeroed."""
        self.words = torch.zeros(self._size, dtype=torch.int32, device=self.device)

    def view(self, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The table that `reserve` made room for."""
        count = int(np.prod(shape)) * dtype.itemsize // 4
        return self.words[first : first + count].view(dtype).view(shape)

    @property
    def pending(self) -> bool:
        return bool(self._offsets)

    def write(self, first: int, index: Ints, values: npt.NDArray[Any]) -> None:
        """table.flatten()[index] = values, of the table's own dtype."""
        if values.dtype.itemsize == 8:
            index = (2 * index[:, None] + np.arange(2)).ravel()
        self._offsets.append(first + index)
        self._values.append(np.ascontiguousarray(values).view(np.int32))

    def will_overlap(self) -> None:
        """What is pending and what comes until the next `flush` may go to the same places: the last one counts."""
        self._overlap = True

    def waiting(self) -> npt.NDArray[np.int32]:
        """[2, K]: the words that wait to be written, each once, and their values."""
        if not self._offsets:
            return np.zeros((2, 0), dtype=np.int32)
        offsets, values = np.concatenate(self._offsets), np.concatenate(self._values)
        if self._overlap:
            offsets, last = np.unique(offsets[::-1], return_index=True)
            values = values[::-1][last]
        return np.stack((offsets, values), dtype=np.int32, casting="unsafe")

    def forget(self) -> None:
        """They were sent."""
        self._offsets, self._values, self._overlap = [], [], False

    def flush(self, kernels: Any) -> None:
        """Send what is pending. `kernels`: the module whose `scatter` does it."""
        if self._offsets:
            kernels.scatter(self.words, staged(self.waiting().ravel(), self.device))
            self.forget()
