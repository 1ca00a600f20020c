"""The graphs of one runner: decode steps, their tails, mixed steps; which there are to be, and their capture."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nanoengine.api.attention import BatchLimits, GraphSupport
from nanoengine.api.checks import CheckedModel
from nanoengine.api.errors import ModelError, described, is_failure, is_out_of_memory
from nanoengine.api.model import ForwardBatch
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.core.execution.finish_step import DecodeTail
from nanoengine.core.execution.graphs import DecodeGraphs, MixedGraphs, graph_sizes, mixed_sizes
from nanoengine.core.execution.sampler import Sampler
from nanoengine.core.execution.slots import SlotTables
from nanoengine.core.execution.start_report import CaptureOutOfMemory
from nanoengine.core.execution.step_inputs import (
    PREFILL_ROWS,
    GatheredStep,
    GraphInputs,
    MixedSize,
    RowInputs,
    Size,
    StepBuffers,
    decode_plan,
)
from nanoengine.core.options import EngineOptions
from nanoengine.core.step import StepPlan
from nanoengine.kernels.compile_ahead import compiling_ahead

_log = logging.getLogger(__name__)
GRAPH_RESERVE_BYTES = 256 << 20  # what graphs hold besides logits and activations


@dataclass(frozen=True, slots=True)
class CaptureSizes:
    """decode: padded numbers of rows. mixed: padded mixed steps. tail: whether sampling is captured too. inputs:
    whether a graph gathers its own inputs; mixed ones must."""

    decode: tuple[int, ...] = ()
    mixed: tuple[MixedSize, ...] = ()
    tail: bool = False
    inputs: bool = False

    def reserve_bytes(self, row_bytes: int, token_bytes: int) -> int:
        """What the graphs will hold, where a row of logits takes `row_bytes` and the model `token_bytes` a token.

        Each graph keeps its logits; those of one kind share a memory pool, as large as the largest needs.
        """
        rows = sum(self.decode) + sum(size.rows for size in self.mixed)
        tokens = max(self.decode, default=0) + max((size.tokens for size in self.mixed), default=0)
        return rows * row_bytes + tokens * token_bytes + (GRAPH_RESERVE_BYTES if self.decode else 0)


def capture_sizes(
    options: EngineOptions, limits: BatchLimits, supported: GraphSupport, *, fused: bool, tail: bool
) -> CaptureSizes:
    """Which steps are to be graphs, with these options and what the attention backend supports.

    `fused`: inputs are gathered by kernels that can pad tokens. `tail`: sampling can be captured.
    """
    if torch.device(options.device).type != "cuda" or options.enforce_eager or supported < GraphSupport.DECODE:
        return CaptureSizes()
    inputs = fused and supported >= GraphSupport.ALWAYS
    return CaptureSizes(
        decode=graph_sizes(limits.max_rows),
        mixed=mixed_sizes(limits.max_rows, limits.max_tokens) if inputs and options.graph_mixed_steps else (),
        inputs=inputs,
        tail=tail and options.fuse_sampling,
    )


class StepGraphs:
    """decode, tail, mixed: None until captured, and for good where a capture fails: `failure` is why, in words."""

    def __init__(
        self,
        sizes: CaptureSizes,
        model: CheckedModel,
        tables: SlotTables,
        buffers: StepBuffers,
        sampler: Sampler,
        tp: TensorParallelGroup,
        gather: Callable[[StepPlan], GatheredStep],
        fill: Callable[[GatheredStep], None],
    ) -> None:
        """`gather(plan)`: fill the static buffers for a step, as an eager launch does; `fill`: its second half, which
        hands them to the attention backends."""
        self.sizes, self._model, self._tables, self._buffers = sizes, model, tables, buffers
        self._sampler, self._tp, self._gather, self._fill = sampler, tp, gather, fill
        self._inputs = GraphInputs(buffers, tables) if sizes.inputs else None
        self._gathered: dict[Size, GatheredStep] = {}
        self.decode: DecodeGraphs | None = None
        self.tail: DecodeTail | None = None
        self.mixed: MixedGraphs | None = None
        self.failure = ""

    def capture(self) -> None:
        """All of them, or none: a capture that fails leaves every step eager (said once).

        Raises `CaptureOutOfMemory`: smaller steps may have graphs.
        """
        if not self.sizes.decode:
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
            self.decode = self.tail = self.mixed = None
            self.failure = described(error)
            if is_out_of_memory(error):
                raise CaptureOutOfMemory(f"CUDA graph capture failed: {self.failure}") from error
            _log.warning("CUDA graph capture failed, running eagerly: %s", self.failure)
            if self._tables.device.type == "cuda":
                torch.cuda.synchronize(self._tables.device)
        self._tables.num_computed.zero_()
        self._tables.num_tokens.zero_()

    def _compile_ahead(self) -> None:
        """Everything that is to be captured, as a rehearsal: its kernels compile beside each other.

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
        self.decode = self.tail = self.mixed = None
        torch.cuda.empty_cache()

    def _capture(self) -> None:
        decode = DecodeGraphs(self.sizes.decode, self._decode_pass, self._tp.agree)
        if self.sizes.mixed:
            self.mixed = MixedGraphs(self.sizes.mixed, self._mixed_pass, self._tp.agree)
        if self.sizes.tail:
            tables, buffers = self._tables, self._buffers
            self.tail = DecodeTail(self._sampler, tables, buffers, self._rows_of, self._tp, self._tp.agree)
            if self._inputs is not None:
                self._inputs.blank()
            self.tail.capture(decode.logits | (self.mixed.logits if self.mixed is not None else {}))
        self.decode = decode

    def prepare(self, plan: StepPlan, size: Size) -> GatheredStep:
        """Give a padded plan, and the writes that wait, to the graph of `size`, which is to be replayed next."""
        if self._inputs is None:
            self._tables.flush()
            return self._gather(plan)
        self._inputs.send(plan, mixed=not isinstance(size, int))
        return self._gathered[size]

    def _rows_of(self, size: Size) -> RowInputs:
        if self._inputs is not None:
            return self._inputs.rows(size if isinstance(size, int) else size.rows, mixed=not isinstance(size, int))
        assert isinstance(size, int), "mixed graphs gather their own inputs"
        start_loc = self._buffers.decode_start_loc
        return RowInputs(self._buffers.slots[:size], start_loc[: size + 1], None, start_loc[:size])

    def _inputs_pass(self, plan: StepPlan, size: Size, tokens: int, longest: int) -> GatheredStep:
        """The step's inputs: gathered in the graph, or else in front of it."""
        in_front = not torch.cuda.is_current_stream_capturing()
        if self._inputs is None:
            if in_front:
                self._gathered[size] = self._gather(plan)
            return self._gathered[size]
        mixed = not isinstance(size, int)
        if in_front:
            self._inputs.send(plan, mixed=mixed)
        self._gathered[size] = inputs = self._inputs.run(plan, tokens, longest, mixed=mixed)
        self._fill(inputs)
        return inputs

    def _decode_pass(self, rows: int) -> Tensor:
        """Forward pass and output layer over `rows` rows of the static buffers, as a graph captures them."""
        slots = np.full(rows, self._tables.dummy_slot, dtype=np.int32)
        inputs = self._inputs_pass(decode_plan(slots, self._last_position), rows, rows, 1)
        batch = ForwardBatch(num_tokens=rows, num_decode_rows=rows)
        hidden = self._model(inputs.input_ids, inputs.positions, batch)
        return self._model.compute_logits(hidden)

    def _mixed_pass(self, size: MixedSize) -> Tensor:
        """As `_decode_pass`, with prefill rows behind the decode rows; logits of each row's last token."""
        lens = np.concatenate((np.ones(size.decode, np.int32), np.zeros(PREFILL_ROWS, np.int32)))
        slots = np.full(size.rows, self._tables.dummy_slot, dtype=np.int32)
        plan = decode_plan(slots, self._last_position)
        plan = replace(plan, num_decode_rows=size.decode, query_lens=lens, logits_index=np.zeros_like(slots))
        inputs = self._inputs_pass(plan, size, size.tokens, size.prefill)
        batch = ForwardBatch(num_tokens=size.tokens, num_decode_rows=size.decode)
        hidden = self._model(inputs.input_ids, inputs.positions, batch)
        wanted = hidden.index_select(0, inputs.logits_index)
        return self._model.compute_logits(wanted)

    @property
    def _last_position(self) -> int:
        limits: BatchLimits = self._buffers.limits
        return limits.max_model_len - 1
