"""One device's share of a step: inputs -> forward -> sample -> tokens to their slots.

After a launch that raised, the slots of its rows hold whatever it came to write: each must enter anew to run again.
Nothing here waits for the device: results travel to the host beside the next step, and `LaunchedStep.wait` is where
they are awaited.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from nanoengine.api.attention import AttentionBackend
from nanoengine.api.checks import CheckedModel
from nanoengine.api.drafters import DeviceDrafter
from nanoengine.api.errors import is_out_of_memory
from nanoengine.api.model import ForwardBatch, Model, ModelConfig
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.core.execution.finish_step import MASKED_DRAWS, FinishStep, Forwarded, Replayed, of_draws, pool
from nanoengine.core.execution.graphs import CaptureSizes, StepGraphs
from nanoengine.core.execution.results import LateStep, LaunchedStep, StepHandle, TailStep
from nanoengine.core.execution.sampler import DrawPlan, Sampler
from nanoengine.core.execution.step_inputs import StepBuffers, pad
from nanoengine.core.step import GRAPH_DECODE, GRAPH_MISSING, GRAPH_MIXED, GRAPH_TAIL, StepPlan, SuppliedColumn
from nanoengine.kernels.device import empty_cache, on_device


class ModelRunner:
    """Runs step plans on one device, over the parts that it is given.

    Attributes:
        eager: no step is a graph, so that each module is called. capture: of module outputs, while one is made
            (`observe/taps.py`).
    """

    def __init__(
        self,
        *,
        device: torch.device,
        tp: TensorParallelGroup,
        model: Model,
        config: ModelConfig,
        backends: Sequence[AttentionBackend],
        buffers: StepBuffers,
        sampler: Sampler,
        sizes: CaptureSizes,
        drafter: DeviceDrafter | None = None,
        release: Callable[[], None],
    ) -> None:
        """backends: one a KV group. sizes: of steps that are to have graphs. drafter: guesses the tokens behind each
        draw. release: gives back what is not the runner's own."""
        self.device, self.tp, self.model, self.backends = device, tp, model, backends
        self._release = release
        self.buffers, self.tables, self.sampler = buffers, buffers.tables, sampler
        self.eager = False
        self.capture: Any = None
        self._ran_out = False  # of memory, in the last launch
        self.checked_model = CheckedModel(model, config, tp, type(backends[0]))
        self.finish = FinishStep(self.checked_model, self.tables, sampler, tp, drafter)
        self.graphs = StepGraphs(sizes, self.checked_model, buffers)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepHandle:
        """Forward, and sample: of a late step only when its columns are supplied."""
        with self._launching():
            step = self.forward(plan)
            if not plan.late:
                return self.sample(step)
            static = self.graphs.tail if step.replayed is not None else None
            return LateStep(partial(self._supply, step), None if static is None else static.host_mask)

    @torch.inference_mode()
    def _supply(self, step: Forwarded, columns: Sequence[SuppliedColumn]) -> StepHandle:
        with self._launching():
            return self.sample(step, columns)

    @contextmanager
    def _launching(self) -> Iterator[None]:
        """Behind a launch that ran out of memory the allocator first gives back what it keeps."""
        with on_device(self.device):
            if self._ran_out:  # only now: the error's traceback held the step's tensors
                empty_cache(self.device)
            self._ran_out = False
            try:
                yield
            except BaseException as error:
                self._ran_out = is_out_of_memory(error)
                raise

    def forward(self, plan: StepPlan) -> Forwarded:
        """Apply the plan's writes and run the model: by replaying a graph, which does both, where one fits."""
        self.tables.write(plan)
        size = None if self.eager or not self.graphs.used else self.graphs.size_for(plan)
        tail = None if size is None or plan.late else self.finish.choose(plan).captured
        if size is not None and self.graphs.ready(size, tail):
            padded, own = pad(plan, size, self.tables.dummy_slot)
            self.graphs.prepare(padded, size)
            self.tp.begin_forward()
            logits = self.graphs.replay(size, tail)
            graphs = GRAPH_MIXED if size.prefill_tokens else GRAPH_DECODE
            return Forwarded(plan, self.graphs.gathered[size], graphs, replayed=Replayed(size, logits, own, tail))
        inputs = self.buffers.gather(plan)
        every = self.eager or len(plan.pooled) > 0 or not len(plan.logits_index)  # a module's output may be tapped
        batch = ForwardBatch(num_tokens=plan.num_tokens, wanted=None if every else inputs.rows.logits_index)
        hidden = self.checked_model(inputs.input_ids, inputs.positions, batch)
        pooled = pool(plan, hidden) if len(plan.pooled) else None
        hidden = hidden.index_select(0, inputs.rows.logits_index) if every else hidden
        return Forwarded(plan, inputs, GRAPH_MISSING if size is not None else 0, hidden, pooled=pooled)

    def sample(self, step: Forwarded, supplied: Sequence[SuppliedColumn] = ()) -> LaunchedStep:
        """Draw a token for each sampled row, write it to its slot, and send the step's result to the host."""
        plan, replayed = step.plan, step.replayed
        if replayed is None or replayed.tail is None:
            columns = of_draws(plan, supplied) if supplied else ()
            how = self.finish.choose(plan, columns)
            if not plan.late or replayed is None or not self._ends_masked(replayed, how, columns):
                return self.finish.eager(step, how, columns)
            assert how.captured is not None
            self.graphs.end_masked(replayed.size, how.captured, replayed.own, columns)
        assert replayed is not None
        assert self.graphs.tail is not None
        return TailStep(plan, *self.graphs.tail.answer(), replayed.own, step.graphs | GRAPH_TAIL)

    def _ends_masked(self, replayed: Replayed, how: DrawPlan, supplied: Sequence[SuppliedColumn]) -> bool:
        """Whether a captured tail behind a mask does all that the rows of a late step ask for."""
        few = self.graphs.tail is not None and replayed.size.logits <= MASKED_DRAWS and self.tp.size == 1
        return few and how.captured is not None and all((c.processor, c.column) == how.mask for c in supplied)

    def call(self, target: str, *args: Any) -> Any:
        """Call a function "package.module:function" with this runner and the arguments: rare control, not steps."""
        module, _, name = target.partition(":")
        return getattr(importlib.import_module(module), name)(self, *args)

    def release(self) -> None:
        """Drop everything the device holds, and give it back."""
        release = self._release
        self.__dict__ = {"device": self.device}
        release()
