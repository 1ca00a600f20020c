"""One device's share of a step: inputs -> forward -> sample -> tokens to their slots.

`forward` and `sample` are two calls, so that host inputs (a grammar's mask) may be made while the forward pass runs;
`launch` is both. Slot and count writes are the last act of a step: one that raised can be run again. Nothing here waits
for the device: results travel to the host beside the next step, and `LaunchedStep.wait` is where they are awaited.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from nanoengine.core.execution.attention import AttentionBackend, BatchLimits, GraphSupport
from nanoengine.core.execution.build import BuiltModel, build_model, kv_groups
from nanoengine.core.execution.eager_tail import EagerTail, Forwarded
from nanoengine.core.execution.graphs import graph_sizes
from nanoengine.core.execution.memory import CPU_KV_CACHE_BYTES, MemoryReport, cannot_allocate, count_blocks, gpu_budget
from nanoengine.core.execution.mixed_graphs import MixedGraphs, MixedSize, mixed_sizes, pad_mixed
from nanoengine.core.execution.model import ForwardBatch, Model
from nanoengine.core.execution.parallel import TensorParallelGroup
from nanoengine.core.execution.results import LaunchedStep, TailStep
from nanoengine.core.execution.sampler import Sampler
from nanoengine.core.execution.shortage import empty_cache
from nanoengine.core.execution.slots import SlotLimits, SlotTables
from nanoengine.core.execution.split import Handle, Splitter
from nanoengine.core.execution.stage import StageContext
from nanoengine.core.execution.stages import build_stages
from nanoengine.core.execution.step_graphs import CaptureSizes, StepGraphs
from nanoengine.core.execution.step_inputs import GatheredStep, StepBuffers, decode_plan, padded
from nanoengine.core.execution.weights import dummy_weights, load_weights
from nanoengine.core.setup.choose import load_checked
from nanoengine.core.setup.plan import EnginePlan, TargetLoader
from nanoengine.core.startup import StartClock
from nanoengine.core.step import GRAPH_DECODE, GRAPH_MIXED, GRAPH_TAIL, StageColumn, StepPlan
from nanoengine.kernels.ops import ops_for


class ModelRunner:
    """Builds the model and everything the device holds from an `EnginePlan`, and runs step plans."""

    def __init__(self, plan: EnginePlan, loader: TargetLoader, tp: TensorParallelGroup) -> None:
        self.plan, self.loader, self.tp = plan, loader, tp
        self.device = torch.device(plan.options.device)
        self.dtype: torch.dtype = getattr(torch, plan.options.dtype)
        self.splits_steps = tp.size == 1  # ranks could not agree on the parts
        self._splitter = Splitter(self._launch_whole, partial(empty_cache, self.device))

    def start(self) -> MemoryReport:
        """Model, weights, KV cache and tables.

        Raises `ModelError`, `WeightsError`, `PluginError`, `ConfigError`; then `release` gives back what was made.
        """
        with self._on_device():
            return self._start()

    def _start(self) -> MemoryReport:
        options, self.clock = self.plan.options, StartClock()
        model_class: type[Model] = load_checked(self.loader, self.plan.model, Model)
        ops = ops_for(self.device, fuse=options.fuse_kernels)
        self.fused = ops.name == "triton"
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # makes the context
        self.clock.lap("device")
        built = build_model(model_class, self.plan.hf_config, tp=self.tp, dtype=self.dtype, device=self.device, ops=ops)
        self.model, self.vocab_size = built.model, built.config.vocab_size
        if options.load_format == "dummy":
            dummy_weights(built.model, options.seed, self.tp)
        else:
            load_weights(built.model, built.config, self.plan.model_path, self.tp)
        self.model.eval()
        self.clock.lap("weights")
        self._make_backends(built)
        self._make_tables()
        self.clock.lap("buffers")
        report = self._make_kv_cache(built)
        self.clock.lap("kv cache")
        self.graphs.capture()
        self.clock.lap("capture")
        return replace(report, phases=self.clock.report().phases)

    def _make_backends(self, built: BuiltModel) -> None:
        """One backend a KV group, bound to its layers; still without a cache."""
        self.backend_class: type[AttentionBackend] = load_checked(self.loader, self.plan.attention, AttentionBackend)
        self.groups = kv_groups(built.attention_layers)
        limits = batch_limits(self.plan)
        self.backends = tuple(self.backend_class(spec, limits, self.device) for spec, _ in self.groups)
        for backend, (_, layers) in zip(self.backends, self.groups, strict=True):
            for index, layer in enumerate(layers):
                layer.bind(backend, index)

    def _make_kv_cache(self, built: BuiltModel) -> MemoryReport:
        size = batch_limits(self.plan).block_size
        block_bytes = sum(self.backend_class.kv_block_bytes(spec, size) * len(layers) for spec, layers in self.groups)
        blocks = count_blocks(self.plan.options, block_bytes, self._kv_budget)
        try:
            self._allocate(blocks + 1)
        except (RuntimeError, MemoryError, OverflowError) as error:  # torch's OutOfMemoryError is a RuntimeError
            raise cannot_allocate(blocks, block_bytes * (blocks + 1), size, error) from error
        return MemoryReport(
            num_blocks=blocks,
            num_groups=len(self.groups),
            block_size=size,
            block_bytes=block_bytes,
            kv_cache_bytes=block_bytes * (blocks + 1),
            weight_bytes=sum(p.numel() * p.element_size() for p in built.model.parameters()),
            failed_stages=self.failed_stages,
        )

    def _allocate(self, num_blocks: int) -> None:
        for backend, (_, layers) in zip(self.backends, self.groups, strict=True):
            backend.allocate(len(layers), num_blocks)

    def _kv_budget(self) -> int:
        if self.device.type != "cuda":
            return CPU_KV_CACHE_BYTES
        self._allocate(2)
        reserve = self.graphs.sizes.reserve_bytes(self.vocab_size * self.dtype.itemsize)
        utilization = self.plan.options.gpu_memory_utilization
        budget = gpu_budget(utilization, self.device, self._run_largest_steps, reserve)
        for backend in self.backends:
            backend.release()
        self.clock.lap("profile")
        return budget

    def _run_largest_steps(self) -> None:
        """A prefill that fills the budget, then a draw for every row; all of it in the dummy block."""
        limits = batch_limits(self.plan)
        longest = max(1, min(limits.max_model_len - 1, limits.max_tokens))
        count = min(limits.max_tokens // longest, limits.max_rows)
        slots = np.arange(limits.max_rows, dtype=np.int32)
        prefill = decode_plan(slots[:count], 0)
        lens = np.full(count, longest, dtype=np.int32)
        ends = np.cumsum(lens, dtype=np.int32) - 1
        for plan in (
            replace(prefill, num_decode_rows=0, query_lens=lens, logits_index=ends),
            decode_plan(slots, 0),
        ):
            self._launch_whole(plan).wait()
            self.tables.num_computed.zero_()
            self.tables.num_tokens.zero_()

    def _sampling_kernels(self) -> Any:
        if not (self.fused and self.plan.options.fuse_sampling):
            return None
        from nanoengine.kernels import sampling_triton

        return sampling_triton

    def _make_tables(self) -> None:
        limits, options = batch_limits(self.plan), self.plan.options
        slot_limits = SlotLimits(
            max_slots=options.max_num_seqs,
            max_model_len=limits.max_model_len,
            vocab_size=self.vocab_size,
            num_groups=len(self.groups),
            max_blocks=limits.max_blocks,
        )
        ctx = StageContext(options.max_num_seqs, self.vocab_size, limits.max_model_len, self.device)
        stages = build_stages(self.plan.stages, self.loader, ctx)
        self.failed_stages = stages.failed
        self.tables = SlotTables(slot_limits, [plan for plan, _ in stages.working], self.device, fused=self.fused)
        self.buffers = StepBuffers(limits, len(self.groups), self.device, fused=self.fused)
        self.sampler = Sampler(
            stages.working, self.vocab_size, fuse=options.fuse_sampling, kernels=self._sampling_kernels()
        )
        self.eager_tail = EagerTail(self.model, self.tables, self.sampler, self.tp, self.vocab_size)
        self.graphs = StepGraphs(
            self._capture_sizes(), self.model, self.tables, self.buffers, self.sampler, self._gather
        )

    def _capture_sizes(self) -> CaptureSizes:
        """Which steps may be graphs, with this device, these options and this backend."""
        options, limits, supported = self.plan.options, batch_limits(self.plan), self.backend_class.capabilities.graphs
        if self.device.type != "cuda" or options.enforce_eager or supported < GraphSupport.DECODE:
            return CaptureSizes()
        return CaptureSizes(
            decode=graph_sizes(limits.max_rows),
            mixed=mixed_sizes(limits.max_rows, limits.max_tokens)
            if self.fused and supported >= GraphSupport.ALWAYS
            else (),
            tail=self.fused and options.fuse_sampling and self.tp.size == 1,
        )

    def launch(self, plan: StepPlan) -> Handle:
        """The fused call: forward and sample; in parts, where memory does not hold the step whole."""
        with self._on_device():
            return self._splitter.launch(plan) if self.splits_steps else self._launch_whole(plan)

    def _launch_whole(self, plan: StepPlan) -> LaunchedStep:
        return self.sample(self.forward(plan))

    def _on_device(self) -> AbstractContextManager[object]:
        """Streams, events and kernels of this GPU, whatever the calling thread's current one is."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Forwarded:
        """Apply the plan's writes and run the model, by replaying a graph where one fits."""
        self._apply_writes(plan)
        only_decode = plan.num_decode_rows == plan.num_rows
        decode, mixed = self.graphs.decode, self.graphs.mixed
        if decode is not None and only_decode and (rows := decode.size_for(plan.num_rows)) is not None:
            inputs = self._gather(padded(plan, rows, self.tables.dummy_slot))
            return Forwarded(plan, inputs, None, decode.replay(rows)[: plan.num_rows], rows, GRAPH_DECODE)
        if mixed is not None and (size := mixed.size_for(plan)) is not None:
            return self._replay_mixed(plan, size, mixed)
        inputs = self._gather(plan)
        batch = ForwardBatch(num_tokens=plan.num_tokens, num_decode_rows=plan.num_decode_rows)
        hidden = self.model(inputs.input_ids, inputs.positions, batch)
        return Forwarded(plan, inputs, hidden.index_select(0, inputs.logits_index), None)

    def _replay_mixed(self, plan: StepPlan, size: MixedSize, graphs: MixedGraphs) -> Forwarded:
        """The padded step by its graph."""
        step = pad_mixed(plan, size, self.tables.dummy_slot)
        inputs = self._gather(step.plan, size.tokens)
        return Forwarded(plan, inputs, None, graphs.replay(size), size, GRAPH_MIXED, step.logits_rows)

    def _gather(self, plan: StepPlan, pad_tokens: int = 0) -> GatheredStep:
        inputs = self.buffers.gather(plan, self.tables, pad_tokens)
        for backend, group in zip(self.backends, inputs.groups, strict=True):
            backend.fill(group)
        return inputs

    def _apply_writes(self, plan: StepPlan) -> None:
        self.tables.admit(plan.new)
        self.tables.set_columns(plan.columns)
        self.tables.append_blocks(plan.appends)
        self.tables.flush()
        copies = plan.copies
        for group in np.unique(copies.group):
            here = copies.group == group
            src, dst = (self.tables.put(x[here].astype(np.int64)) for x in (copies.src, copies.dst))
            self.backends[group].copy_blocks(src, dst)

    @torch.inference_mode()
    def sample(self, step: Forwarded, host_inputs: Sequence[StageColumn] = ()) -> LaunchedStep:
        """Draw a token for each sampled row, write it to its slot, and send the step's result to the host."""
        self.tables.set_columns(host_inputs)
        self.tables.flush()
        return self._captured_tail(step) or self.eager_tail.finish(self._own_rows(step))

    def _own_rows(self, step: Forwarded) -> Forwarded:
        """Without the padding that stands between a step's rows."""
        if step.which is None or step.logits is None:
            return step
        which = self.tables.put(step.which)
        inputs = replace(step.inputs, logits_index=step.inputs.logits_index.index_select(0, which))
        return replace(step, inputs=inputs, logits=step.logits.index_select(0, which))

    def _captured_tail(self, step: Forwarded) -> TailStep | None:
        """The rest of a step as a graph, where its rows ask for nothing that the graph lacks."""
        tail, plan = self.graphs.tail, step.plan
        if tail is None or step.graph is None:
            return None
        kind = tail.kind(plan.slots, self.eager_tail.active(plan.slots))
        if kind is None:
            return None
        which = plan.logits_rows.astype(np.int64) if step.which is None else step.which
        return TailStep(plan, tail.replay(step.graph, kind), which, step.replayed | GRAPH_TAIL)

    def release(self) -> None:
        """Drop everything the device holds."""
        for backend in getattr(self, "backends", ()):
            backend.release()
        for name in ("model", "backends", "groups", "tables", "buffers", "sampler", "eager_tail", "graphs"):
            self.__dict__.pop(name, None)


def batch_limits(plan: EnginePlan) -> BatchLimits:
    """The sizes of static buffers, from the plan's filled-in options."""
    options = plan.options
    assert options.max_model_len and options.max_num_batched_tokens and options.block_size
    return BatchLimits(
        max_rows=min(options.max_num_seqs, options.max_num_batched_tokens),
        max_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        block_size=options.block_size,
    )
