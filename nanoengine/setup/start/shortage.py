"""When memory does not suffice: whose error says so, and what is asked for instead."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from nanoengine.api.errors import DeviceMemoryError, text_of
from nanoengine.core.options import EngineOptions

T = TypeVar("T")
_log = logging.getLogger(__name__)

LEAST_BATCHED_TOKENS = 256  # a budget is not halved below it: smaller steps save hardly any memory
_TEXTS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class CaptureOutOfMemory(MemoryError):
    """Memory ran out while graphs were captured."""


class StepTooLarge(DeviceMemoryError):
    """The largest step leaves no room for the KV cache; a smaller one would."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory, by whichever library's error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    plain = isinstance(error, RuntimeError) and type(error).__module__ in ("builtins", "torch")
    return plain and any(text in text_of(error) for text in _TEXTS)


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


def forget_locals(error: BaseException) -> None:
    """Lets go of what the frames behind `error` and its causes hold, so that keeping the error keeps no memory."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        todo += [each.__cause__, each.__context__]


def free_unused(device: torch.device) -> None:
    """Gives what nobody refers to any more back to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # graphs in flight live until they end
        gc.collect()
        empty_cache(device)


def empty_cache(device: torch.device) -> None:
    """Gives back what torch's allocator keeps for later."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
