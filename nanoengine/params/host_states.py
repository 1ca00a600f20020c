"""The host state of a sample as the engine calls it: values are checked, and errors name the processor.

A state is a plugin's: whatever goes wrong in it is a `RequestError("processor_failed")`, which ends its request alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nanoengine.api.errors import RequestError, described, is_failure, nearest, shown
from nanoengine.api.plugin_calls import place_and_fix
from nanoengine.api.specs import HostState, ParamsContext, StandardOp
from nanoengine.params.sampling_params import (
    Draws,
    PackedProcessor,
    ResolvedParams,
    pack_draws,
    values_of_draw,
)

Kind = tuple[str, type[HostState]]


@dataclass(slots=True)
class BoundState:
    """The state that a processor has of one sample. fed: output tokens that it got. kind: states of one may be asked
    together."""

    processor: PackedProcessor
    state: HostState
    fed: int = 0
    kind: Kind = field(init=False)

    def __post_init__(self) -> None:
        self.kind = self.name, type(self.state)

    @property
    def name(self) -> str:
        """Of the processor."""
        return self.processor.name

    def feed(self, output_token_ids: Sequence[int]) -> None:
        """Feeds what is new of the output."""
        if new := output_token_ids[self.fed :]:
            try:
                self.state.feed(new)
            except BaseException as error:  # noqa: BLE001 - it is raised
                raise _failure(error, self.processor, "feed")  # noqa: B904 - its cause is set
            self.fed += len(new)

    def columns(self, drafts: Sequence[int], vocab_size: int) -> dict[str, Draws]:
        """Of each column the values of 1 + len(drafts) draws."""
        specs, count, columns = self.processor.params.columns, 1 + len(drafts), dict[str, Draws]()
        try:
            for name, values in self.state.columns(drafts).items():
                if name not in specs:
                    raise KeyError(f"no column {name!r}: {nearest(name, specs)}")
                columns[name] = pack_draws(self.name, name, specs[name], values, count, vocab_size)
        except BaseException as error:  # noqa: BLE001 - it is raised
            raise _failure(error, self.processor, "columns")  # noqa: B904 - its cause is set
        return columns

    def forced(self, drafts: Sequence[int], vocab_size: int) -> Sequence[int]:
        """What is forced behind the draws that count, up to the one behind the right drafts."""
        try:
            forced = [index(token) for token in self.state.forced()]
            if forced and not all(0 <= token < vocab_size for token in forced):
                raise ValueError(f"returned {shown(forced)}; ids are 0 to {vocab_size - 1}")
        except BaseException as error:  # noqa: BLE001 - it is raised
            raise _failure(error, self.processor, "forced")  # noqa: B904 - its cause is set
        if not forced:
            return forced
        right = next((i for i, pair in enumerate(zip(forced, drafts, strict=False)) if pair[0] != pair[1]), len(drafts))
        return forced[1 + right :]


Asked = tuple[BoundState, Sequence[int], Sequence[int], Sequence[int]]
"""A state that is asked for columns; the output tokens of its sample; numbers of the draws, all but the first of which
are behind drafts; and these drafts."""


class DrawValues(NamedTuple):
    """Values of one column for some draws, int32 [N]: flat, those of draw i at offsets[i] to offsets[i + 1]."""

    column: str
    draws: npt.NDArray[np.int32]
    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int32]


def next_columns(
    asked: Sequence[Asked], vocab_size: int, room: npt.NDArray[np.int32] | None = None
) -> tuple[list[DrawValues], dict[int, RequestError]]:
    """Feeds states of one processor and class what is new, and takes their columns: of draws that are behind no draft
    together, where the class can. Also place -> error of those that failed.

    room: [L, words]; masks of the first draws may be written to its first rows, instead of to new memory."""
    found, failed = _together(asked, vocab_size, room)
    alone: dict[str, tuple[list[int], list[npt.NDArray[Any]]]] = {}
    for place, (bound, output, draws, drafts) in enumerate(asked):
        if (found is not None and not drafts) or place in failed:
            continue
        try:
            bound.feed(output)
            for column, values in bound.columns(drafts, vocab_size).items():
                numbers, parts = alone.setdefault(column, ([], []))
                numbers += draws
                parts += [np.array(each).ravel() for each in values]  # a state may change its own with the next call
        except RequestError as error:
            failed[place] = error
    out = list[DrawValues]()
    if found is not None and (plain := [i for i, each in enumerate(asked) if not each[3] and i not in failed]):
        first = np.array([asked[i][2][0] for i in plain], np.int32)
        for column, every in found.items():
            own = every if len(plain) == len(asked) else every[plain]
            offsets = np.arange(0, own.size + 1, own.size // len(plain), dtype=np.int32)
            out.append(DrawValues(column, first, own.ravel(), offsets))
    for column, (numbers, parts) in alone.items():
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
        out.append(DrawValues(column, np.array(numbers, np.int32), np.concatenate(parts), offsets))
    return out, failed


def _together(
    asked: Sequence[Asked], vocab_size: int, room: npt.NDArray[np.int32] | None
) -> tuple[Mapping[str, npt.NDArray[Any]] | None, dict[int, RequestError]]:
    """By one call of the class: of each column an array, [N] or [N, width], and place -> error. None: it has no way to
    do so, and nothing was done."""
    processor, states = asked[0][0].processor, type(asked[0][0].state)
    specs = processor.params.columns
    if any(spec.ragged for spec in specs.values()):
        return None, {}
    new = [output[bound.fed :] for bound, output, _, _ in asked]
    if room is not None and [draws[0] for _, _, draws, _ in asked] != list(range(min(len(asked), len(room)))):
        room = None
    out = dict[str, npt.NDArray[Any]]()
    for name, spec in specs.items():
        if room is not None and spec.op is StandardOp.BITMASK:
            out[name], room = room[: len(asked)], None
        else:
            out[name] = np.empty((len(asked), *values_of_draw(spec, vocab_size)), spec.dtype)
    try:
        found = states.columns_together([each[0].state for each in asked], new, out)
        if found is None:
            return None, {}
        failed = {i: _failure(error, processor, "columns_together") for i, error in found.items()}
        for name, spec in specs.items():
            pack_draws(processor.name, name, spec, out[name], len(asked), vocab_size)
    except BaseException as error:  # noqa: BLE001 - it is raised, or each request has it
        failed = {i: _failure(error, each[0].processor, "columns_together") for i, each in enumerate(asked)}
    for bound, output, _, _ in asked:
        bound.fed = len(output)
    return out, {i: _of_request(failure) for i, failure in failed.items()}


def _of_request(failure: BaseException) -> RequestError:
    """What is not an error of a request is raised."""
    if not isinstance(failure, RequestError):
        raise failure
    return failure


def start_states(params: ResolvedParams, prompt_token_ids: Sequence[int], ctx: ParamsContext) -> list[BoundState]:
    """The states that the processors have of a new sample."""
    out = []
    for processor in params.processors:
        try:
            state = processor.params.start(prompt_token_ids, ctx)
            if not isinstance(state, HostState | None):
                raise TypeError(f"returned {type(state).__qualname__}, not a HostState")
        except BaseException as error:  # noqa: BLE001 - it is raised
            raise _failure(error, processor, "start")  # noqa: B904 - its cause is set
        if state is not None:
            state.stop_ids = params.stop_token_ids
            out.append(BoundState(processor, state))
    return out


def _failure(error: BaseException, processor: PackedProcessor, method: str) -> BaseException:
    """What this method raised, as the error of its request. An error of a request, and what is no failure, stays."""
    if isinstance(error, RequestError) or not is_failure(error):
        return error
    text = f"{method}() of logits processor {processor.name!r} raised {described(error)}"
    failure = RequestError("processor_failed", text + place_and_fix(error, type(processor.params), text))
    failure.__cause__ = error
    return failure
