"""When memory does not suffice: whose error says so, and what is asked for instead."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from nanoengine.api.errors import DeviceMemoryError, is_out_of_memory
from nanoengine.core.execution.graphs import CaptureOutOfMemory
from nanoengine.params.engine_options import EngineOptions

T = TypeVar("T")
_log = logging.getLogger(__name__)

LEAST_BATCHED_TOKENS = 256  # a budget is not halved below it: smaller steps save hardly any memory


class StepTooLarge(DeviceMemoryError):
    """The largest step leaves no room for the KV cache; a smaller one would."""


def smaller_batch(options: EngineOptions, error: BaseException) -> EngineOptions | None:
    """What to start with after `error`, which is out of memory; None where there is nothing left to lower.

    First half the tokens of a step, down to `LEAST_BATCHED_TOKENS`; then no graphs, if it was they that did not fit;
    then half the requests.
    """
    tokens = options.max_num_batched_tokens
    assert tokens is not None
    if tokens > LEAST_BATCHED_TOKENS:
        return replace(options, max_num_batched_tokens=max(LEAST_BATCHED_TOKENS, tokens // 2))
    if isinstance(error, CaptureOutOfMemory):
        return replace(options, enforce_eager=True)
    if options.max_num_seqs > 1:
        return replace(options, max_num_seqs=options.max_num_seqs // 2)
    return None


def with_less(options: EngineOptions, attempt: Callable[[EngineOptions], T], undo: Callable[[], None]) -> T:
    """What `attempt` makes with `options`, or with smaller batches while memory does not suffice, which is said.

    `undo` is called after each attempt that failed so. Raises `DeviceMemoryError` when nothing is left to lower, and
    whatever else an attempt raises.
    """
    now, cause = options, ""
    while True:
        try:
            made = attempt(now)
        except Exception as error:
            if not (is_out_of_memory(error) or isinstance(error, StepTooLarge)):
                raise
            smaller = smaller_batch(now, error)
            if smaller is None and isinstance(error, StepTooLarge):
                raise
            if smaller is None:
                raise _nothing_fits(now, error) from error
            cause = f"{type(error).__name__}: {error}"
        else:
            if cause:
                _log.warning("memory does not hold %s: running with %s (%s)", _batch(options), _batch(now), cause)
            return made
        undo()  # here, as the error's traceback holds what was made
        now = smaller


def _batch(options: EngineOptions) -> str:
    graphs = ", no graphs" if options.enforce_eager else ""
    return f"max_num_batched_tokens={options.max_num_batched_tokens}, max_num_seqs={options.max_num_seqs}{graphs}"


def _nothing_fits(options: EngineOptions, error: Exception) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"even with {_batch(options)} memory does not suffice beside the weights on {options.device}; lower "
        f"engine.max_model_len, free memory there, or take a larger device ({type(error).__name__}: {error})"
    )
