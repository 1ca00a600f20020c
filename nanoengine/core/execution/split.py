"""A step that runs out of memory is launched again in parts, whose results make up the one result of its plan.

The cut is by token: half of them in each part, so a prefill row may end in one part and go on in the next, as chunks of
a prompt do. A part that fails too is halved again; one of a single token that fails twice ends the step. The plan's
writes travel with the first part. They may be repeated, as a failed launch repeats them, for as long as no slot has
moved: what comes behind that runs under `slots_move`, and its failure ends the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from nanoengine.api.errors import is_out_of_memory
from nanoengine.core.execution.results import join_logprobs
from nanoengine.core.step import (
    ROW_FINE,
    BlockAppends,
    LogprobRows,
    NewSlots,
    StepPlan,
    StepResult,
)

_log = logging.getLogger(__name__)


class SlotsMoved(RuntimeError):
    """Memory ran out while drawn tokens were being written to their slots: the step cannot be launched again."""


@contextmanager
def slots_move() -> Iterator[None]:
    """Around the writes that end a step. What runs out of memory here raises `SlotsMoved`."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise SlotsMoved(f"{type(error).__name__}: {error}") from error
        raise


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a plan's tokens. first_row: which of the whole plan's rows is this part's row 0."""

    plan: StepPlan
    first_row: int


class Handle(Protocol):
    def wait(self) -> StepResult: ...


def halves(part: Part) -> tuple[Part, Part]:
    """The part's tokens in two; the first half brings its writes. It must have two tokens at least."""
    plan = part.plan
    assert plan.num_tokens > 1
    ends = np.cumsum(plan.query_lens)
    middle = int(ends[-1]) // 2  # tokens in front
    rows = int(np.searchsorted(ends, middle)) + 1  # in front, the one that is cut included
    over = int(ends[rows - 1]) - middle  # tokens of that one which stay behind
    behind = rows - (over > 0)  # first row behind
    lens, starts = plan.query_lens[:rows].copy(), plan.starts[behind:].copy()
    lens[-1] -= over
    lens_behind = plan.query_lens[behind:].copy()
    if over:
        starts[0] += lens[-1]
        lens_behind[0] = over
    wanted = int(np.searchsorted(plan.logits_index, middle))
    front = replace(
        plan,
        slots=plan.slots[:rows],
        num_decode_rows=min(plan.num_decode_rows, rows),
        query_lens=lens,
        starts=plan.starts[:rows],
        logits_index=plan.logits_index[:wanted],
        logits_rows=plan.logits_rows[:wanted],
        sampled=plan.sampled[:wanted],
        prompt_logprobs=plan.prompt_logprobs[:wanted],
    )
    rest = replace(
        plan,
        new=NewSlots(),
        columns=(),
        appends=BlockAppends(),
        slots=plan.slots[behind:],
        num_decode_rows=max(plan.num_decode_rows - behind, 0),
        query_lens=lens_behind,
        starts=starts,
        logits_index=plan.logits_index[wanted:] - middle,
        logits_rows=plan.logits_rows[wanted:] - behind,
        sampled=plan.sampled[wanted:],
        prompt_logprobs=plan.prompt_logprobs[wanted:],
    )
    return Part(front, part.first_row), Part(rest, part.first_row + behind)


class SplitStep:
    """A step in flight in several parts."""

    def __init__(self, plan: StepPlan, parts: Sequence[tuple[Part, Handle]]) -> None:
        self._plan, self._parts = plan, parts

    def wait(self) -> StepResult:
        """The whole plan's result, once all parts' have arrived. Raises what the device raised."""
        return merged(self._plan, [(part, handle.wait()) for part, handle in self._parts])


def merged(plan: StepPlan, results: Sequence[tuple[Part, StepResult]]) -> StepResult:
    """Parts in the order of `plan`'s rows -> its result. A row that failed in one part gives no token in any."""
    failed = np.full(plan.num_rows, ROW_FINE, dtype=np.int32)
    for part, result in results:
        own = failed[part.first_row :][: len(result.failed)]
        np.copyto(own, result.failed, where=own == ROW_FINE)
    rows = np.concatenate([np.repeat(_rows_of(part), result.counts) for part, result in results])
    fine = failed[rows] == ROW_FINE
    return StepResult(
        step=plan.step,
        token_ids=np.concatenate([result.token_ids for _, result in results])[fine],
        counts=np.bincount(rows[fine], minlength=plan.num_rows).astype(np.int32),
        failed=failed,
        sampled_logprobs=join_logprobs([_shifted(result.sampled_logprobs, part) for part, result in results]),
        prompt_logprobs=join_logprobs([_shifted(result.prompt_logprobs, part) for part, result in results]),
        graphs=int(np.bitwise_or.reduce([result.graphs for _, result in results])),
        parts=len(results),
    )


def _rows_of(part: Part) -> Any:
    return np.arange(part.plan.num_rows) + part.first_row


def _shifted(logprobs: LogprobRows, part: Part) -> LogprobRows:
    return replace(logprobs, rows=logprobs.rows + np.int32(part.first_row))


class Splitter:
    """Launches steps, in parts where memory does not hold them whole.

    Not for a runner that shares its steps with other ranks: they would come to different parts.
    """

    def __init__(self, launch: Callable[[StepPlan], Handle], make_room: Callable[[], None]) -> None:
        """`make_room`: gives back what an allocator keeps; called after each launch that ran out of memory."""
        self._launch, self._make_room = launch, make_room
        self._said = False

    def launch(self, plan: StepPlan) -> Handle:
        """Raises what a launch raises, and what ran out of memory with a single token left."""
        whole = Part(plan, 0)
        handle = self._attempt(whole, once_more=True)
        if handle is not None:
            return handle
        done: list[tuple[Part, Handle]] = []
        todo, failed, too_many = [whole], whole, plan.num_tokens
        while todo:
            part = todo.pop()
            count = part.plan.num_tokens
            if count > 1 and count >= too_many:
                todo += reversed(halves(part))
                continue
            handle = self._attempt(part, once_more=count > 1 or part is not failed)
            if handle is None:
                failed, too_many = part, max(2, count)
                todo.append(part)
            else:
                done.append((part, handle))
        return SplitStep(plan, done)

    def _attempt(self, part: Part, *, once_more: bool) -> Handle | None:
        """None: out of memory, and there is room again."""
        try:
            return self._launch(part.plan)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not once_more:
                error.add_note("with a single token left of its step")
                raise
            self._say(part.plan, error)
        self._make_room()  # here, as the error's traceback holds the step's tensors
        return None

    def _say(self, plan: StepPlan, error: Exception) -> None:
        level = logging.DEBUG if self._said else logging.WARNING
        self._said = True
        text = "a step of %d tokens in %d rows ran out of memory and is run in parts: %s: %s"
        _log.log(level, text, plan.num_tokens, plan.num_rows, type(error).__name__, str(error))  # a record may be kept
