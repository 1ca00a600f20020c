"""What the result of a step means for its requests: tokens, log-probs, ends, blocks to publish."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from nanoengine.api.deltas import Float32, LogprobRows
from nanoengine.api.errors import draw_failure
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.messages import ScheduledStep, Update
from nanoengine.core.scheduling.queues import Roster
from nanoengine.core.step import ROW_BAD_LOGITS, StepResult, offsets_of
from nanoengine.params.generated import EndReason, first_end


class RowResult(NamedTuple):
    """One row's part of a `StepResult`. start, end: of a chunk: tokens of its request whose KV is written before and
    once it has run. drawn: the most tokens that the row could bring; a vector is one."""

    start: int
    end: int
    drawn: int
    token_ids: Sequence[int]
    failed: int = 0
    sampled_logprobs: LogprobRows | None = None
    prompt_logprobs: LogprobRows | None = None
    pooled: Float32 | None = None


def commit_rows(step: ScheduledStep, result: StepResult, roster: Roster) -> list[Update]:
    """Books a result, row by row in the plan's order. Returns an update for each live row that has something to report.

    Most decode rows bring one token and nothing else: below `commit_check_at` it is appended right here.
    """
    plain = step.plan.num_decode_rows  # the first rows, each of which brings one token and no log-probs; else none
    if len(result.sampled_logprobs.rows) or len(step.plan.drafts) or (result.counts[:plain] != 1).any():
        plain = 0
    updates: list[Update] = []
    new = tuple.__new__  # quicker than Update's own; it takes all fields, in their order
    for (request, generation), token in zip(step.rows, result.token_ids[:plain].tolist(), strict=False):
        output, check_at = request.output_token_ids, request.commit_check_at
        count = len(output)
        if count == check_at == request.publish_at - request.prompt_len:  # a block is full, which is often all
            roster.blocks.publish(request, request.publish_at)
            check_at = request.commit_check_at = min(request.publish_at, request.max_len - 1) - request.prompt_len
        if count < check_at and token not in request.stop_set:
            output.append(token)
            if count + 1 >= request.report_at:
                updates.append(new(Update, (request, (token,), None, None, None, None, None, None)))
        else:
            end = request.prompt_len + count
            row = RowResult(end - 1, end, 1, (token,))
            _commit_row(request, generation, row, roster, updates)
    if plain < len(step.rows):
        for (request, generation), row in zip(step.rows[plain:], _row_results(step, result, plain), strict=True):
            _commit_row(request, generation, row, roster, updates)
    if roster.policy.counts:
        for update in updates:
            roster.tell(roster.policy.served, update.request, 0, len(update.new_token_ids))
    return updates


def publish_prompts(step: ScheduledStep, blocks: BlockManager) -> None:
    """The prompt blocks that the newest step computes can be found from here on: a step that reads them is launched
    later, on one stream. Called right behind the launch, so that the device does not wait for it."""
    first = step.plan.num_decode_rows
    ends = step.plan.starts[first:] + step.plan.query_lens[first:]
    for (request, _), end in zip(step.rows[first:], ends.tolist(), strict=True):
        step.published.extend(blocks.publish(request, min(end, request.prompt_len)))


def take_back_rows(step: ScheduledStep, roster: Roster, *, unadmit: bool) -> None:
    """Un-books the newest step. Its requests keep slots and blocks; with `unadmit` the admitted ones keep neither."""
    roster.blocks.withdraw(step.published)
    admitted = {each.slot for each in step.admitted}
    for (request, generation), size, drawn in zip(step.rows, step.plan.query_lens.tolist(), step.drawn, strict=True):
        if request.generation != generation:  # it has ended, or was preempted since
            request.length -= drawn
            continue
        request.unbook(size, drawn)
        roster.unsent.add(request)
        if unadmit and request.slot in admitted:
            roster.unseat(request)
        elif request.num_computed < request.prompt_len:
            roster.blocks.publish_again(request)


def _commit_row(request: Request, generation: int, row: RowResult, roster: Roster, updates: list[Update]) -> None:
    """Books one row. `generation`: that of the request when the step was scheduled."""
    if request.status is Status.FINISHED:
        return
    if row.failed or generation == request.void_generation:
        request.length -= row.drawn
        if generation != request.void_generation:
            _fail_row(request, generation, row.failed, roster, updates)
        return
    current, prompt, end = request.generation == generation, row.prompt_logprobs, row.end
    request.prompt_done = min(end, request.prompt_len)
    if prompt is not None:
        request.prompt_logprobs_done = int(prompt.positions[-1]) + 1
    if row.token_ids:
        too_much = row.drawn - len(row.token_ids)
        request.length -= too_much
        request.num_computed -= too_much if current else 0
        new, finish_reason, stop_reason = _append(request, row.token_ids)
        end = request.prompt_len + len(request.output_token_ids) - 1
    if current and end >= request.publish_at:
        roster.blocks.publish(request, end)
    if row.token_ids:
        logprobs = None if row.sampled_logprobs is None else row.sampled_logprobs.part(0, len(new))
        updates.append(Update(request, tuple(new), finish_reason, stop_reason, logprobs, prompt))
        if finish_reason is not None:
            roster.remove(request)
            return
        roster.retry_alone.discard(request)  # it came past the point where its step broke
        if current:
            request.commit_check_at = min(request.publish_at, request.max_len - 1) - request.prompt_len
    elif prompt is not None:
        updates.append(Update(request, prompt_logprobs=prompt))
    elif row.pooled is not None:
        _pool(request, row, row.pooled, roster, updates)


def _pool(request: Request, row: RowResult, pooled: Float32, roster: Roster, updates: list[Update]) -> None:
    """Adds a chunk's sum of hidden states; the last chunk's ends the request. The first one's starts anew: what came
    before it was of an earlier admission."""
    request.pooled = request.pooled + pooled if row.start and request.pooled is not None else pooled.copy()
    if row.drawn:
        count = np.float32(request.prompt_len if request.params.pooling == "mean" else 1)
        vector = request.pooled / count
        updates.append(Update(request, finish_reason="stop", pooled=vector))
        roster.remove(request)


def _append(request: Request, new: Sequence[int]) -> tuple[Sequence[int], EndReason | None, int | str | None]:
    """Appends the tokens that a row brought, which `length` counts, up to the one that ends the request.

    Returns the tokens that were kept, finish_reason and stop_reason.
    """
    length = request.prompt_len + len(request.output_token_ids)
    kept, reason = first_end(new, length, request.stop_set, request.min_len, request.max_len)
    request.length -= len(new) - kept
    request.output_token_ids += new[:kept]
    if reason == "stop":
        return new[:kept], reason, None if new[kept - 1] in request.params.eos_ids else new[kept - 1]
    return new[:kept], reason, request.length_reason if reason else None


def _fail_row(request: Request, generation: int, failed: int, roster: Roster, updates: list[Update]) -> None:
    if failed == ROW_BAD_LOGITS:  # which of the blocks that it read or wrote are bad, nothing says
        roster.blocks.bar(request)
        if request.borrowed:  # the fault may be another request's
            request.void_generation = generation
            if request.generation == generation:  # else it was preempted since, and waits
                roster.preempt(request, "its logits were not finite, over blocks that others had computed")
            return
    roster.remove(request)
    updates.append(Update(request, error=draw_failure(request.params.restrictions, finite=failed != ROW_BAD_LOGITS)))


def _row_results(step: ScheduledStep, result: StepResult, first: int) -> list[RowResult]:
    """The parts of the rows from `first` on, in the plan's order."""
    plan, tokens, offsets = step.plan, result.token_ids.tolist(), offsets_of(result.counts).tolist()
    drawn, prompts = _by_row(result.sampled_logprobs, plan.num_rows), _by_row(result.prompt_logprobs, plan.num_rows)
    pool = np.flatnonzero(plan.pooled).tolist()
    sums = dict(zip(pool, result.pooled.reshape(max(1, len(pool)), -1), strict=False))
    each = zip(
        range(first, plan.num_rows),
        plan.starts[first:].tolist(),
        (plan.starts + plan.query_lens)[first:].tolist(),
        step.drawn[first:],
        pairwise(offsets[first:]),
        result.failed[first:].tolist(),
        strict=True,
    )
    return [
        RowResult(start, end, most, tokens[at:stop], failed, drawn.get(row), prompts.get(row), sums.get(row))
        for row, start, end, most, (at, stop), failed in each
    ]


def _by_row(entries: LogprobRows, num_rows: int) -> dict[int, LogprobRows]:
    """A result's log-probs by plan row. The entries are in row order, as the tokens are."""
    if not len(entries.rows):
        return {}
    assert (np.diff(entries.rows) >= 0).all(), "log-probs are not in row order"
    bounds = np.searchsorted(entries.rows, np.arange(num_rows + 1)).tolist()
    return {row: entries.part(start, end) for row, (start, end) in enumerate(pairwise(bounds)) if start < end}
