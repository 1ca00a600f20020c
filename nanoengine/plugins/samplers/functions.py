"""logits_processors, batch_logits_processor: functions that change logits. Each step with one waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nanoengine.api import LogitsProcessor, ParamsError, Phase, ProcessorRows
from nanoengine.plugins.samplers.function_state import FunctionState, running


class Functions(LogitsProcessor):
    phase = Phase.BIAS

    def apply(self, logits: Tensor, rows: ProcessorRows) -> Tensor:
        batches: dict[int, tuple[Callable[..., Any], list[tuple[int, FunctionState, int]]]] = {}
        numbers, drafts = rows.column("state").tolist(), rows.column("drafts").tolist()
        for row, (number, behind) in enumerate(zip(numbers, drafts, strict=True)):
            if not number:
                continue
            state = running().states[number]
            for function, takes_prompt in state.functions:
                given = (state.prompt, state.output(behind)) if takes_prompt else (state.output(behind),)
                logits[row] = _checked(function, function(*given, logits[row]), logits[row])
            if state.batched is not None:
                batches.setdefault(id(state.batched), (state.batched, []))[1].append((row, state, behind))
        for function, members in batches.values():
            own = [row for row, _, _ in members]
            prompts = [state.prompt for _, state, _ in members]
            outputs = [state.output(behind) for _, state, behind in members]
            logits[own] = _checked(function, function(prompts, outputs, logits[own]), logits[own])
        return logits


def _checked(function: Callable[..., Any], found: Any, given: Tensor) -> Tensor:
    if isinstance(found, Tensor) and found.shape == given.shape:
        return found.to(given)
    got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    name = getattr(function, "__qualname__", type(function).__qualname__)
    raise ParamsError(f"{name}() must return logits of shape {tuple(given.shape)}, not {got}")
