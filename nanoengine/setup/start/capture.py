"""Captures the CUDA graphs of a runner, at its start or when a step first wants one."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from nanoengine.api.errors import ModelError, described, is_failure, is_out_of_memory
from nanoengine.core.execution.finish_step import MASKED_DRAWS, CapturedTail, FinishStep
from nanoengine.core.execution.graphs import StepGraphs
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.core.execution.step_inputs import StepSize
from nanoengine.kernels.compile_ahead import compiling_ahead
from nanoengine.kernels.device import empty_cache

_log = logging.getLogger(__name__)
_FAILED = "CUDA graph capture failed, running eagerly: %s"
T = TypeVar("T")


class CaptureOutOfMemory(MemoryError):
    """Memory ran out while graphs were captured."""


def capture_graphs(runner: ModelRunner, *, later: bool = False, is_compiled: bool = False) -> str:
    """Captures the graphs of the runner, for all of its sizes.

    Args:
        later: only the pass of the smallest step; each other one when a step first wants it.
        is_compiled: Triton's cache has the kernels of all sizes.

    Returns "", or the reason (which is logged) if a capture fails; then every step runs eagerly. Raises
    `CaptureOutOfMemory`, because graphs of smaller steps may fit.
    """
    graphs, tables = runner.graphs, runner.tables
    if not graphs.sizes.sizes:
        return ""
    failure = ""
    try:
        with torch.inference_mode():
            capture = _Capture(graphs, runner.finish)
            if not is_compiled:
                _compile_ahead(capture)
            capture.run_once(smallest=later)
            empty_cache(tables.device)
            capture.captures(smallest=later)
        graphs.capture, graphs.capture_masked = capture.when_wanted, capture.masked
        graphs.use(graphs.sizes.sizes)
    except ModelError:  # the model is wrong, also in eager steps
        raise
    except BaseException as error:  # an error of a driver or compiler; eager steps are correct
        if not is_failure(error):
            raise
        graphs.clear()
        failure = described(error)
        if is_out_of_memory(error):
            raise CaptureOutOfMemory(f"CUDA graph capture failed: {failure}") from error
        _log.warning(_FAILED, failure)
        if tables.device.type == "cuda":
            torch.cuda.synchronize(tables.device)
    tables.num_computed.zero_()
    tables.num_tokens.zero_()
    return failure


def _compile_ahead(capture: _Capture) -> None:
    """A dry run of all that is captured, so that Triton compiles the kernels in parallel.

    The static buffers keep what kernels wrote before, so indices in them are valid.
    """
    if capture.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return
    try:
        with compiling_ahead():
            capture.run_once()
    except BaseException as error:  # a backend may need results of kernels; then kernels are compiled one by one
        if not is_failure(error):
            raise
        _log.info("kernels are compiled one by one: %s", described(error))
    torch.cuda.empty_cache()


class _Capture:
    """The captures of one runner, in one memory pool."""

    def __init__(self, graphs: StepGraphs, finish: FinishStep) -> None:
        self._graphs, self._finish, self.device = graphs, finish, finish.tables.device
        self._sizes = sorted(graphs.sizes.sizes, key=lambda size: (-size.tokens, size))  # the largest first
        self._pool = torch.cuda.graph_pool_handle()
        # One: for each stream cuBLAS takes memory of its own.
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._tails: Sequence[int] = finish.sampler.tails if graphs.sizes.tail else ()
        self._masked_failures = 0
        if graphs.sizes.tail:
            graphs.tail = CapturedTail(finish, graphs.buffers, max(size.logits for size in self._sizes))

    def run_once(self, *, smallest: bool = False) -> None:
        """Runs each pass and each tail, or the pass of the smallest step, with dummy rows: what is made at first use is
        then not made in a capture."""
        graphs, tried = self._graphs, set[Hashable]()
        for size in self._sizes[-1:] if smallest else self._sizes:
            logits = graphs.run(size)
            for kind in () if smallest else self._tails:
                key = (size.rows, size.plain, size.query_len, kind)  # kernels of tails depend on nothing else
                if key not in tried:
                    self._run_tail(size, kind, logits)
                    if size.logits <= MASKED_DRAWS and self._finish.tp.size == 1 and (kind, "masked") not in tried:
                        self._run_tail(size, kind, logits, masked=True)
                        tried.add((kind, "masked"))
                tried.add(key)

    def _run_tail(self, size: StepSize, kind: int, logits: Tensor, *, masked: bool = False) -> None:
        tail = self._graphs.tail
        assert tail is not None
        tail.run(self._graphs.gathered[size].rows, kind, logits, size.query_len - 1, masked=masked)

    def captures(self, *, smallest: bool) -> None:
        """Captures all graphs, those of the largest steps first; or the pass of the smallest step, which shows whether
        captures work here."""
        if smallest:
            self._capture(self._sizes[-1], None)
            return
        for size in self._sizes:
            for kind in (None, *self._tails):
                self._capture(size, kind)

    def when_wanted(self, size: StepSize, kind: int | None) -> bool:
        """`StepGraphs.capture`. False: it failed, and no step is a graph any more."""
        if self._stream is not None:
            # Each thread has its own, which cannot be made in a capture.
            torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        error = self._failure(size, kind)
        if error is not None:  # what it made at first use is there once it has run
            _log.info("a capture failed, and is tried again: %s", described(error))
            logits = self._graphs.run(size)
            if kind is not None:
                self._run_tail(size, kind, logits)
            error = self._failure(size, kind)
        if error is not None:
            self._graphs.clear()
            _log.warning(_FAILED, described(error))
        return error is None

    def masked(self, size: StepSize, kind: int) -> torch.cuda.CUDAGraph | None:
        """`StepGraphs.capture_masked`. Where it fails the tail runs launch by launch, and what it makes at first use is
        there the next time; after that it is not tried any more."""
        if self._masked_failures > 1:
            return None
        try:
            return self._made(partial(self._graphs.run_masked_tail, size, kind))[0]
        except BaseException as error:
            if not is_failure(error):
                raise
            self._masked_failures += 1
            _log.warning("a tail behind a mask was not captured, so it runs launch by launch: %s", described(error))
            return None

    def _failure(self, size: StepSize, kind: int | None) -> BaseException | None:
        try:
            self._capture(size, kind)
        except BaseException as error:
            if not is_failure(error):
                raise
            return error
        return None

    def _capture(self, size: StepSize, kind: int | None) -> None:
        graphs = self._graphs
        if not graphs.sizes.inputs:  # a backend was filled last for another size
            graphs.prepare(graphs.buffers.blank_plan(size), size)
        if kind is None:
            graphs.passes[size, None], graphs.logits[size] = self._made(partial(graphs.run, size))
        else:
            graphs.passes[size, kind], _ = self._made(partial(graphs.run_tail, size, kind))

    def _made(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        return captured(run, self._pool, self._stream, self._finish.tp.agree)


def captured(
    run: Callable[[], T], pool: Any, stream: torch.cuda.Stream | None, agree: Callable[[bool], bool] = bool
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Captures `run` on the stream, in the memory pool. Returns the graph and what `run` returns. Unlike
    `torch.cuda.graph` it does not wait for the device, which may be busy with a step. Kernels may be loaded meanwhile,
    but what is made at first use, and kept, must have been made before.

    `agree(success)`: whether all ranks had success. Raises the error of the capture, or `RuntimeError` if it failed on
    another rank, because no rank may replay a graph that another rank does not have.
    """
    graph, result = torch.cuda.CUDAGraph(), None
    failure: BaseException | None = None
    try:
        with _no_collection(), torch.cuda.stream(stream):
            # "thread_local": other threads (the watchdog of collectives, pinned copies) do not break the capture
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
    except BaseException as error:  # raised below, after the ranks have agreed
        if not is_failure(error):
            raise
        failure = error
    if not agree(failure is None):
        raise failure or RuntimeError("another rank could not capture this graph")
    return graph, cast("T", result)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A context without garbage collection: deleting graphs of an older engine would break a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
