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
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.core.execution.finish_step import CapturedTail
from nanoengine.core.execution.graphs import StepGraphs
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.core.execution.sampler import Sampler
from nanoengine.kernels.compile_ahead import compiling_ahead, is_compiling_ahead

_log = logging.getLogger(__name__)
T = TypeVar("T")


class CaptureOutOfMemory(MemoryError):
    """Memory ran out while graphs were captured."""


def capture_graphs(runner: ModelRunner) -> str:
    """The runner's graphs, of the sizes that it is to have. Returns why there are none, in words, where a capture fails
    (which is logged); every step runs eagerly then.

    Raises `CaptureOutOfMemory`: smaller steps may have graphs.
    """
    graphs, tables = runner.graphs, runner.tables
    if not graphs.sizes.sizes:
        return ""
    failure = ""
    try:
        with torch.inference_mode():
            _compile_ahead(graphs, runner.sampler, runner.tp)
            _capture(graphs, runner.sampler, runner.tp)
    except ModelError:  # no step of such a model is right
        raise
    except BaseException as error:  # a driver's or a compiler's; running eagerly is right all the same
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


def _compile_ahead(graphs: StepGraphs, sampler: Sampler, tp: TensorParallelGroup) -> None:
    """A dry run of all captures, so that Triton compiles the kernels in parallel.

    The static buffers keep what the kernels before wrote, so indices in them are legal.
    """
    if graphs.buffers.tables.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return
    try:
        with compiling_ahead():
            _capture(graphs, sampler, tp)
    except BaseException as error:  # a backend may need the results; then its kernels compile in turn
        if not is_failure(error):
            raise
        _log.info("kernels are compiled one by one: %s", described(error))
    graphs.clear()
    torch.cuda.empty_cache()


def _capture(graphs: StepGraphs, sampler: Sampler, tp: TensorParallelGroup) -> None:
    """The largest first, in one memory pool; then the tails, whose rows must be the dummy slot's."""
    sizes = sorted(graphs.sizes.sizes, key=lambda size: (-size.tokens, size))
    pool = torch.cuda.graph_pool_handle()
    for size in sizes:
        graphs.passes[size, None], graphs.logits[size] = captured(partial(graphs.run, size), pool, tp.agree)
    if graphs.sizes.tail:
        buffers = graphs.buffers
        graphs.tail = CapturedTail(sampler, buffers.tables, buffers, tp)
        buffers.blank()
        pool = torch.cuda.graph_pool_handle()
        for size in sizes:
            for kind in sampler.tails:
                run = partial(graphs.tail.run, buffers.rows_of(size), kind, graphs.logits[size])
                graphs.passes[size, kind], _ = captured(run, pool, tp.agree)
    graphs.index()


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
    """Garbage is not collected: graphs of an older engine that end inside a capture would break it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
