"""The end of a step, its tail: logits, draw, log-probs, tokens to their slots.

`FinishStep.eager` does whatever rows may ask, operation by operation. Rows that ask for nothing but standard operations
end in a graph of `CapturedTail`, one for each size of step and kind of tail; what else differs is in their columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.api.checks import CheckedModel
from nanoengine.api.draft_checks import checked_drafts
from nanoengine.api.drafters import DeviceDrafter, DraftStep
from nanoengine.api.parallel import TensorParallelGroup, vocab_slice
from nanoengine.api.processor_params import StandardOp
from nanoengine.api.processors import Need
from nanoengine.core.execution.results import Drawn, LaunchedStep, PendingLogprobs
from nanoengine.core.execution.sampler import DrawPlan, DrawRows, Sampler
from nanoengine.core.execution.slots import LOGPROBS, MIN_TOKENS, RANDOM, SlotTables, overridden, ragged_places
from nanoengine.core.execution.step_inputs import GatheredStep, StepBuffers, StepRows, StepSize
from nanoengine.core.step import (
    POOL_ALL,
    Int32,
    Int64,
    StepPlan,
    SuppliedColumn,
    offsets_of,
)
from nanoengine.kernels import all_reduce, sampling
from nanoengine.kernels.device import upload
from nanoengine.kernels.draw import DrawColumns
from nanoengine.kernels.host_ring import AnswerRing, CopiedBeside
from nanoengine.kernels.pooling import span_sums
from nanoengine.kernels.step_inputs import Answer, write_drafts

MASKED_DRAWS = 512  # the most that a step without an eager tail has, where it is late
PROMPT_LOGITS_ROWS = 128  # positions whose [rows, vocabulary] logits exist at once for prompt log-probs


class CapturedTail:
    """The draw by the rows' columns, and each token to its slot, over static buffers: what a graph captures."""

    def __init__(self, finish: FinishStep, buffers: StepBuffers, max_draws: int) -> None:
        """max_draws: the most logits of a step."""
        self._sampler, self._tables, self._buffers, self._tp = finish.sampler, finish.tables, buffers, finish.tp
        self._finish, device = finish, finish.tables.device
        self._tokens = torch.zeros(max_draws, dtype=torch.int64, device=device)
        self._failed = torch.zeros(max_draws, dtype=torch.int32, device=device)
        self._counts = torch.zeros(buffers.max_rows, dtype=torch.int32, device=device)
        self._answers = AnswerRing(max(max_draws, buffers.max_rows), device)
        shape = min(max_draws, MASKED_DRAWS), -(-finish.vocab_size // 32)
        self._mask = CopiedBeside(shape, -1, device, beside=self._sampler.choice.has("masks_beside"))
        self.host_mask, self.send_mask = self._mask.host, self._mask.send

    def write_mask(self, draws: int, own: Int64, supplied: Sequence[SuppliedColumn]) -> None:
        """The mask of the next masked pass over so many draws, to be sent: an earlier one has read its own, as the
        columns of a step follow the result of the one before it. own: which of the draws are the plan's. supplied: of
        one column; draws without any keep all. Values in `host_mask` are those of the first draws."""
        host = self.host_mask[:draws]
        places = own[supplied[0].draws] if len(supplied) == 1 and np.may_share_memory(supplied[0].values, host) else ()
        if len(places) and np.array_equal(places, np.arange(len(places))):
            host[len(places) :] = -1  # most often: they are where they belong
            return
        given = [(own[each.draws], each.values.reshape(len(each.draws), -1).copy()) for each in supplied]
        host[:] = -1
        for rows, values in given:
            host[rows] = values

    def run(self, inputs: StepRows, kind: int, logits: Tensor, max_drafts: int = 0, *, masked: bool = False) -> None:
        """One pass over `logits`, one row of them a row of the step, or a token where rows have drafts. The rows'
        tables change. masked: behind the mask that was sent."""
        tables, rows = self._tables, len(logits)
        tokens, failed = self._tokens[:rows], self._failed[:rows]
        slots, positions = inputs.slots, self._buffers.out.seq_lens[:rows]  # behind the last token
        if inputs.drafts is not None:
            token = torch.arange(rows, dtype=torch.int32, device=tables.device)
            row = torch.searchsorted(inputs.query_start_loc[1:], token, right=True).clamp(max=len(slots) - 1)
            slots, positions = slots[row], (self._buffers.out.positions[:rows] + 1).int()
        ops = {op.value: tables.buffer.tables[key] for op, key in self._sampler.standard_columns.items()}
        columns = DrawColumns(
            greedy=tables.greedy, seeds=tables.seeds, positions=positions, sample_index=tables.sample_index,
            at=slots, early=inputs.drafts is None, **ops,
        )  # fmt: skip
        self._sampler.draw(kind, logits, columns, self._tp, tokens, failed, self._mask.there[:rows] if masked else None)
        tables.kernels.settle(
            tables.state, inputs.slots, inputs.query_start_loc, tokens, inputs.token_of_row, inputs.drafts, failed,
            None if inputs.drafts is None else self._counts[: len(inputs.slots)],
            Answer(host=self._answers.values, sent=self._buffers.sent), max_drafts=max_drafts,
        )  # fmt: skip
        if self._finish.drafter is not None:
            self._finish.propose(self._finish.drafter, inputs.slots)

    def answer(self) -> tuple[npt.NDArray[np.int32], torch.cuda.Event]:
        """What the pass launched last draws, as in `Answer.host`, there behind the event, and for `TURNS` steps."""
        return self._answers.launched(self._buffers.outgoing.turn)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a graph of `size` left: logits [`size.logits`, V / tp] of the padded step. own: int64 [L], which of them
    belong to the plan's own positions. tail: the kind that was replayed too; then the logits may be older."""

    size: StepSize
    logits: Tensor
    own: Int64
    tail: int | None


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A step between its forward pass and its tail.

    Attributes:
        inputs: of the padded step, where a graph ran. graphs: as in `StepResult`, up to here.
        hidden: [L, H], of the positions that need logits; or replayed: the logits themselves, by a graph.
        pooled: float32 [P, H], of a step that pools, which no graph runs.
    """

    plan: StepPlan
    inputs: GatheredStep
    graphs: int
    hidden: Tensor | None = None
    replayed: Replayed | None = None
    pooled: Tensor | None = None


class FinishStep:
    """Ends steps of one model over its slot tables."""

    def __init__(
        self,
        model: CheckedModel,
        tables: SlotTables,
        sampler: Sampler,
        tp: TensorParallelGroup,
        drafter: DeviceDrafter | None = None,
    ) -> None:
        self.model, self.tables, self.sampler, self.tp = model, tables, sampler, tp
        self.drafter = drafter
        self.vocab_size = tables.limits.vocab_size
        self._chosen: dict[tuple[bytes, bytes], DrawPlan] = {}  # by what is asked of some draw, and of a random one

    def choose(self, plan: StepPlan, supplied: Sequence[SuppliedColumn] = ()) -> DrawPlan:
        """How the plan's tokens are drawn: as when rows asked for the same before. supplied: as `of_draws` gives it.

        A captured tail does not count what it draws (`VocabHistory`): none of its rows has a processor that reads
        counts, and they are made again when another request enters the slot.
        """
        tables = self.tables
        asks = tables.host_asks[plan.slots[plan.logits_rows[plan.sampled]]]
        for column in supplied:
            asks[column.draws, tables.asks_of[column.processor]] = True
            asks[column.draws, RANDOM] |= tables.specs[column.processor, column.column].op is StandardOp.TEMPERATURE
        some, random = np.logical_or.reduce(asks), np.logical_or.reduce(asks[asks[:, RANDOM]])
        key = some.tobytes(), random.tobytes()
        how = self._chosen.get(key)
        if how is None:
            wanted = {name: bool(random[place]) for name, place in tables.asks_of.items() if some[place]}
            flags = {"random": RANDOM, "min_tokens": MIN_TOKENS, "logprobs": LOGPROBS}
            how = self.sampler.choose(wanted, **{name: bool(some[place]) for name, place in flags.items()})
            self._chosen[key] = how
        return how

    def eager(self, step: Forwarded, how: DrawPlan, supplied: Sequence[SuppliedColumn] = ()) -> LaunchedStep:
        """Draw a token for each sampled position, take log-probs, and write the tokens to their slots at last."""
        if step.replayed is not None:
            step = _without_padding(step, step.replayed, self.tables.device)
        tables, plan, rows = self.tables, step.plan, step.inputs.rows
        sampled = np.flatnonzero(plan.sampled)
        prompt = self._prompt_logprobs(step) if len(sampled) < len(plan.sampled) else ()
        drawn = self._draw(step, sampled, how, supplied)
        if rows.drafts is not None:
            drawn = replace(drawn, counts=torch.zeros_like(rows.drafts))
        tables.kernels.settle(
            tables.state, rows.slots, rows.query_start_loc, drawn.token_ids, rows.token_of_row, rows.drafts,
            drawn.failed, drawn.counts, max_drafts=int(plan.drafts.max(initial=0)),
        )  # fmt: skip
        if self.drafter is not None:
            self.propose(self.drafter, rows.slots)
        return LaunchedStep(plan, drawn, prompt, step.graphs, step.pooled)

    def propose(self, drafter: DeviceDrafter, slots: Tensor) -> None:
        """Write the drafter's guesses behind the tokens of these slots, int [R], into the token table."""
        tables, slots = self.tables, slots.long()
        num_tokens = tables.num_tokens.index_select(0, slots)
        step = DraftStep(
            slots=slots,
            num_tokens=num_tokens,
            token_ids=tables.token_ids,
            seeds=tables.seeds.index_select(0, slots),
            sample_index=tables.sample_index.index_select(0, slots),
        )
        write_drafts(tables.token_ids, slots, num_tokens, checked_drafts(drafter, step), self.vocab_size)

    def _draw(self, step: Forwarded, which: Int64, how: DrawPlan, supplied: Sequence[SuppliedColumn]) -> Drawn:
        """Tokens and wanted log-probs of these entries of `logits_index`, int64 [S], which are all sampled."""
        tables, rows = self.tables, step.plan.logits_rows[which]
        if not len(rows):
            none = torch.zeros(0, dtype=torch.int64, device=tables.device)
            return Drawn(none, none.int())
        host_slots, positions = step.plan.slots[rows], self._positions(step, which)
        draw_rows = self._draw_rows(host_slots, positions, how)
        if draw_rows.output_counts is not None and len(step.plan.drafts):
            self._count_drafts(draw_rows.output_counts, step, which)
        if supplied:
            draw_rows = self._overridden(draw_rows, supplied)
        logits = self._logits(step, which)
        if self.tp.size > 1 and how.sharded:
            return self._draw_from_shards(logits, draw_rows, how)
        logits = self._whole(logits)
        if how.logprobs or not how.reads_only:
            logits = logits.float()
        if not how.logprobs:
            return Drawn(*self.sampler.sample(logits, draw_rows, how))
        limits = tables.host_num_logprobs[host_slots]
        asked = np.flatnonzero(limits >= 0)
        put = upload(asked, tables.device)
        raw = logits[put]  # a copy: the draw overwrites the logits
        token_ids, failed = self.sampler.sample(logits, draw_rows, how)
        logprobs = _logprobs(raw, token_ids[put], positions[put], rows[asked], limits[asked])
        return Drawn(token_ids, failed, (logprobs,))

    def _count_drafts(self, counts: Tensor, step: Forwarded, which: Int64) -> None:
        """Add the drafts before each draw to its counts, int32 [S, V], in place: they are its history if it counts."""
        plan, device = step.plan, self.tables.device
        rows = plan.logits_rows[which]
        draws, back = ragged_places(offsets_of(np.arange(len(rows)) - np.searchsorted(rows, rows)))
        drafts = step.inputs.input_ids[upload(plan.logits_index[which][draws] - back, device)].long()
        counts.index_put_((upload(draws, device), drafts), counts.new_ones(()), accumulate=True)

    def _draw_from_shards(self, logits: Tensor, rows: DrawRows, how: DrawPlan) -> Drawn:
        """Each rank takes the best of its slice of the vocabulary, [R, V / tp], and the best of these is drawn: one
        number a row and rank is exchanged."""
        start, stop = vocab_slice(self.vocab_size, self.tp)
        logits = logits[:, : stop - start]
        if not how.reads_only:
            logits = logits.float()
        keys = self.tp.highest(self.sampler.best_keys(logits, rows, how, start))
        return Drawn(*all_reduce.answer(keys))

    def _positions(self, step: Forwarded, which: Int64) -> Tensor:
        """Absolute positions of the tokens that follow these entries of `logits_index`, int64 [S]."""
        index = step.inputs.rows.logits_index
        if len(which) < len(index):
            index = index.index_select(0, upload(which, self.tables.device))
        return step.inputs.positions.index_select(0, index) + 1

    def _logits(self, step: Forwarded, which: Int64) -> Tensor:
        """This rank's logits of these entries of `logits_index`: [R, V / tp]."""
        if step.replayed is not None:
            return step.replayed.logits
        assert step.hidden is not None
        every = len(which) == len(step.hidden)
        return self.model.compute_logits(step.hidden if every else step.hidden[upload(which, self.tables.device)])

    def _whole(self, logits: Tensor) -> Tensor:
        """Gathered over ranks, without the padding columns: [R, V]."""
        return self.tp.all_gather(logits)[:, : self.vocab_size]

    def _draw_rows(self, host_slots: Int32, positions: Tensor, how: DrawPlan) -> DrawRows:
        """What the draw reads of rows in these slots, from the tables. positions: int64 [R], of the tokens drawn."""
        tables = self.tables
        slots = upload(host_slots.astype(np.int64), tables.device)
        read = {processor.name for processor in how.called} | {processor for processor, _ in how.ops.values()}
        history = {need: tables.history(need) for need in how.needs}
        counts, prompt_mask = history.get(Need.OUTPUT_COUNTS), history.get(Need.PROMPT_MASK)
        return DrawRows(
            slots=slots,
            positions=positions,
            prompt_lens=tables.prompt_lens.index_select(0, slots),
            seeds=tables.seeds.index_select(0, slots),
            sample_index=tables.sample_index.index_select(0, slots),
            greedy=tables.greedy.index_select(0, slots) != 0,
            columns={name: {c: t.gather(slots) for c, t in tables.columns[name].items()} for name in read},
            min_lens=tables.min_lens.index_select(0, slots) if how.min_tokens else None,
            stop_ids=tables.stop_ids.gather(slots) if how.min_tokens else None,
            output_counts=None if counts is None else counts.index_select(0, slots),
            prompt_mask=None if prompt_mask is None else prompt_mask.index_select(0, slots),
            token_ids=history.get(Need.TOKEN_IDS),
        )

    def _overridden(self, rows: DrawRows, supplied: Sequence[SuppliedColumn]) -> DrawRows:
        """With the supplied columns in place of those of the rows' slots. A temperature of 0 makes a draw greedy."""
        specs, columns = self.tables.specs, {name: dict(each) for name, each in rows.columns.items()}
        heated = np.zeros(len(rows.slots), dtype=np.bool_)
        for each in supplied:
            spec = specs[each.processor, each.column]
            if own := columns.get(each.processor):  # else nothing that it does counts
                own[each.column] = overridden(own[each.column], each, spec.default)
            heated[each.draws] |= spec.op is StandardOp.TEMPERATURE
        if not heated.any():
            return replace(rows, columns=columns)
        heats = [key for key, spec in specs.items() if spec.op is StandardOp.TEMPERATURE and key[0] in columns]
        cold = torch.stack([torch.as_tensor(columns[name][column] == 0) for name, column in heats]).any(0)
        return replace(rows, columns=columns, greedy=torch.where(upload(heated, cold.device), cold, rows.greedy))

    def _prompt_logprobs(self, step: Forwarded) -> tuple[PendingLogprobs, ...]:
        """Log-probs of the next prompt token at each position that asked, a bounded number of rows at a time."""
        plan, parts = step.plan, list[PendingLogprobs]()
        asked = np.flatnonzero(~plan.sampled)
        for first in range(0, len(asked), PROMPT_LOGITS_ROWS):
            which = asked[first : first + PROMPT_LOGITS_ROWS]
            rows, positions = plan.logits_rows[which], self._positions(step, which)
            slots = upload(plan.slots[rows].astype(np.int64), self.tables.device)
            targets = self.tables.token_ids[slots, positions].long()
            raw = self._whole(self._logits(step, which)).float()
            parts.append(_logprobs(raw, targets, positions, rows, plan.prompt_logprobs[which]))
        return tuple(parts)


def pool(plan: StepPlan, hidden: Tensor) -> Tensor:
    """The plan's sums of hidden states, [T, H] -> float32 [P, H]."""
    starts, rows = offsets_of(plan.query_lens), np.flatnonzero(plan.pooled)
    last = starts[rows + 1].astype(np.int64) - 1
    first = np.where(plan.pooled[rows] == POOL_ALL, starts[rows], last)
    return span_sums(hidden, upload(last, hidden.device), list(zip(first.tolist(), last.tolist(), strict=True)))


def of_draws(plan: StepPlan, supplied: Sequence[SuppliedColumn]) -> Sequence[SuppliedColumn]:
    """The same columns, with their `draws` counted among the plan's sampled positions."""
    if plan.sampled.all():
        return supplied
    place = np.cumsum(plan.sampled, dtype=np.int32) - 1
    return [replace(column, draws=place[column.draws]) for column in supplied]


def _without_padding(step: Forwarded, replayed: Replayed, device: torch.device) -> Forwarded:
    """A replayed step with the logits of the plan's own positions alone; a token is drawn of each, in their order."""
    own, rows = upload(replayed.own, device), step.inputs.rows
    if rows.drafts is None:  # else the own ones are the first ones
        token_of_row = np.full(len(replayed.logits), -1, dtype=np.int32)
        token_of_row[replayed.own] = np.arange(len(replayed.own))
        rows = replace(rows, token_of_row=upload(token_of_row, device))
    rows = replace(rows, logits_index=rows.logits_index.index_select(0, own))
    return replace(
        step,
        inputs=replace(step.inputs, rows=rows),
        replayed=replace(replayed, logits=replayed.logits.index_select(0, own)),
    )


def _logprobs(raw: Tensor, token_ids: Tensor, positions: Tensor, rows: Int32, limits: Int32) -> PendingLogprobs:
    """Log-probs under the raw logits, [N, V] before any processor. limits: how many best ones each row wants."""
    values, ranks, top_ids, top_values = sampling.token_logprobs(raw, token_ids, int(limits.max()))
    return PendingLogprobs(rows, limits, positions, token_ids, values, ranks, top_ids, top_values)
