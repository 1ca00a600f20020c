"""The end of a step: logits, draw, log-probs, tokens to their slots.

`FinishStep.eager` serves whatever a row may ask, operation by operation. Rows that ask for nothing but standard
operations end in a graph of `CapturedTail`, one a size of step and kind of tail: per-row parameters tell the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.api.checks import CheckedModel
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.processors import Need
from nanoengine.core.execution.results import LaunchedStep, PendingLogprobs
from nanoengine.core.execution.sampler import DrawColumns, DrawRows, Sampler, vocab_slice
from nanoengine.core.execution.slots import Ints, Key, SlotTables, upload
from nanoengine.core.execution.split import slots_move
from nanoengine.core.execution.step_inputs import GatheredStep, StepBuffers, StepRows, StepSize
from nanoengine.core.step import StepPlan
from nanoengine.kernels import all_reduce

PROMPT_LOGITS_ROWS = 128  # positions whose [rows, vocabulary] logits exist at once for prompt log-probs


class CapturedTail:
    """The rows' columns, the draw, and each token to its slot, over static buffers: what a graph captures."""

    def __init__(self, sampler: Sampler, tables: SlotTables, buffers: StepBuffers, tp: TensorParallelGroup) -> None:
        self._sampler, self._tables, self._buffers, self._tp = sampler, tables, buffers, tp
        self._kernels = tables.kernels
        self._drawn = torch.zeros(3 * buffers.max_rows, dtype=torch.int32, device=tables.device)
        buffer, standard = tables.buffer, sampler.standard_columns
        keys: list[Key] = ["greedy", "seeds", "sample_index", *standard.values()]
        picked = [(buffer.first[key], buffer.tables[key].itemsize // 4) for key in keys]
        self._ops = {op: (at, buffer.tables[key].dtype) for at, (op, key) in enumerate(standard.items(), 3)}
        self._picked = torch.tensor(picked, dtype=torch.int32).to(tables.device)
        self._columns = torch.zeros(len(picked), 2 * buffers.max_rows, dtype=torch.int32, device=tables.device)

    def run(self, inputs: StepRows, kind: int, logits: Tensor) -> None:
        """One pass over `logits`, one row of them a row of the step. The rows' tables change."""
        tables, rows = self._tables, len(logits)
        drawn = self.drawn(rows)
        tokens, failed = drawn[: 2 * rows].view(torch.int64), drawn[2 * rows :]
        self._kernels.pick_columns(tables.buffer.words, inputs.slots, self._picked, self._columns)
        greedy, seeds, sample_index = self._columns[:3]
        columns = DrawColumns(
            greedy=greedy[:rows],
            seeds=seeds[: 2 * rows].view(torch.int64),
            positions=self._buffers.out.seq_lens[:rows].long(),  # behind the last token
            sample_index=sample_index[: 2 * rows].view(torch.int64),
            ops={op: self._columns[at, :rows].view(dtype) for op, (at, dtype) in self._ops.items()},
        )
        self._sampler.draw_sharded(kind, logits, columns, self._tp, tokens, failed)
        self._kernels.record(tables.state, inputs.slots, inputs.query_start_loc, tokens, inputs.token_of_row)

    def drawn(self, rows: int) -> Tensor:
        """int32 [3 R]: tokens, two words each, then failures; valid until the next pass."""
        return self._drawn[: 3 * rows]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A step between its two calls.

    hidden: [L, H], the rows that need logits; or already logits: [R, V/tp], by the graph of that size; inputs are
    the padded step's then. which: int64 [L], of a graph's logits those of the plan.
    """

    plan: StepPlan
    inputs: GatheredStep
    hidden: Tensor | None
    logits: Tensor | None
    graph: StepSize | None = None
    replayed: int = 0
    which: Ints | None = None

    def own_rows(self, tables: SlotTables) -> Forwarded:
        """Without the padding that is between a graph's rows."""
        if self.which is None or self.logits is None:
            return self
        which = upload(self.which, tables.device)
        token_of_row = np.full(len(self.logits), -1, dtype=np.int32)
        token_of_row[self.which] = np.arange(len(self.which))
        rows = replace(
            self.inputs.rows,
            token_of_row=upload(token_of_row, tables.device),
            logits_index=self.inputs.rows.logits_index.index_select(0, which),
        )
        return replace(self, inputs=replace(self.inputs, rows=rows), logits=self.logits.index_select(0, which))


@dataclass(frozen=True, slots=True)
class _Sampled:
    """token_ids, failed: [S] on the device; logprobs of those rows that asked."""

    token_ids: Tensor
    failed: Tensor
    logprobs: tuple[PendingLogprobs, ...] = ()


class FinishStep:
    """Ends steps of one model over its slot tables."""

    def __init__(self, model: CheckedModel, tables: SlotTables, sampler: Sampler, tp: TensorParallelGroup) -> None:
        self.model, self.tables, self.sampler, self.tp = model, tables, sampler, tp
        self.vocab_size = tables.limits.vocab_size

    def kind(self, slots: npt.NDArray[np.int32]) -> int | None:
        """The tail that serves these rows, as a graph; None: the eager way.

        Counts over the vocabulary, where there are any, are not kept up for rows without a processor that reads them:
        who enters a slot has them made from its tokens.
        """
        tables = self.tables
        if (tables.host_num_logprobs[slots] >= 0).any() or tables.host_min_tokens[slots].any():
            return None
        return self.sampler.tail_of(self.active(slots), random=not bool(tables.host_greedy[slots].all()))

    def eager(self, step: Forwarded) -> LaunchedStep:
        """Draw for each sampled row; writing the tokens to their slots is the last act."""
        step = step.own_rows(self.tables)
        plan = step.plan
        which = np.flatnonzero(plan.sampled)
        rows = plan.logits_rows[which]
        positions = self._token_positions(step, which) + 1
        prompt_logprobs = self._prompt_logprobs(step)
        drawn = self._draw(step, which, positions)
        at, tables = step.inputs.rows, self.tables
        with slots_move():
            tables.kernels.record(tables.state, at.slots, at.query_start_loc, drawn.token_ids, at.token_of_row)
            return LaunchedStep(
                plan, rows, drawn.token_ids, drawn.failed, drawn.logprobs, prompt_logprobs, step.replayed
            )

    def active(self, host_slots: npt.NDArray[np.int32]) -> frozenset[str]:
        """Processors that some row wants, but those that cannot change what only greedy rows take."""
        greedy, invariant = self.tables.host_greedy[host_slots], self.sampler.argmax_invariant
        return frozenset(
            name
            for name, wants in self.tables.host_wants.items()
            if wants.any() and (wants[host_slots] & ~(greedy & invariant[name])).any()
        )

    def _token_positions(self, step: Forwarded, which: Ints) -> Tensor:
        """Absolute positions of the tokens behind the given entries of `logits_index`, int64."""
        index = step.inputs.rows.logits_index
        if len(which) < len(index):
            index = index.index_select(0, upload(which, self.tables.device))
        return step.inputs.positions.index_select(0, index)

    def _logits(self, step: Forwarded, which: Ints) -> Tensor:
        """This rank's logits of entries of `logits_index`: [R, V/tp]."""
        if step.logits is not None:
            return step.logits
        assert step.hidden is not None
        every = len(which) == len(step.hidden)
        return self.model.compute_logits(step.hidden if every else step.hidden[upload(which, self.tables.device)])

    def _whole(self, logits: Tensor) -> Tensor:
        """Gathered over ranks, without the padding columns: [R, V]."""
        return self.tp.all_gather(logits)[:, : self.vocab_size]

    def _draw(self, step: Forwarded, which: Ints, positions: Tensor) -> _Sampled:
        plan = step.plan
        rows = plan.logits_rows[which].astype(np.int64)
        if not len(rows):
            none = torch.zeros(0, dtype=torch.int64, device=self.tables.device)
            return _Sampled(none, none.int())
        host_slots = plan.slots[rows]
        logits = self._logits(step, which)
        draw_rows = self._draw_rows(host_slots, positions)
        asked = np.flatnonzero(self.tables.host_num_logprobs[host_slots] >= 0)
        if self.tp.size > 1 and not len(asked) and self.sampler.takes_shards(draw_rows):
            return self._draw_from_shards(logits, draw_rows)
        logits = self._whole(logits)
        if len(asked) or not self.sampler.takes_any_dtype(draw_rows):
            logits = logits.float()
        raw = logits[upload(asked, self.tables.device)] if len(asked) else None
        token_ids, failed = self.sampler.sample(logits, draw_rows)
        if raw is None:
            return _Sampled(token_ids, failed)
        put = upload(asked, self.tables.device)
        limits = self.tables.host_num_logprobs[host_slots][asked]
        logprobs = self._logprobs(raw, token_ids[put], positions[put], rows[asked], limits)
        return _Sampled(token_ids, failed, (logprobs,))

    def _draw_from_shards(self, logits: Tensor, rows: DrawRows) -> _Sampled:
        """Each rank's best of its slice, and of these the best: one number a row and rank is exchanged."""
        start, stop = vocab_slice(self.vocab_size, self.tp)
        logits = logits[:, : stop - start]
        if not self.sampler.takes_any_dtype(rows):
            logits = logits.float()
        keys = self.tp.highest(self.sampler.best_keys(logits, rows, start))
        return _Sampled(*all_reduce.answer(keys))

    def _draw_rows(self, host_slots: npt.NDArray[np.int32], positions: Tensor) -> DrawRows:
        tables = self.tables
        greedy = tables.host_greedy[host_slots]
        active = tuple(sorted(self.active(host_slots)))
        needs = frozenset().union(*(self.sampler.needs_of(name) for name in active))
        slots = upload(host_slots.astype(np.int64), tables.device)

        def history(need: Need) -> Tensor | None:
            return tables.history(need).index_select(0, slots) if need in needs else None

        return DrawRows(
            slots=slots,
            positions=positions,
            prompt_lens=tables.prompt_lens.index_select(0, slots),
            seeds=tables.seeds.index_select(0, slots),
            sample_index=tables.sample_index.index_select(0, slots),
            greedy=tables.greedy.index_select(0, slots) != 0,
            min_lens=tables.min_lens.index_select(0, slots),
            stop_ids=tables.stop_ids.gather(slots),
            active=active,
            columns={s: {c: t.gather(slots) for c, t in tables.columns[s].items()} for s in active},
            any_min_tokens=bool(tables.host_min_tokens[host_slots].any()),
            any_random=not bool(greedy.all()),
            output_counts=history(Need.OUTPUT_COUNTS),
            prompt_mask=history(Need.PROMPT_MASK),
            token_ids=tables.token_ids if Need.TOKEN_IDS in needs else None,
        )

    def _logprobs(
        self, raw: Tensor, token_ids: Tensor, positions: Tensor, rows: Ints, limits: npt.NDArray[np.int32]
    ) -> PendingLogprobs:
        """`limits`: int32 [N], how many best ones each row asked for."""
        values, ranks, top_ids, top_values = self.sampler.logprobs(raw, token_ids, int(limits.max()))
        return PendingLogprobs(rows, limits, positions, token_ids, values, ranks, top_ids, top_values)

    def _prompt_logprobs(self, step: Forwarded) -> tuple[PendingLogprobs, ...]:
        """Log-probs of the next prompt token at each position that asked, a bounded number of rows at a time."""
        plan, parts = step.plan, []
        asked = np.flatnonzero(~plan.sampled)
        for first in range(0, len(asked), PROMPT_LOGITS_ROWS):
            which = asked[first : first + PROMPT_LOGITS_ROWS]
            rows = plan.logits_rows[which].astype(np.int64)
            positions = self._token_positions(step, which) + 1
            slots = upload(plan.slots[rows].astype(np.int64), self.tables.device)
            targets = self.tables.token_ids[slots, positions].long()
            raw = self._whole(self._logits(step, which)).float()
            parts.append(self._logprobs(raw, targets, positions, rows, plan.prompt_logprobs[which]))
        return tuple(parts)
