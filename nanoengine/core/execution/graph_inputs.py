"""What a step that is a graph needs from the host, in one upload; the graph itself does the rest.

It begins with writing what the plan brings into the slot tables and gathering the step's inputs from them, so that
nothing is launched in front of it, and nothing waits for what is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoengine.core.execution.slots import SlotTables
from nanoengine.core.execution.step_inputs import GatheredStep, StepBuffers
from nanoengine.core.step import Int32, StepPlan

MAX_WRITES = 4096  # words to be written in the step; more are sent before it
_HEADER = 4  # words; the first is the number of writes


@dataclass(frozen=True, slots=True)
class RowInputs:
    """Views, int32, of R rows: slots [R]; offsets of the rows' tokens [R + 1]; which row has drawn which token [R]
    (None: each its own); which tokens want logits [R], one a row."""

    slots: Tensor
    query_start_loc: Tensor
    token_of_row: Tensor | None
    logits_index: Tensor


class GraphInputs:
    """One buffer for all graphs: each reads its rows at the front, and the writes behind them."""

    def __init__(self, buffers: StepBuffers, tables: SlotTables) -> None:
        from nanoengine.kernels import step_inputs_triton

        self._kernels: Any = step_inputs_triton
        self._buffers, self._tables = buffers, tables
        words = _HEADER + 4 * (buffers.max_rows + 4) + 2 * MAX_WRITES
        self.sent = torch.zeros(words, dtype=torch.int32, device=tables.device)

    def rows(self, rows: int, *, mixed: bool) -> RowInputs:
        """Where a graph of so many rows finds them. For decode rows alone all but the slots is always the same."""
        parts = [self.sent[at : at + count] for at, count in self._places(rows, mixed=mixed)]
        if mixed:
            return RowInputs(parts[0], parts[1], parts[2], parts[3])
        start_loc = self._buffers.decode_start_loc
        return RowInputs(parts[0], start_loc[: rows + 1], None, start_loc[:rows])

    @staticmethod
    def _places(rows: int, *, mixed: bool) -> list[tuple[int, int]]:
        """(first word, words) of slots, and for mixed steps offsets, tokens of rows and logits index; at last (first
        word of the writes, 0). Each at a multiple of 16 bytes."""
        places, at = [], _HEADER
        for count in (rows, rows + 1, rows, rows) if mixed else (rows,):
            places.append((at, count))
            at = -(-(at + count) // 4) * 4
        return [*places, (at, 0)]

    def send(self, plan: StepPlan, *, mixed: bool) -> None:
        """The rows of a padded plan and the writes that wait, without waiting for the device."""
        arena, rows = self._tables.arena, plan.num_rows
        writes = arena.waiting()
        if writes.shape[1] > MAX_WRITES:
            self._tables.flush()
            writes = writes[:, :0]
        *places, (first, _) = self._places(rows, mixed=mixed)
        count = writes.shape[1]
        packed = np.zeros(first + 2 * count, dtype=np.int32)
        packed[0] = count
        values: tuple[Int32, ...] = (plan.slots,)
        if mixed:
            start_loc = np.zeros(rows + 1, dtype=np.int32)
            np.cumsum(plan.query_lens, out=start_loc[1:])
            values = (plan.slots, start_loc, _tokens_of_rows(plan), plan.logits_index)
        for (at, words), each in zip(places, values, strict=True):
            packed[at : at + words] = each
        packed[first : first + count], packed[first + count :] = writes
        here = torch.from_numpy(packed)
        self.sent[: len(packed)].copy_(here.pin_memory() if self.sent.is_cuda else here, non_blocking=True)
        arena.forget()

    def run(self, plan: StepPlan, tokens: int, longest: int, *, mixed: bool) -> GatheredStep:
        """Write and gather, on the device alone: what a graph begins with.

        plan: any of its size. tokens: with padding. longest: the most tokens that a row may have.
        """
        buffers, tables, inputs = self._buffers, self._tables, self.rows(plan.num_rows, mixed=mixed)
        first, _ = self._places(plan.num_rows, mixed=mixed)[-1]
        self._kernels.scatter_counted(tables.arena.words, self.sent, first, MAX_WRITES)
        buffers.run_gather(tables, inputs.slots, inputs.query_start_loc, longest, tokens if mixed else 0)
        return buffers.views(plan, inputs.slots, inputs.query_start_loc, inputs.logits_index, tokens)

    def blank(self) -> None:
        """Rows of the dummy slot, without a token, wherever a graph may look for them."""
        self.sent.fill_(self._tables.dummy_slot)


def _tokens_of_rows(plan: StepPlan) -> Int32:
    """[B]: which of the plan's logits draws the row's token, -1: none."""
    out = np.full(plan.num_rows, -1, dtype=np.int32)
    drawn = np.flatnonzero(plan.sampled)
    out[plan.logits_rows[drawn]] = drawn
    return out
