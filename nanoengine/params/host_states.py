"""The host state of a sample as the engine calls it: values are checked, and errors name the processor.

A state is a plugin's: whatever goes wrong in it is a `RequestError("processor_failed")`, which ends its request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy.typing as npt

from nanoengine.api.errors import RequestError, described, is_failure, nearest, shown
from nanoengine.api.plugin_calls import place_and_fix
from nanoengine.api.specs import HostState, ParamsContext
from nanoengine.params.sampling_params import PackedProcessor, ResolvedParams, pack_draws


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

    def look(
        self, output_token_ids: Sequence[int], drafts: Sequence[int], vocab_size: int
    ) -> tuple[list[int], dict[str, list[npt.NDArray[Any]]]]:
        """Feeds what is new of the output. Returns what is forced behind the draws that count (up to the one behind
        the right drafts), and of each column the values of 1 + len(drafts) draws."""
        specs, method = self.processor.params.columns, "feed"
        columns: dict[str, list[npt.NDArray[Any]]] = {}
        try:
            if new := output_token_ids[self.fed :]:
                self.state.feed(new)
                self.fed += len(new)
            method = "forced"
            forced = [index(token) for token in self.state.forced()]
            if not all(0 <= token < vocab_size for token in forced):
                raise ValueError(f"returned {shown(forced)}; ids are 0 to {vocab_size - 1}")
            method = "columns"
            for name, values in self.state.columns(drafts).items():
                if name not in specs:
                    raise KeyError(f"no column {name!r}: {nearest(name, specs)}")
                columns[name] = pack_draws(self.name, name, specs[name], values, 1 + len(drafts), vocab_size)
        except BaseException as error:  # noqa: BLE001 - it is raised
            raise _failure(error, self.processor, method)  # noqa: B904 - its cause is set
        right = next((i for i, pair in enumerate(zip(forced, drafts, strict=False)) if pair[0] != pair[1]), len(drafts))
        return forced[1 + right :], columns


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
