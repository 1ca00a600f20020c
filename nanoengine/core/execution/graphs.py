"""CUDA graphs of steps: their capture and their replay.

A graph is one pass: the step's inputs, model and output layer; then another one over its logits draws and records
(`finish_step.py`). All input is in static buffers, which eager steps use too. What is padded: decode rows of the dummy
slot, prefill rows without a token, and tokens behind the last row, whose K and V go to the dummy block. Larger mixed
steps run eagerly: there the GPU is the slower one.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanoengine.api.checks import CheckedModel
from nanoengine.api.errors import ModelError, described, is_failure, is_out_of_memory
from nanoengine.api.model import ForwardBatch
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.core.execution.finish_step import CapturedTail
from nanoengine.core.execution.sampler import Sampler
from nanoengine.core.execution.step_inputs import PREFILL_ROWS, GatheredStep, StepBuffers, StepSize, blank_plan
from nanoengine.core.step import StepPlan
from nanoengine.kernels.compile_ahead import compiling_ahead, is_compiling_ahead

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CaptureSizes:
    """sizes: padded steps. tail: whether sampling is captured too. inputs: whether a graph gathers its own inputs;
    those of mixed steps must."""

    sizes: tuple[StepSize, ...] = ()
    tail: bool = False
    inputs: bool = False


class CaptureOutOfMemory(MemoryError):
    """Memory ran out while graphs were captured."""


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


class StepGraphs:
    """The graphs of one runner. Empty until captured, and for good where a capture fails: `failure` is why, in words.

    Attributes:
        gathered, logits: of each captured size the inputs and [rows, V / tp], valid until its next replay.
    """

    def __init__(
        self,
        sizes: CaptureSizes,
        model: CheckedModel,
        buffers: StepBuffers,
        sampler: Sampler,
        tp: TensorParallelGroup,
    ) -> None:
        self.sizes, self._model, self._buffers, self._sampler, self._tp = sizes, model, buffers, sampler, tp
        self._tables = buffers.tables
        self.tail: CapturedTail | None = None
        self.failure = ""
        self._forget()

    def _forget(self) -> None:
        self._graphs: dict[tuple[StepSize, int | None], torch.cuda.CUDAGraph] = {}  # by size and kind of tail
        self.gathered: dict[StepSize, GatheredStep] = {}
        self.logits: dict[StepSize, Tensor] = {}
        self._decode_rows: dict[bool, list[int]] = {}  # captured ones, by whether prefill rows follow
        self._prefill: list[int] = []

    def size_for(self, plan: StepPlan) -> StepSize | None:
        """The smallest captured size that holds `plan`; None where there is none, or it wants prompt log-probs."""
        decode, prefill = plan.num_decode_rows, plan.num_tokens - plan.num_decode_rows
        rows = self._decode_rows.get(prefill > 0, [])
        at = bisect_left(rows, decode)
        if at == len(rows) or plan.num_rows - decode > PREFILL_ROWS or not plan.sampled.all():
            return None
        if not prefill:
            return StepSize(rows[at])
        p = bisect_left(self._prefill, prefill)
        size = StepSize(rows[at], self._prefill[p]) if p < len(self._prefill) else None
        return size if size in self.logits else None

    def prepare(self, plan: StepPlan, size: StepSize) -> None:
        """Give a padded plan, and the pending writes, to the graph of `size`, which is to be replayed next."""
        if self.sizes.inputs:
            self._buffers.send(plan, np.flatnonzero(plan.sampled))
        else:
            self.gathered[size] = self._buffers.gather(plan)

    def replay(self, size: StepSize) -> Tensor:
        """Model and output layer; the logits, valid until the next replay."""
        self._graphs[size, None].replay()
        return self.logits[size]

    def replay_tail(self, size: StepSize, kind: int) -> Tensor:
        """Draw and record, from the logits of that size, by the graph of that kind of tail: `CapturedTail.drawn`."""
        assert self.tail is not None
        self._graphs[size, kind].replay()
        return self.tail.drawn(size.rows)

    def capture(self) -> None:
        """All of them, or none: a capture that fails leaves every step eager (logged once).

        Raises `CaptureOutOfMemory`: smaller steps may have graphs.
        """
        if not self.sizes.sizes:
            return
        try:
            with torch.inference_mode():
                self._compile_ahead()
                self._capture()
        except ModelError:  # no step of such a model is right
            raise
        except BaseException as error:  # a driver's or a compiler's; running eagerly is right all the same
            if not is_failure(error):
                raise
            self._forget()
            self.failure = described(error)
            if is_out_of_memory(error):
                raise CaptureOutOfMemory(f"CUDA graph capture failed: {self.failure}") from error
            _log.warning("CUDA graph capture failed, running eagerly: %s", self.failure)
            if self._tables.device.type == "cuda":
                torch.cuda.synchronize(self._tables.device)
        self._tables.num_computed.zero_()
        self._tables.num_tokens.zero_()

    def _compile_ahead(self) -> None:
        """A dry run of all captures, so that Triton compiles the kernels in parallel.

        What the kernels before wrote into the static buffers stays there, so indices in them are legal.
        """
        if self._tables.device.type != "cuda" or importlib.util.find_spec("triton") is None:
            return
        try:
            with compiling_ahead():
                self._capture()
        except BaseException as error:  # a backend may need the results; then its kernels compile in turn
            if not is_failure(error):
                raise
            _log.info("kernels are compiled one by one: %s", described(error))
        self._forget()
        torch.cuda.empty_cache()

    def _capture(self) -> None:
        """The largest first, in one memory pool; then the tails, whose rows must be the dummy slot's."""
        sizes = sorted(self.sizes.sizes, key=lambda size: (-size.tokens, size))
        pool = torch.cuda.graph_pool_handle()
        for size in sizes:
            self._graphs[size, None], self.logits[size] = captured(partial(self._step, size), pool, self._tp.agree)
        if self.sizes.tail:
            self.tail = CapturedTail(self._sampler, self._tables, self._buffers, self._tp)
            self._buffers.blank()
            pool = torch.cuda.graph_pool_handle()
            for size in sizes:
                for kind in self._sampler.tails:
                    run = partial(self.tail.run, self._buffers.rows_of(size), kind, self.logits[size])
                    self._graphs[size, kind], _ = captured(run, pool, self._tp.agree)
        self._decode_rows = {
            mixed: sorted({size.decode_rows for size in sizes if (size.prefill_tokens > 0) is mixed})
            for mixed in (False, True)
        }
        self._prefill = sorted({size.prefill_tokens for size in sizes if size.prefill_tokens})

    def _step(self, size: StepSize) -> Tensor:
        """Inputs, forward pass and output layer over the static buffers, as a graph captures them; logits of each
        row's last token. What the host sends, or gathers for the graph, is not captured."""
        plan = blank_plan(size, self._tables.dummy_slot, self._buffers.limits.max_model_len - 1)
        if not torch.cuda.is_current_stream_capturing():
            self.prepare(plan, size)
        if self.sizes.inputs:
            self.gathered[size] = self._buffers.gather_in_graph(plan, size)
        inputs = self.gathered[size]
        hidden = self._model(inputs.input_ids, inputs.positions, ForwardBatch(num_tokens=size.tokens))
        return self._model.compute_logits(hidden if size.plain else hidden.index_select(0, inputs.rows.logits_index))
