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
from nanoengine.core.execution.step_inputs import PREFILL_ROWS, MixedSize
from nanoengine.core.step import StepPlan
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


_DECODE_ROWS = (64, 128, 256)
_PREFILL_TOKENS = (128, 256, 384, 480, 576, 672, 768, 864, 960, 1088, 1280, 1536, 2048)
_MORE_PREFILL_TOKENS = (*range(128, 1089, 64), 1216, 1408, 1664, 2048)


def mixed_sizes(max_rows: int, max_tokens: int) -> tuple[MixedSize, ...]:
    decode = sorted({min(n, max_rows) for n in _DECODE_ROWS})
    prefill = _PREFILL_TOKENS if len(decode) > 2 else _MORE_PREFILL_TOKENS  # about as many graphs
    sizes = (MixedSize(d, p) for d in decode for p in prefill)
    return tuple(size for size in sizes if size.tokens <= max_tokens)


class MixedGraphs:
    """Captured at start, the largest first, in one memory pool.

    Launching a model's kernels one by one takes the CPU longer than a mixed step of moderate size takes the GPU. What
    is padded: decode rows of the dummy slot, prefill rows without a token, and tokens behind the last row, whose K
    and V go to the dummy block. Larger steps run eagerly: there the GPU is the slower one.
    """

    def __init__(
        self, sizes: tuple[MixedSize, ...], run: Callable[[MixedSize], Tensor], agree: Callable[[bool], bool] = bool
    ) -> None:
        """`run(size)`: forward pass and output layer over the static buffers -> logits [size.rows, V]."""
        self._decode = sorted({size.decode for size in sizes})
        self._prefill = sorted({size.prefill for size in sizes})
        self._graphs: dict[MixedSize, torch.cuda.CUDAGraph] = {}
        self.logits: dict[MixedSize, Tensor] = {}  # of each size, valid until the next replay
        pool = torch.cuda.graph_pool_handle()
        for size in sorted(sizes, key=lambda each: -each.tokens):
            self._graphs[size], self.logits[size] = captured(partial(run, size), pool, agree)

    def size_for(self, plan: StepPlan) -> MixedSize | None:
        """The smallest captured size that holds `plan`; None where there is none, or it wants prompt log-probs."""
        decode, prefill = plan.num_decode_rows, plan.num_tokens - plan.num_decode_rows
        if plan.num_rows - decode > PREFILL_ROWS or not plan.sampled.all():
            return None
        d, p = bisect_left(self._decode, decode), bisect_left(self._prefill, prefill)
        if d == len(self._decode) or p == len(self._prefill):
            return None
        size = MixedSize(self._decode[d], self._prefill[p])
        return size if size in self._graphs else None

    def replay(self, size: MixedSize) -> Tensor:
        """Its logits [size.rows, V], valid until the next replay."""
        self._graphs[size].replay()
        return self.logits[size]
