"""Host states of logits processors: each sample has its own. They are fed what the sample got, and asked for the
columns of its next draw while the forward pass of that step runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.messages import ScheduledStep, Update
from nanoengine.core.step import Int32, SuppliedColumn, i32, offsets_of
from nanoengine.params.host_states import Asked, BoundState, Kind, next_columns

Groups = dict[Kind, tuple[list[Request], Asked]]


@dataclass(slots=True)
class LastAsked:
    """The rows of the last late step, and the states that it asked: most often the next step has the same."""

    rows: tuple[tuple[Request, int], ...] = ()
    groups: Groups = field(default_factory=dict)


def supplied_columns(
    step: ScheduledStep, vocab_size: int, most_forced: int, room: Int32 | None = None, last: LastAsked | None = None
) -> tuple[list[SuppliedColumn], list[Update]]:
    """The columns of a late step, all steps before which are committed; and updates of requests whose states failed,
    which the scheduler still has. most_forced: if not 0, requests note what their states force behind these draws.
    room: as in `StepHandle`. last: the engine's, which is written, too.

    A row whose request has ended gets none: nothing will look at what it draws. States of one class and processor are
    fed, and give their columns, together where the class can.
    """
    out, failed, groups = list[SuppliedColumn](), dict[Request, RequestError](), _asked(step, last or LastAsked())
    for request in chain.from_iterable(requests for requests, _ in groups.values()) if most_forced else ():
        request.forced = ()
    for (name, _), (requests, asked) in groups.items():
        columns, errors = next_columns(asked, vocab_size, room)
        room = None  # it has masks now
        failed |= {requests[place]: error for place, error in errors.items()}
        for column, draws, values, offsets in columns:
            out.append(SuppliedColumn(processor=name, column=column, draws=draws, values=values, offsets=offsets))
        for place, request in enumerate(requests) if most_forced else ():
            try:
                if request not in failed and (found := asked.forced(place, vocab_size)):
                    request.forced, request.pick_check_at = found, 0
            except RequestError as error:
                failed[request] = error
    return out, [Update(request, error=error) for request, error in failed.items()]


def _asked(step: ScheduledStep, last: LastAsked) -> Groups:
    """The states that are asked, by their kind. The time that a row takes here counts: the device waits for it."""
    rows, plain = step.rows, step.plan.num_decode_rows == len(step.rows) and not len(step.plan.drafts)
    if not (plain and rows == last.rows and all(each.status is not Status.FINISHED for each, _ in rows)):
        last.rows, last.groups = rows if plain else (), _grouped(step)
    return last.groups


def _grouped(step: ScheduledStep) -> Groups:
    plan, found = step.plan, dict[Kind, tuple[list[Request], list[BoundState], list[int], dict[int, list[int]]]]()
    rows, draws, offsets = plan.logits_rows[plan.sampled], np.flatnonzero(plan.sampled), list[int]()
    if len(plan.drafts):
        first = np.flatnonzero(np.diff(rows, prepend=-1))  # draws behind drafts follow the first one of their row
        rows, draws, offsets = rows[first], draws[first], offsets_of(plan.drafts).tolist()
    for row, draw in zip(rows.tolist(), draws.tolist(), strict=True):
        request = step.rows[row][0]
        for bound in request.host_states if request.status is not Status.FINISHED else ():
            requests, bounds, numbers, drafts = found.setdefault(bound.kind, ([], [], [], {}))
            if offsets and offsets[row] < offsets[row + 1]:
                drafts[len(requests)] = plan.draft_tokens[offsets[row] : offsets[row + 1]].tolist()
            requests.append(request)
            bounds.append(bound)
            numbers.append(draw)
    return {
        kind: (requests, Asked(bounds, [request.output_token_ids for request in requests], i32(numbers), drafts))
        for kind, (requests, bounds, numbers, drafts) in found.items()
    }
