"""Host states of logits processors: each sample has its own. They are fed what the sample got, and asked for the
columns of its next draw while the forward pass of that step runs.

A state is a plugin's: whatever goes wrong in it fails its request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from nanoengine.api.errors import RequestError, described, is_failure, nearest, shown
from nanoengine.api.plugin_calls import place_and_fix
from nanoengine.api.specs import HostState, ParamsContext
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.messages import ScheduledStep
from nanoengine.core.step import SuppliedColumn, i32, offsets_of
from nanoengine.params.sampling_params import PackedProcessor, pack_draws


@dataclass(slots=True)
class BoundState:
    """The state that a processor has of one sample. fed: output tokens that it got."""

    processor: PackedProcessor
    state: HostState
    fed: int = 0


def start_states(request: Request, ctx: ParamsContext) -> None:
    """Makes the states of a new request. Raises `RequestError("processor_failed")`."""
    for processor in request.params.processors:
        try:
            state = processor.params.start(request.prompt_token_ids, ctx)
            if not isinstance(state, HostState | None):
                raise TypeError(f"returned {type(state).__qualname__}, not a HostState")
        except BaseException as error:  # noqa: BLE001 - it is raised
            raise _failure(error, processor, "start")  # noqa: B904 - its cause is set
        if state is not None:
            state.stop_ids = request.params.stop_token_ids
            request.host_states.append(BoundState(processor, state))


def supplied_columns(
    step: ScheduledStep, vocab_size: int
) -> tuple[list[SuppliedColumn], list[tuple[Request, RequestError]]]:
    """The columns of a late step, all steps before which are committed; and the requests whose states failed.

    A row whose request has ended gets none: nothing will look at what it draws.
    """
    plan, failed = step.plan, list[tuple[Request, RequestError]]()
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
                failed.append((request, error))
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
        name, specs, method = bound.processor.name, bound.processor.params.columns, "feed"
        try:
            if new := request.output_token_ids[bound.fed :]:
                bound.state.feed(new)
                bound.fed += len(new)
            method = "forced"
            forced = [index(token) for token in bound.state.forced()]
            if not all(0 <= token < vocab_size for token in forced):
                raise ValueError(f"returned {shown(forced)}; ids are 0 to {vocab_size - 1}")
            request.forced = request.forced or forced[1 + len(drafts) :]
            method = "columns"
            for column, values in bound.state.columns(drafts).items():
                if column not in specs:
                    raise KeyError(f"no column {column!r}: {nearest(column, specs)}")
                packed = pack_draws(name, column, specs[column], values, 1 + len(drafts), vocab_size)
                out.append(((name, column), packed))
        except BaseException as error:  # noqa: BLE001 - it is raised
            raise _failure(error, bound.processor, method)  # noqa: B904 - its cause is set
    return out


def _failure(error: BaseException, processor: PackedProcessor, method: str) -> BaseException:
    """What this method raised, as the error of its request. An error of a request, and what is no failure, stays."""
    if isinstance(error, RequestError) or not is_failure(error):
        return error
    text = f"{method}() of logits processor {processor.name!r} raised {described(error)}"
    failure = RequestError("processor_failed", text + place_and_fix(error, type(processor.params), text))
    failure.__cause__ = error
    return failure
