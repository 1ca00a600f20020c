"""CUDA graphs of the decode step: one a padded number of rows, model and output layer together.

All input is in static buffers, which eager steps use too; a replay reads what `StepBuffers.gather` and the backends'
`fill` have just written there. Rows behind the real ones are the dummy slot's: ordinary rows of length 1.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from nanoengine.api.errors import is_failure
from nanoengine.kernels.compile_ahead import is_compiling_ahead

_STEPS = ((8, 8), (64, 16), (256, 32), (1024, 128))  # up to so many rows, in steps of so many


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Row counts to capture: 1, 2, 4, then coarser with size, up to `max_rows`."""
    sizes, last = [n for n in (1, 2, 4) if n <= max_rows], 0
    for limit, stride in _STEPS:
        sizes += range((last // stride + 1) * stride, min(limit, max_rows) + 1, stride)
        last = limit
    return tuple(sorted({*sizes, max_rows}))


T = TypeVar("T")


def captured(run: Callable[[], T], pool: Any, agree: Callable[[bool], bool] = bool) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `run` in the memory pool, and what `run` returned inside it.

    It runs once before, so that what is compiled on first use is compiled outside the capture. Where kernels are only
    compiled, the graph is empty.

    `agree(went well)`: whether it did on all ranks. Raises what the capture raised, or `RuntimeError` if that was
    another rank's: no rank replays what another has not.
    """
    result = run()
    if is_compiling_ahead():
        return torch.cuda.CUDAGraph(), result
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    failure: BaseException | None = None
    try:
        # "thread_local": what other threads do (a collective's watchdog, pinned copies) breaks no capture
        with _no_collection(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
    except BaseException as error:  # raised below, once the others know
        if not is_failure(error):
            raise
        failure = error
    if not agree(failure is None):
        raise failure or RuntimeError("another rank could not capture this graph")
    return graph, result


@contextmanager
def _no_collection() -> Iterator[None]:
    """An older engine's graphs that are garbage must not end in here: that would break the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class DecodeGraphs:
    """Captured once, at start, the largest first so that all share one memory pool."""

    def __init__(
        self, sizes: Sequence[int], run: Callable[[int], Tensor], agree: Callable[[bool], bool] = bool
    ) -> None:
        """`run(rows)`: forward pass and output layer over the first `rows` rows of the static buffers -> logits.

        Raises whatever a capture raises; the caller then stays eager.
        """
        self.sizes = tuple(sorted(sizes))
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.logits: dict[int, Tensor] = {}  # of each size, valid until the next replay
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.sizes):
            self._graphs[size], self.logits[size] = captured(partial(run, size), pool, agree)

    def size_for(self, rows: int) -> int | None:
        """The smallest captured size that holds `rows` rows."""
        at = bisect_left(self.sizes, rows)
        return self.sizes[at] if at < len(self.sizes) else None

    def replay(self, size: int) -> Tensor:
        """Runs the graph; its logits [size, V], valid until the next replay."""
        self._graphs[size].replay()
        return self.logits[size]
