"""Host states of logits processors: each sample has its own. They are fed what the sample got, and asked for the
columns of its next draw while the forward pass of that step runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.messages import ScheduledStep, Update
from nanoengine.core.step import SuppliedColumn, i32, offsets_of


def supplied_columns(step: ScheduledStep, vocab_size: int) -> tuple[list[SuppliedColumn], list[Update]]:
    """The columns of a late step, all steps before which are committed; and updates of requests whose states failed,
    which the scheduler still has.

    A row whose request has ended gets none: nothing will look at what it draws.
    """
    plan, failed = step.plan, list[Update]()
    table: dict[tuple[str, str], tuple[list[int], list[npt.NDArray[Any]]]] = {}
    draws = np.flatnonzero(plan.sampled)
    of_row = np.searchsorted(plan.logits_rows[draws], np.arange(plan.num_rows + 1)).tolist()
    drafts = offsets_of(plan.drafts).tolist() if len(plan.drafts) else [0] * len(of_row)
    for row, (request, _) in enumerate(step.rows):
        own = draws[of_row[row] : of_row[row + 1]].tolist()
        if own and request.host_states and request.status is not Status.FINISHED:
            guesses = plan.draft_tokens[drafts[row] : drafts[row + 1]].tolist()
            assert len(own) == 1 + len(guesses), "drafts that the host does not know"
            try:
                columns = _next_columns(request, guesses, vocab_size)
            except RequestError as error:
                failed.append(Update(request, error=error))
                continue
            for key, values in columns:
                at, parts = table.setdefault(key, ([], []))
                at += own
                parts += values
    return [_message(*key, *found) for key, found in table.items()], failed


def _message(processor: str, column: str, draws: list[int], parts: list[npt.NDArray[Any]]) -> SuppliedColumn:
    """parts: the values of each draw."""
    values, offsets = np.concatenate(parts), offsets_of(list(map(len, parts)))
    return SuppliedColumn(processor=processor, column=column, draws=i32(draws), values=values, offsets=offsets)


def _next_columns(
    request: Request, drafts: Sequence[int], vocab_size: int
) -> list[tuple[tuple[str, str], list[npt.NDArray[Any]]]]:
    """Feeds what is new; then (processor, column) and the values of 1 + len(drafts) draws, of each column. Also notes
    in the request what is forced behind these draws."""
    out, request.forced = [], ()
    for bound in request.host_states:
        forced, columns = bound.look(request.output_token_ids, drafts, vocab_size)
        request.forced = request.forced or forced
        out += [((bound.name, column), values) for column, values in columns.items()]
    return out
