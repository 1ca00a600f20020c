"""What an engine does at the start when memory is too small: it tries again with smaller batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from nanoengine.api.errors import DeviceMemoryError, is_out_of_memory
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.start.capture import CaptureOutOfMemory

T = TypeVar("T")
_log = logging.getLogger(__name__)

LEAST_BATCHED_TOKENS = 256  # the budget is not halved below this, because smaller steps save almost no memory


class StepTooLarge(DeviceMemoryError):
    """The largest step leaves no memory for the KV cache, but a smaller one would."""


def smaller_batch(options: EngineOptions, error: BaseException) -> EngineOptions | None:
    """The options for the next attempt after the out-of-memory `error`; None if nothing can be reduced any more.

    First half the tokens of a step, down to `LEAST_BATCHED_TOKENS`; then no graphs, if only the graphs did not fit;
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
    """The result of `attempt` with `options`, or with smaller batches if memory is too small, which is logged.

    `undo` is called after each attempt that ran out of memory. Raises `DeviceMemoryError` if nothing can be reduced any
    more, and other errors of an attempt.
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
                _log.warning("memory is too small for %s: running with %s (%s)", _batch(options), _batch(now), cause)
            return made
        undo()  # not in the except clause, where the error's traceback keeps what was made
        now = smaller


def _batch(options: EngineOptions) -> str:
    graphs = ", no graphs" if options.enforce_eager else ""
    return f"max_num_batched_tokens={options.max_num_batched_tokens}, max_num_seqs={options.max_num_seqs}{graphs}"


def _nothing_fits(options: EngineOptions, error: Exception) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"even with {_batch(options)} memory is too small in addition to the weights on {options.device}; lower "
        f"engine.max_model_len, free memory there, or take a larger device ({type(error).__name__}: {error})"
    )
