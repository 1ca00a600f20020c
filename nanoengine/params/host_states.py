"""The host state of a sample as the engine calls it: values are checked, and errors name the processor.

A state is a plugin's: whatever goes wrong in it is a `RequestError("processor_failed")`, which ends its request alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import index
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nanoengine.api.errors import RequestError, described, is_failure, nearest, shown
from nanoengine.api.plugin_calls import place_and_fix
from nanoengine.api.processor_params import HostState, ParamsContext, StandardOp
from nanoengine.params.columns import Draws, pack_draws, values_of_draw
from nanoengine.params.resolver import PackedProcessor, ResolvedParams

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


@dataclass(frozen=True)
class Asked:
    """States of one processor and class that are asked for columns.

    Attributes:
        outputs: of each state the output tokens of its sample. draws: int32, the number of its first draw. drafts:
            place of a state -> tokens behind each of which it has another draw, numbered on from its first one.
    """

    bounds: Sequence[BoundState]
    outputs: Sequence[Sequence[int]]
    draws: npt.NDArray[np.int32]
    drafts: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @cached_property
    def states(self) -> list[HostState]:
        return [bound.state for bound in self.bounds]

    @cached_property
    def in_order(self) -> bool:
        """Whether draw i is of state i."""
        return bool((self.draws == np.arange(len(self.draws))).all())

    def forced(self, place: int, vocab_size: int) -> Sequence[int]:
        """As in `BoundState`."""
        return self.bounds[place].forced(self.drafts.get(place, ()), vocab_size)


class DrawValues(NamedTuple):
    """Values of one column for some draws, int32 [N]: flat, those of draw i at offsets[i] to offsets[i + 1]."""

    column: str
    draws: npt.NDArray[np.int32]
    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int32]


def next_columns(
    asked: Asked, vocab_size: int, room: npt.NDArray[np.int32] | None = None
) -> tuple[list[DrawValues], dict[int, RequestError]]:
    """Feeds the states what is new, and takes their columns: of draws that are behind no draft together, where the
    class can. Also place -> error of those that failed.

    room: [L, words]; masks of the first draws may be written to its first rows, instead of to new memory."""
    found, failed = _together(asked, vocab_size, room)
    out = list[DrawValues]()
    every, apart, places = not failed and not asked.drafts, {*failed, *asked.drafts}, range(len(asked.bounds))
    plain = places if every else [i for i in places if i not in apart]
    if found is not None and plain:
        draws = asked.draws if every else asked.draws[plain]
        for column, values in found.items():
            own = values if every else values[plain]
            offsets = np.arange(0, own.size + 1, own.size // len(plain), dtype=np.int32)
            out.append(DrawValues(column, draws, own.ravel(), offsets))
    return out + _alone(asked, vocab_size, places if found is None else asked.drafts, failed), failed


def _alone(asked: Asked, vocab_size: int, places: Iterable[int], failed: dict[int, RequestError]) -> list[DrawValues]:
    """Of the states at these places, one by one. Those that fail are added to `failed`."""
    columns: dict[str, tuple[list[int], list[npt.NDArray[Any]]]] = {}
    for place in places:
        if place in failed:
            continue
        drafts, first = asked.drafts.get(place, ()), int(asked.draws[place])
        try:
            asked.bounds[place].feed(asked.outputs[place])
            for column, values in asked.bounds[place].columns(drafts, vocab_size).items():
                numbers, parts = columns.setdefault(column, ([], []))
                numbers += range(first, first + 1 + len(drafts))
                parts += [np.array(each).ravel() for each in values]  # a state may change its own with the next call
        except RequestError as error:
            failed[place] = error
    return [
        DrawValues(
            column, np.array(numbers, np.int32), np.concatenate(parts), np.cumsum([0, *map(len, parts)], dtype=np.int32)
        )
        for column, (numbers, parts) in columns.items()
    ]


def _together(
    asked: Asked, vocab_size: int, room: npt.NDArray[np.int32] | None
) -> tuple[Mapping[str, npt.NDArray[Any]] | None, dict[int, RequestError]]:
    """By one call of the class: of each column an array, [N] or [N, width], and place -> error. None: it has no way to
    do so, and nothing was done."""
    bounds, outputs, count = asked.bounds, asked.outputs, len(asked.bounds)
    processor, states = bounds[0].processor, type(bounds[0].state)
    specs = processor.params.columns
    if any(spec.ragged for spec in specs.values()):
        return None, {}
    room = room if room is not None and asked.in_order and count <= len(room) else None
    out = dict[str, npt.NDArray[Any]]()
    for name, spec in specs.items():
        if room is not None and spec.op is StandardOp.BITMASK:
            out[name], room = room[:count], None
        else:
            out[name] = np.empty((count, *values_of_draw(spec, vocab_size)), spec.dtype)
    new = [output[bound.fed :] for bound, output in zip(bounds, outputs, strict=True)]
    try:
        found = states.columns_together(asked.states, new, out)
        if found is None:
            return None, {}
        failed = {i: _failure(error, processor, "columns_together") for i, error in found.items()}
        for name, spec in specs.items():
            pack_draws(processor.name, name, spec, out[name], count, vocab_size)
    except BaseException as error:  # noqa: BLE001 - it is raised, or each request has it
        failed = {i: _failure(error, bound.processor, "columns_together") for i, bound in enumerate(bounds)}
    for bound, tokens in zip(bounds, new, strict=True):
        bound.fed += len(tokens)
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
