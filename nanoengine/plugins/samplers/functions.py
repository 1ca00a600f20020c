"""logits_processors, batch_logits_processor: functions that change logits. Each step with one waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction
from typing import Any

from torch import Tensor

from nanoengine.api import LogitsProcessor, ParamsError, Phase, ProcessorRows
from nanoengine.api.plugin_calls import plugin_step
from nanoengine.plugins.samplers.function_state import FunctionState, name_of, running


class Functions(LogitsProcessor):
    phase = Phase.BIAS

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        batches: dict[int, tuple[Callable[..., Any], list[tuple[int, FunctionState, int]]]] = {}
        numbers, drafts = rows.column("state").tolist(), rows.column("drafts").tolist()
        for row, (number, behind) in enumerate(zip(numbers, drafts, strict=True)):
            if not number:
                continue
            state = running().states[number]
            if state.failure is not None:  # it is retried alone, and the form of one row may be right
                raise state.failure
            for function, takes_prompt in state.functions:
                given = (state.prompt, state.output(behind)) if takes_prompt else (state.output(behind),)
                logits[row] = _called(function, *given, logits=logits[row])
            if state.batched is not None:
                batches.setdefault(id(state.batched), (state.batched, []))[1].append((row, state, behind))
        for function, members in batches.values():
            own = [row for row, _, _ in members]
            prompts = [state.prompt for _, state, _ in members]
            outputs = [state.output(behind) for _, state, behind in members]
            try:
                logits[own] = _called(function, prompts, outputs, logits=logits[own])
            except ParamsError as error:  # a wrong form; what it raises may be about one of the requests
                for _, state, _ in members:
                    state.failure = error
                raise
        return logits


def _called(function: Callable[..., Any], *ids: Any, logits: Tensor) -> Tensor:
    shape, name = logits.shape, name_of(function)  # it may change the tensor itself
    with plugin_step(f"{name}()", function if isfunction(function) else type(function)):
        found = function(*ids, logits)
    if isinstance(found, Tensor) and found.shape == shape and found.is_floating_point():
        return found.to(logits)
    got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise ParamsError(f"{name}() must return logits, floats of shape {tuple(shape)}, not {got}")
