"""Captures the CUDA graphs of a runner, at its start or when a step first wants one."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import product
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from nanoengine.api.errors import ModelError, described, forget_locals, is_failure, is_out_of_memory
from nanoengine.core.execution.finish_step import MASKED_DRAWS, CapturedTail, FinishStep
from nanoengine.core.execution.graphs import StepGraphs
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.core.execution.step_inputs import StepSize
from nanoengine.kernels.compile_ahead import compiling_ahead, is_compiling_ahead, making_keys
from nanoengine.kernels.compile_processes import CompileProcesses
from nanoengine.kernels.device import empty_cache, on_device
from nanoengine.kernels.host_ring import TURNS
from nanoengine.setup.start.graph_sizes import first_sizes
from nanoengine.setup.start.release import free_unused

_log = logging.getLogger(__name__)
T = TypeVar("T")


class CaptureOutOfMemory(MemoryError):
    """Memory ran out while graphs were captured."""


def compile_ahead(
    runner: ModelRunner, *, later: bool, largest: Callable[[], None], processes: CompileProcesses | None = None
) -> None:
    """Compiles kernels in parallel: those of the graphs that `capture_graphs` makes, of the first ones that steps will
    want if others are made later, and of `largest`, which runs a step. What is captured is not used."""
    if runner.graphs.sizes.sizes:
        with torch.inference_mode():
            _compile_ahead(_Capture(runner.graphs, runner.finish), processes, later=later, largest=largest)
        runner.graphs.clear()


def capture_graphs(
    runner: ModelRunner, *, later: bool = False, is_compiled: bool = False, processes: CompileProcesses | None = None
) -> str:
    """Captures the graphs of the runner, for all of its sizes.

    Args:
        later: only the pass of the smallest step; each other one when a step first wants it.
        is_compiled: the kernels are compiled: of all sizes, or with `later` those of the first steps.
        processes: which compile kernels.

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
                _compile_ahead(capture, processes, later=later)
            with making_keys() if capture.has_triton else nullcontext():
                capture.run_once(capture.sizes[-1:], ()) if later else capture.run_once()
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
        _log.warning("CUDA graph capture failed, running eagerly: %s", failure)
        if tables.device.type == "cuda":
            torch.cuda.synchronize(tables.device)
    tables.num_computed.zero_()
    tables.num_tokens.zero_()
    return failure


def _compile_ahead(
    capture: _Capture,
    processes: CompileProcesses | None,
    *,
    later: bool,
    largest: Callable[[], None] = lambda: None,
) -> None:
    """A dry run of all that is captured, or of the first steps, and of `largest`.

    Where kernels must be compiled, as in a first start, those of later steps are, too: else requests wait for them."""

    def run() -> None:
        largest()  # its kernels take longest to compile
        first = first_sizes(capture.sizes) if later else capture.sizes
        capture.run_once(first)
        if processes is not None and processes.are_started:
            capture.run_once([size for size in capture.sizes if size not in first])

    capture.compile_ahead(run, processes)
    empty_cache(capture.device)


def capture_next(runner: ModelRunner) -> bool:
    """Captures the next graph that no step has wanted so far, those of small steps first; of ways to draw, those that
    most steps had. Not while a step runs. False: none is left, or its capture failed."""
    graphs = runner.graphs
    made = Counter(kind for _, kind in graphs.passes)
    kinds = sorted(runner.sampler.tails if graphs.sizes.tail else [None], key=lambda kind: -made[kind])
    with on_device(runner.device), torch.inference_mode():
        for kind, size in product(kinds, sorted(graphs.used, key=lambda size: (size.tokens, size))):
            if (size, kind) not in graphs.passes:
                return graphs.ready(size, kind)
    return False


