"""Parameters and host state of the processor that calls Python functions. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from nanoengine.api import ColumnSpec, HostState, ParamsContext, ParamsError, ProcessorParams


@dataclass(frozen=True)
class FunctionParams(ProcessorParams):
    """logits_processors: functions of a request, called one after the other for each of its tokens:
    f(output_ids, logits) or f(prompt_ids, output_ids, logits), lists of ids and float32 [V], to logits of that form.
    batch_logits_processor: one function for all requests that have it, called once a step: f(prompts, outputs, logits),
    lists of lists of ids and float32 [R, V], to logits of that form."""

    columns: ClassVar[Mapping[str, ColumnSpec]] = {
        "state": ColumnSpec(dtype="int32"),  # number of the row's `FunctionState`; 0: none
        "drafts": ColumnSpec(dtype="int32"),  # how many of its drafts come before the draw
    }

    logits_processors: list[Callable] | None = None  # type: ignore[type-arg]
    batch_logits_processor: Callable | None = None  # type: ignore[type-arg]

    def pack(self, ctx: ParamsContext) -> Mapping[str, Any]:
        if not ctx.in_process:
            raise ParamsError(
                "logits_processors and batch_logits_processor are functions of this process, and with several ranks "
                "the logits are in others: use tensor_parallel_size=1, or write a plugin (docs/plugin-api.md)"
            )
        return {"state": 0, "drafts": 0}

    def start(self, prompt_token_ids: Sequence[int], ctx: ParamsContext) -> FunctionState:
        return FunctionState(self, list(prompt_token_ids))


class FunctionState(HostState):
    """The tokens of a sample, and the functions that it wants. failure: `batched` gave a wrong form."""

    def __init__(self, params: FunctionParams, prompt: list[int]) -> None:
        self.functions = [(each, _takes_prompt(each)) for each in params.logits_processors or ()]
        self.batched = params.batch_logits_processor
        self.failure: ParamsError | None = None
        self.prompt, self._output, self._drafts = prompt, list[int](), list[int]()
        self.number = running().add(self)

    def feed(self, token_ids: Sequence[int]) -> None:
        self._output += token_ids

    def columns(self, drafts: Sequence[int]) -> Mapping[str, Any]:
        self._drafts = list(drafts)  # of the step whose columns these are
        return {"state": [self.number] * (1 + len(drafts)), "drafts": range(1 + len(drafts))}

    def output(self, drafts: int) -> list[int]:
        """Generated ids, with so many drafts."""
        return [*self._output, *self._drafts[:drafts]]


def name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _takes_prompt(function: Callable[..., Any]) -> bool:
    """Whether it needs three arguments. One without a signature (a builtin) takes two, and so does one whose third
    argument has a default, which is the function's own."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False
    return not _takes(signature, 2) and _takes(signature, 3)


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


class Running:
    """The states of this process by number: a column cannot hold a function. A state is kept by its request alone."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self.states: WeakValueDictionary[int, FunctionState] = WeakValueDictionary()

    def add(self, state: FunctionState) -> int:
        number = next(self._numbers)
        self.states[number] = state
        return number


@cache
def running() -> Running:
    return Running()
