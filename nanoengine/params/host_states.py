"""The host state of a sample as the engine calls it: values are checked, and errors name the processor.

A state is a plugin's: whatever goes wrong in it is a `RequestError("processor_failed")`, which ends its request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

from nanoengine.api.errors import RequestError, described, is_failure, nearest, shown
from nanoengine.api.plugin_calls import place_and_fix
from nanoengine.api.specs import HostState, ParamsContext
from nanoengine.params.sampling_params import Draws, PackedProcessor, ResolvedParams, pack_draws


@dataclass(slots=True)
class BoundState:
    """The state that a processor has of one sample. fed: output tokens that it got."""

    processor: PackedProcessor
    state: HostState
    fed: int = 0

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

    def look(self, drafts: Sequence[int], vocab_size: int) -> tuple[Sequence[int], dict[str, Draws]]:
        """What is forced behind the draws that count (up to the one behind the right drafts), and of each column the
        values of 1 + len(drafts) draws."""
        specs, method, count = self.processor.params.columns, "forced", 1 + len(drafts)
        columns: dict[str, Draws] = {}
        try:
            forced = [index(token) for token in self.state.forced()]
            if forced and not all(0 <= token < vocab_size for token in forced):
                raise ValueError(f"returned {shown(forced)}; ids are 0 to {vocab_size - 1}")
            method = "columns"
            for name, values in self.state.columns(drafts).items():
                if name not in specs:
                    raise KeyError(f"no column {name!r}: {nearest(name, specs)}")
                columns[name] = pack_draws(self.name, name, specs[name], values, count, vocab_size)
        except BaseException as error:  # noqa: BLE001 - it is raised
            raise _failure(error, self.processor, method)  # noqa: B904 - its cause is set
        if not forced:
            return forced, columns
        right = next((i for i, pair in enumerate(zip(forced, drafts, strict=False)) if pair[0] != pair[1]), len(drafts))
        return forced[1 + right :], columns


def look_ahead(bounds: Sequence[BoundState]) -> dict[int, RequestError]:
    """Lets the states of each class compute together what they are asked for next. Returns id(bound) -> error of those
    whose class failed at it."""
    errors, classes = dict[int, RequestError](), dict[type[HostState], list[BoundState]]()
    for bound in bounds:
        classes.setdefault(type(bound.state), []).append(bound)
    for of_class, members in classes.items():
        try:
            of_class.look_ahead([bound.state for bound in members])
        except BaseException as error:
            for bound in members:
                failure = _failure(error, bound.processor, "look_ahead")
                if not isinstance(failure, RequestError):
                    raise
                errors[id(bound)] = failure
    return errors


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
