"""Host states of logits processors: each sample has its own. They are fed what the sample got, and asked for the
columns of its next draw while the forward pass of that step runs."""

from __future__ import annotations

import numpy as np

from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.messages import ScheduledStep, Update
from nanoengine.core.step import Int32, SuppliedColumn, offsets_of
from nanoengine.params.host_states import Asked, Kind, next_columns


def supplied_columns(
    step: ScheduledStep, vocab_size: int, most_forced: int, room: Int32 | None = None
) -> tuple[list[SuppliedColumn], list[Update]]:
    """The columns of a late step, all steps before which are committed; and updates of requests whose states failed,
    which the scheduler still has. most_forced: if not 0, requests note what their states force behind these draws.
    room: as in `StepHandle`.

    A row whose request has ended gets none: nothing will look at what it draws. States of one class and processor are
    fed, and give their columns, together where the class can.
    """
    out, failed = list[SuppliedColumn](), dict[Request, RequestError]()
    for (name, _), (requests, asked) in _asked(step).items():
        columns, errors = next_columns(asked, vocab_size, room)
        room = None  # it has masks now
        failed |= {requests[place]: error for place, error in errors.items()}
        for column, draws, values, offsets in columns:
            out.append(SuppliedColumn(processor=name, column=column, draws=draws, values=values, offsets=offsets))
        for request, (bound, _, _, drafts) in zip(requests, asked, strict=True) if most_forced else ():
            try:
                if request not in failed and (found := bound.forced(drafts, vocab_size)):
                    request.forced, request.pick_check_at = found, 0
            except RequestError as error:
                failed[request] = error
    return out, [Update(request, error=error) for request, error in failed.items()]


def _asked(step: ScheduledStep) -> dict[Kind, tuple[list[Request], list[Asked]]]:
    """The states that are asked, by their kind. The time that a row takes here counts: the device waits for it."""
    plan, groups = step.plan, dict[Kind, tuple[list[Request], list[Asked]]]()
    draws = np.flatnonzero(plan.sampled)
    of_row = np.searchsorted(plan.logits_rows[draws], np.arange(plan.num_rows + 1)).tolist()
    drafts, at = offsets_of(plan.drafts).tolist() if len(plan.drafts) else None, draws.tolist()
    for row, (request, _) in enumerate(step.rows):
        own = at[of_row[row] : of_row[row + 1]]
        if own and request.host_states and request.status is not Status.FINISHED:
            guesses = plan.draft_tokens[drafts[row] : drafts[row + 1]].tolist() if drafts is not None else ()
            assert len(own) == 1 + len(guesses), "drafts that the host does not know"
            request.forced = ()
            for bound in request.host_states:
                if bound.kind not in groups:
                    groups[bound.kind] = [], []
                requests, asked = groups[bound.kind]
                requests.append(request)
                asked.append((bound, request.output_token_ids, own, guesses))
    return groups
