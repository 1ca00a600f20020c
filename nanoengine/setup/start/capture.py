"""Captures the CUDA graphs of a runner: all of them, or none."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from nanoengine.api.errors import ModelError, described, is_failure, is_out_of_memory
from nanoengine.core.execution.finish_step import MASKED_DRAWS, CapturedTail, FinishStep
from nanoengine.core.execution.graphs import StepGraphs
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.kernels.compile_ahead import compiling_ahead, is_compiling_ahead

_log = logging.getLogger(__name__)
T = TypeVar("T")


class CaptureOutOfMemory(MemoryError):
    """Memory ran out while graphs were captured."""


def capture_graphs(runner: ModelRunner) -> str:
    """Captures the graphs of the runner, for all of its sizes.

    Returns "", or the reason (which is logged) if a capture fails; then every step runs eagerly. Raises
    `CaptureOutOfMemory`, because graphs of smaller steps may fit.
    """
    graphs, tables = runner.graphs, runner.tables
    if not graphs.sizes.sizes:
        return ""
    failure = ""
    try:
        with torch.inference_mode():
            _compile_ahead(graphs, runner.finish)
            _capture(graphs, runner.finish)
    except ModelError:  # the model is wrong, also in eager steps
        raise
    except BaseException as error:  # an error of a driver or compiler; eager steps are correct
        if not is_failure(error):
            raise
        graphs.clear()
        failure = described(error)
        if is_out_of_memory(error):
            raise CaptureOutOfMemory(f"CUDA graph capture failed: {failure}") from error
        _log.warning("CUDA graph capture failed, running eagerly: %s", failure)
        if tables.device.type == "cuda":
            torch.cuda.synchronize(tables.device)
    tables.num_computed.zero_()
    tables.num_tokens.zero_()
    return failure


def _compile_ahead(graphs: StepGraphs, finish: FinishStep) -> None:
    """A dry run of all captures, so that Triton compiles the kernels in parallel.

    The static buffers keep what kernels wrote before, so indices in them are valid.
    """
    if graphs.buffers.tables.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return
    try:
        with compiling_ahead():
            _capture(graphs, finish)
    except BaseException as error:  # a backend may need results of kernels; then kernels are compiled one by one
        if not is_failure(error):
            raise
        _log.info("kernels are compiled one by one: %s", described(error))
    graphs.clear()
    torch.cuda.empty_cache()


def _capture(graphs: StepGraphs, finish: FinishStep) -> None:
    """Captures the largest graphs first, in one memory pool; then those with tails, with dummy rows."""
    sizes = sorted(graphs.sizes.sizes, key=lambda size: (-size.tokens, size))
    pool = torch.cuda.graph_pool_handle()
    for size in sizes:
        graphs.passes[size, None], graphs.logits[size] = captured(partial(graphs.run, size), pool, finish.tp.agree)
    if graphs.sizes.tail:
        buffers = graphs.buffers
        graphs.tail = CapturedTail(finish, buffers, max(size.logits for size in sizes))
        buffers.sent.fill_(buffers.tables.dummy_slot)  # wherever a tail may look for its rows
        for size in sizes:
            for kind in finish.sampler.tails:
                graphs.passes[size, kind], _ = captured(partial(graphs.run_tail, size, kind), pool, finish.tp.agree)
        _prepare_masked(graphs, finish, pool)
    graphs.index()


def _prepare_masked(graphs: StepGraphs, finish: FinishStep, pool: Any) -> None:
    """Tails behind masks: captured where that is asked for; else run once, so that no step waits for a compiler."""
    if finish.tp.size > 1:
        return
    sizes = [size for size in graphs.sizes.sizes if size.logits <= MASKED_DRAWS]
    for kind in finish.sampler.tails:
        for size in sizes if graphs.sizes.masked else sizes[:1]:
            run = partial(graphs.run_masked_tail, size, kind)
            if graphs.sizes.masked:
                graphs.masked_tails[size, kind], _ = captured(run, pool, finish.tp.agree)
            else:
                run()


def captured(run: Callable[[], T], pool: Any, agree: Callable[[bool], bool] = bool) -> tuple[torch.cuda.CUDAGraph, T]:
    """Captures `run` in the memory pool. Returns the graph and the return value of `run` in the capture.

    `run` is called once before, so that kernels which are compiled on first use are compiled outside the capture. In a
    dry run, where kernels are only compiled, the graph is empty.

    `agree(success)`: whether all ranks had success. Raises the error of the capture, or `RuntimeError` if it failed on
    another rank, because no rank may replay a graph that another rank does not have.
    """
    result = run()
    if is_compiling_ahead():
        return torch.cuda.CUDAGraph(), result
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    failure: BaseException | None = None
    try:
        # "thread_local": other threads (the watchdog of collectives, pinned copies) do not break the capture
        with _no_collection(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
    except BaseException as error:  # raised below, after the ranks have agreed
        if not is_failure(error):
            raise
        failure = error
    if not agree(failure is None):
        raise failure or RuntimeError("another rank could not capture this graph")
    return graph, result


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