class _Attempts:
    """Captures that failed: those of one key are tried again after ever more steps that wanted it."""

    FIRST, TIMES = 64, 4  # steps that are left out, and how many times more the next time

    def __init__(self) -> None:
        self._pauses: dict[Hashable, tuple[int, int]] = {}  # key -> (steps left of the pause, length of the next)

    def due(self, key: Hashable) -> bool:
        """Whether a step that wants it may try; one that may not is counted."""
        left, length = self._pauses.get(key, (0, 0))
        if left:
            self._pauses[key] = left - 1, length
        return not left

    def failed(self, key: Hashable, *, pause: bool = True) -> bool:
        """Notes a failure. Whether it is the first one of this key. pause: behind the first one, too."""
        first, (_, length) = key not in self._pauses, self._pauses.get(key, (0, self.FIRST))
        self._pauses[key] = (length, length * self.TIMES) if pause or not first else (0, length)
        return first


class _Capture:
    """The captures of one runner, in one memory pool."""

    def __init__(self, graphs: StepGraphs, finish: FinishStep) -> None:
        self._graphs, self._finish, self.device = graphs, finish, finish.tables.device
        self.sizes = sorted(graphs.sizes.sizes, key=lambda size: (-size.tokens, size))  # the largest first
        self._pool: Any = None
        # One: for each stream cuBLAS takes memory of its own.
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._tails: Sequence[int] = finish.sampler.tails if graphs.sizes.tail else ()
        self._attempts = _Attempts()
        if graphs.sizes.tail:
            graphs.tail = CapturedTail(finish, graphs.buffers, max(size.logits for size in self.sizes))

    @property
    def has_triton(self) -> bool:
        return self.device.type == "cuda" and importlib.util.find_spec("triton") is not None

    def compile_ahead(self, run: Callable[[], None], processes: CompileProcesses | None = None) -> None:
        """Triton's kernels of `run` are compiled in parallel, and not run; all else runs.

        The static buffers keep what kernels wrote before, so indices in them are valid. But what a backend writes to
        the cache without Triton goes to the dummy block, as what the step before has there is a request's.
        """
        if not self.has_triton:
            return
        self._finish.tables.flush()  # what a run sends to the tables would be lost
        self._graphs.buffers.out.slot_mapping.zero_()
        try:
            with compiling_ahead(processes):
                run()
                self._write_once()
        except BaseException as error:  # a backend may need results of kernels; then kernels are compiled one by one
            if not is_failure(error):
                raise
            _log.info("kernels are compiled one by one: %s", described(error))

    def _write_once(self) -> None:
        """What sends writes to the tables in front of the first step's dry run."""
        tables = self._finish.tables
        if is_compiling_ahead() and self._graphs.sizes.inputs:
            tables.kernels.scatter(tables.buffer.words, torch.zeros(2, dtype=torch.int32, device=self.device))

    def run_once(self, sizes: Sequence[StepSize] | None = None, kinds: Sequence[int] | None = None) -> None:
        """Runs each pass and each tail, also behind a mask, or those of these sizes and kinds, with dummy rows: what is
        made at first use is then not made in a capture."""
        graphs, tried = self._graphs, set[Hashable]()
        for sent, size in enumerate(self.sizes if sizes is None else sizes):
            self._make_room(sent)
            logits = graphs.run(size)
            for kind in self._tails if kinds is None else kinds:
                key = (size.rows, size.plain, size.query_len, kind)  # kernels of tails depend on nothing else
                if key not in tried:
                    self._run_tail(size, kind, logits)
                    if kinds is None and size.logits <= MASKED_DRAWS and self._finish.tp.size == 1:
                        self._run_tail(size, kind, logits, masked=True)
                tried.add(key)

    def _run_tail(self, size: StepSize, kind: int, logits: Tensor, *, masked: bool = False) -> None:
        tail = self._graphs.tail
        assert tail is not None
        tail.run(self._graphs.gathered[size].rows, kind, logits, size.query_len - 1, masked=masked)

    def captures(self, *, smallest: bool) -> None:
        """Captures all graphs, those of the largest steps first; or the pass of the smallest step, which shows whether
        captures work here."""
        if smallest:
            self._capture(self.sizes[-1], None)
            return
        for sent, (size, kind) in enumerate(product(self.sizes, (None, *self._tails))):
            if not self._graphs.sizes.inputs:
                self._make_room(sent)
            self._capture(size, kind)

    def _make_room(self, sent: int) -> None:
        """Where the inputs of so many steps went to the GPU in a row: what it has not copied yet is not overwritten. It
        may lag behind, as other processes use it or kernels are only compiled, and then a step reads another's rows."""
        if self._stream is not None and sent and sent % (TURNS // 4) == 0:
            torch.cuda.current_stream(self.device).synchronize()

    def when_wanted(self, size: StepSize, kind: int | None) -> bool:
        """`StepGraphs.capture`, between steps. False: it failed, now or the last time; such steps run eagerly, and
        later ones try again. Where memory ran out all graphs are dropped, which gives theirs back, and captured again
        when they are wanted."""
        if not self._attempts.due(size):
            return False
        if self._stream is not None:
            # Each thread has its own, which cannot be made in a capture.
            torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        self.compile_ahead(partial(self.run_once, [size], () if kind is None else [kind]))
        error = self._failure(partial(self._capture, size, kind))
        if error is not None:
            _log.info("the capture of %s failed, and is tried again: %s", size, described(error))
            error = self._failure(partial(self._capture_prepared, size, kind, error))
        if error is None:
            return True
        if self._attempts.failed(size):
            _log.warning("no CUDA graph of %s, whose steps run eagerly for now: %s", size, described(error))
        if is_out_of_memory(error):
            self._drop()
        return False

    def masked(self, size: StepSize, kind: int) -> torch.cuda.CUDAGraph | None:
        """`StepGraphs.capture_masked`, between a pass and its tail. Where it fails the tail runs launch by launch, and
        what it makes at first use is there the next time."""
        key = (size, "masked")
        if not self._attempts.due(key):
            return None
        made: list[torch.cuda.CUDAGraph] = []
        run = partial(self._graphs.run_masked_tail, size, kind)
        error = self._failure(lambda: made.append(self._made(run)[0]))
        if error is None:
            return made[0]
        if self._attempts.failed(key, pause=False):
            _log.warning("no CUDA graph of the tail of %s behind a mask, run eagerly: %s", size, described(error))
        return None

    def _capture_prepared(self, size: StepSize, kind: int | None, failure: BaseException) -> None:
        """What it needs is there before the capture: memory that torch's allocator keeps for later, which none gets in
        a capture; or what is made at first use, by an eager run."""
        if is_out_of_memory(failure):
            empty_cache(self.device)
        else:
            logits = self._graphs.run(size)
            if kind is not None:
                self._run_tail(size, kind, logits)
        self._capture(size, kind)

    def _drop(self) -> None:
        graphs = self._graphs
        for held in (graphs.passes, graphs.masked_tails, graphs.logits):
            held.clear()
        free_unused(self.device)

    def _failure(self, capture: Callable[[], None]) -> BaseException | None:
        """What it raised, without the memory that its frames hold."""
        try:
            capture()
        except BaseException as error:
            if not is_failure(error):
                raise
            forget_locals(error)
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
        if not self._graphs.passes and not self._graphs.masked_tails:
            self._pool = torch.cuda.graph_pool_handle()  # torch takes none whose last graph, also a failed one, is gone
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
            _begin(graph, pool)
            try:
                result = run()
            finally:
                _end(graph, pool)
    except BaseException as error:  # raised below, after the ranks have agreed
        if not is_failure(error):
            raise
        failure = error
    if not agree(failure is None):
        raise failure or RuntimeError("another rank could not capture this graph")
    return graph, cast("T", result)


def _begin(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Begins its capture; one that fails half way is ended, or its pool would take what this thread allocates from then
    on, and no other could begin with it."""
    try:
        # "thread_local": other threads (the watchdog of collectives, pinned copies) do not break the capture
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    except BaseException:
        with suppress(RuntimeError):
            _end(graph, pool)
        raise


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Ends its capture. One that is invalid ends with an error, and unknown to torch's allocator, which would then
    never give back what it keeps: neither of this pool nor, once memory runs out, of any other."""
    try:
        graph.capture_end()
    except BaseException:
        with suppress(RuntimeError):  # it was ended there: nothing is to be done
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        raise


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
