"""CUDA graphs of steps: what one runs, which of them fits a step, and its replay. `setup/start/capture.py` makes them.

A decode step is one graph, tail included (`finish_step.py`); mixed steps, and those with drafts, have a second one for
it. Where no captured tail serves the rows, a graph ends at the logits. All input is in static buffers, which eager
steps use too. What is padded: decode rows of the dummy slot, prefill rows without a token, and tokens behind the last
row, whose K and V go to the dummy block. Mixed steps that fit none run eagerly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoengine.api.checks import CheckedModel
from nanoengine.api.model import ForwardBatch
from nanoengine.core.execution.finish_step import CapturedTail
from nanoengine.core.execution.step_inputs import GatheredStep, StepBuffers, StepSize
from nanoengine.core.step import Int64, StepPlan, SuppliedColumn


@dataclass(frozen=True, slots=True)
class CaptureSizes:
    """sizes: padded steps. tail: whether sampling is captured too. inputs: whether a graph gathers its own inputs;
    those of mixed steps must."""

    sizes: tuple[StepSize, ...] = ()
    tail: bool = False
    inputs: bool = False


class StepGraphs:
    """The graphs of one runner. Empty where every step runs eagerly.

    Attributes:
        sizes: steps that are to have graphs. passes: size and kind of tail -> graph; None: without the tail.
        capture: makes such a graph, at the start or when it is first wanted. False: not now, and others may be gone.
        masked_tails: size and kind -> graph of a tail behind a mask. `capture_masked` makes it when it is first wanted;
            None: not now.
        tail: what the graphs of tails run; None: they were not captured.
        gathered: of each size in use its inputs. logits: [rows, V / tp] of a pass, valid until its next replay.
    """

    def __init__(self, sizes: CaptureSizes, model: CheckedModel, buffers: StepBuffers) -> None:
        self.sizes, self._model, self.buffers = sizes, model, buffers
        self.clear()

    def clear(self) -> None:
        """Drop all graphs."""
        self.passes: dict[tuple[StepSize, int | None], torch.cuda.CUDAGraph] = {}
        self.capture: Callable[[StepSize, int | None], bool] = lambda size, tail: False
        self.capture_masked: Callable[[StepSize, int], torch.cuda.CUDAGraph | None] = lambda size, tail: None
        self.masked_tails: dict[tuple[StepSize, int], torch.cuda.CUDAGraph] = {}
        self.tail: CapturedTail | None = None
        self.gathered: dict[StepSize, GatheredStep] = {}
        self.logits: dict[StepSize, Tensor] = {}
        self.use(())

    def use(self, sizes: Collection[StepSize]) -> None:
        """From here on steps find these sizes."""
        self.used = sizes
        self._decode_rows = sorted({size.decode_rows for size in sizes if size.plain})
        others = sorted((size for size in sizes if not size.plain), key=lambda s: (s.tokens, s))
        self._with_drafts = [size for size in others if size.query_len > 1]
        self._mixed = [size for size in others if size.prefill_tokens]

    def run(self, size: StepSize) -> Tensor:
        """Inputs, forward pass and output layer over the static buffers, as a graph captures them: logits of each row's
        last token, or of all, [size.logits, V / tp]. What the host sends, or gathers for the graph, is not captured."""
        plan = self.buffers.blank_plan(size)
        if not torch.cuda.is_current_stream_capturing():
            self.prepare(plan, size)
        if self.sizes.inputs:
            self.gathered[size] = self.buffers.gather_in_graph(plan, size)
        inputs = self.gathered[size]
        wanted = None if size.logits == size.tokens else inputs.rows.logits_index
        batch = ForwardBatch(num_tokens=size.tokens, wanted=wanted)
        return self._model.compute_logits(self._model(inputs.input_ids, inputs.positions, batch))

    def run_tail(self, size: StepSize, tail: int) -> None:
        """What the graph of that kind of tail captures: a whole decode step, or the tail of another."""
        assert self.tail is not None
        logits = self.logits[size] if self._first(size, tail) is None else self.run(size)
        self.logits.setdefault(size, logits)  # until the pass without a tail has its own
        self.tail.run(self.gathered[size].rows, tail, logits, size.query_len - 1)

    def run_masked_tail(self, size: StepSize, tail: int) -> None:
        """The tail behind a mask, over the logits that the graph of the step left: what its own graph captures."""
        assert self.tail is not None
        self.tail.run(self.gathered[size].rows, tail, self.logits[size], size.query_len - 1, masked=True)

    def end_masked(self, size: StepSize, tail: int, own: Int64, supplied: Sequence[SuppliedColumn]) -> None:
        """The tail of a late step that was replayed without one. own, supplied: as in `CapturedTail.write_mask`."""
        assert self.tail is not None
        self.tail.write_mask(size.logits, own, supplied)
        self.tail.send_mask(size.logits)
        graph = self.masked_tails.get((size, tail)) or self.capture_masked(size, tail)
        if graph is not None:
            self.masked_tails[size, tail] = graph
            graph.replay()
        else:
            self.run_masked_tail(size, tail)

    def size_for(self, plan: StepPlan) -> StepSize | None:
        """The smallest size in use that holds `plan`; None where there is none, or it wants prompt log-probs, or sums
        of hidden states."""
        decode, prefill = plan.num_decode_rows, plan.num_tokens - plan.num_decode_rows
        if len(plan.drafts):
            longest = plan.query_lens.max()
            fits = (s for s in self._with_drafts if s.decode_rows >= decode and s.query_len >= longest)
            return next(fits, None) if decode == plan.num_rows else None
        if not prefill:
            at = bisect_left(self._decode_rows, decode)
            return StepSize(self._decode_rows[at]) if at < len(self._decode_rows) else None
        if len(plan.pooled) or not plan.sampled.all():
            return None
        rows = plan.num_rows - decode
        fits = (s for s in self._mixed if s.prefill_tokens >= prefill and s.decode_rows >= decode)
        return next((s for s in fits if s.prefill_rows >= rows), None)

    def ready(self, size: StepSize, tail: int | None) -> bool:
        """Whether the graphs of that step and tail are there, or could be captured now."""
        keys = (size, self._first(size, tail)), (size, tail)
        return all(key in self.passes or self.capture(*key) for key in keys)

    def _first(self, size: StepSize, tail: int | None) -> int | None:
        """The tail that is in the graph of the step itself."""
        return tail if size.plain and self.sizes.inputs else None

    def prepare(self, plan: StepPlan, size: StepSize) -> None:
        """Give a padded plan, and the pending writes, to the graph of `size`, which is to be replayed next."""
        if self.sizes.inputs:
            self.buffers.send(plan, np.flatnonzero(plan.sampled))
        else:
            self.gathered[size] = self.buffers.gather(plan)

    def replay(self, size: StepSize, tail: int | None = None) -> Tensor:
        """The step, and perhaps its tail; without one the logits, valid until the next replay."""
        first = self._first(size, tail)
        self.passes[size, first].replay()
        self.buffers.tables.buffer.clear_pending()  # only now: a launch may raise between `prepare` and here
        if first != tail:
            self.passes[size, tail].replay()
        return self.logits[size]
