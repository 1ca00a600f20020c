"""Host states of logits processors: each sample has its own. They are fed what the sample got, and asked for the
columns of its next draw while the forward pass of that step runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.messages import ScheduledStep, Update
from nanoengine.core.step import SuppliedColumn, i32, offsets_of
from nanoengine.params.host_states import look_ahead
from nanoengine.params.sampling_params import Draws


def supplied_columns(step: ScheduledStep, vocab_size: int) -> tuple[list[SuppliedColumn], list[Update]]:
    """The columns of a late step, all steps before which are committed; and updates of requests whose states failed,
    which the scheduler still has.

    A row whose request has ended gets none: nothing will look at what it draws. All states are fed before one is asked,
    so that those of one class can look ahead together.
    """
    plan, failed, asked = step.plan, list[Update](), list[tuple[Request, list[int], list[int]]]()
    draws = np.flatnonzero(plan.sampled)
    of_row = np.searchsorted(plan.logits_rows[draws], np.arange(plan.num_rows + 1)).tolist()
    drafts, at = offsets_of(plan.drafts).tolist() if len(plan.drafts) else [0] * len(of_row), draws.tolist()
    for row, (request, _) in enumerate(step.rows):
        own = at[of_row[row] : of_row[row + 1]]
        if own and request.host_states and request.status is not Status.FINISHED:
            guesses = plan.draft_tokens[drafts[row] : drafts[row + 1]].tolist()
            assert len(own) == 1 + len(guesses), "drafts that the host does not know"
            try:
                _feed(request)
                asked.append((request, own, guesses))
            except RequestError as error:
                failed.append(Update(request, error=error))
    ahead = look_ahead([bound for request, _, _ in asked for bound in request.host_states])
    table: dict[tuple[str, str], _Column] = {}
    for request, own, guesses in asked:
        try:
            if ahead:
                _raise_first(ahead, request)
            columns = _next_columns(request, guesses, vocab_size)
        except RequestError as error:
            failed.append(Update(request, error=error))
            continue
        for key, values in columns:
            if key not in table:
                table[key] = _Column(len(draws))
            table[key].add(own, values)
    return [column.message(*key) for key, column in table.items()], failed


class _Column:
    """The values that a step's states give for one column."""

    def __init__(self, most: int) -> None:
        """most: draws of the step."""
        self._most, self._draws, self._parts = most, list[int](), list[npt.NDArray[Any]]()
        self._rows: npt.NDArray[Any] | None = None  # [most, width]; None: ragged values, which are in parts

    def add(self, draws: list[int], values: Draws) -> None:
        """Copies them: a state may change its own arrays with the next call."""
        first = len(self._draws)
        self._draws += draws
        if isinstance(values, list):
            self._parts += values
            return
        if self._rows is None:
            self._rows = np.empty((self._most, values.shape[1]), values.dtype)
        self._rows[first : len(self._draws)] = values

    def message(self, processor: str, column: str) -> SuppliedColumn:
        draws, count = i32(self._draws), len(self._draws)
        if self._rows is None:
            values, offsets = np.concatenate(self._parts), offsets_of(list(map(len, self._parts)))
        else:
            width = self._rows.shape[1]
            values, offsets = self._rows[:count].ravel(), i32(range(0, width * count + 1, width))
        return SuppliedColumn(processor=processor, column=column, draws=draws, values=values, offsets=offsets)


def _feed(request: Request) -> None:
    for bound in request.host_states:
        bound.feed(request.output_token_ids)


def _raise_first(errors: Mapping[int, RequestError], request: Request) -> None:
    for bound in request.host_states:
        if id(bound) in errors:
            raise errors[id(bound)]


def _next_columns(request: Request, drafts: Sequence[int], vocab_size: int) -> list[tuple[tuple[str, str], Draws]]:
    """(processor, column) and the values of 1 + len(drafts) draws, of each column. Also notes in the request what is
    forced behind these draws."""
    out, request.forced = [], ()
    for bound in request.host_states:
        forced, columns = bound.look(drafts, vocab_size)
        request.forced = request.forced or forced
        out += [((bound.name, column), values) for column, values in columns.items()]
    return out
