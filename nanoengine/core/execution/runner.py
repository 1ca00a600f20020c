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

import numpy as np
import torch

from nanoengine.api.attention import AttentionBackend
from nanoengine.api.checks import CheckedModel
from nanoengine.api.errors import ModelError, NanoEngineError, is_out_of_memory
from nanoengine.api.model import Attention, ForwardBatch, Model
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.plugin_calls import name_of, plugin_call, plugin_step
from nanoengine.api.processors import StageContext
from nanoengine.core.execution.finish_step import FinishStep, Forwarded
from nanoengine.core.execution.graphs import StepGraphs, capture_sizes
from nanoengine.core.execution.results import LaunchedStep, TailStep
from nanoengine.core.execution.sampler import Sampler
from nanoengine.core.execution.slots import SlotLimits, SlotTables
from nanoengine.core.execution.split import Handle, Splitter, slots_move
from nanoengine.core.execution.start_report import MemoryReport, empty_cache, free_unused
from nanoengine.core.execution.step_inputs import GatheredStep, StepBuffers, pad
from nanoengine.core.options import EngineOptions, EnginePlan
from nanoengine.core.step import GRAPH_DECODE, GRAPH_MIXED, GRAPH_TAIL, StageColumn, StepPlan, num_slots
from nanoengine.kernels.ops import Ops, ops_for
from nanoengine.observe.taps import Listener, Tap, unknown_module
from nanoengine.setup.plugins.choose import load_checked
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.start.backend_checks import dry_run, kv_block_bytes, release
from nanoengine.setup.start.build_model import BuiltModel, build_model, kv_groups, parameter_bytes, weight_bytes
from nanoengine.setup.start.clock import StartClock
from nanoengine.setup.start.largest_steps import largest_steps
from nanoengine.setup.start.memory import (
    CPU_KV_CACHE_BYTES,
    GpuShare,
    batch_limits,
    cannot_allocate,
    count_blocks,
    peak_bytes,
    weights_misfit,
)
from nanoengine.setup.start.shortage import with_less
from nanoengine.setup.start.stages import build_stages
from nanoengine.setup.start.weights import dummy_weights, load_weights


class ModelRunner:
    """Builds the model and everything the device holds from an `EnginePlan`, and runs step plans."""

    def __init__(self, plan: EnginePlan, loader: TargetLoader, tp: TensorParallelGroup) -> None:
        self.plan, self.asked, self.loader, self.tp = plan, plan.options, loader, tp
        self.device = torch.device(plan.options.device)
        self.dtype: torch.dtype = getattr(torch, plan.options.dtype)
        self.splits_steps = tp.size == 1  # ranks could not agree on the parts
        self._splitter = Splitter(self._launch_whole, partial(empty_cache, self.device))
        self._listener: Listener | None = None

    def start(self, clock: StartClock | None = None) -> MemoryReport:
        """Model, weights, KV cache and tables. `clock` gets the phases.

        Where memory does not hold the steps that the options allow, smaller ones are what is served: the report tells.
        Raises `ModelError`, `WeightsError`, `PluginError`, `DeviceMemoryError`, `ConfigError`; then `release` gives
        back what was made.
        """
        with self._on_device():
            return self._start(clock or StartClock())

    def _start(self, clock: StartClock) -> MemoryReport:
        options, self.clock = self.plan.options, clock
        model_class: type[Model] = load_checked(self.loader, self.plan.model, Model)
        ops = ops_for(self.device, fuse=options.fuse_kernels)
        self.fused = ops.name == "triton"
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # makes the context
            self.share = GpuShare.at_start(self.device, options.gpu_memory_utilization)
        self.clock.lap("device")
        try:
            built = self._make_model(model_class, ops)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            needed = weight_bytes(model_class, self.plan.hf_config, self.tp, self.dtype)
            raise weights_misfit(needed, self.device, error) from error
        self.clock.lap("weights")
        if self.tp.size > 1:  # ranks could not agree on less
            return self._make_state(built, options)
        return with_less(options, partial(self._make_state, built), self._drop_state)

    def _make_model(self, model_class: type[Model], ops: Ops) -> BuiltModel:
        built = build_model(model_class, self.plan.hf_config, tp=self.tp, dtype=self.dtype, device=self.device, ops=ops)
        self.model, self.config, self.vocab_size = built.model, built.config, built.config.vocab_size
        what, passing = f"{name_of(model_class)}: loading its weights failed", (NanoEngineError, OSError)
        with plugin_call(what, model_class, ModelError, passing=passing):
            if self.plan.options.load_format == "dummy":
                dummy_weights(built.model, self.plan.options.seed, self.tp)
            else:
                load_weights(built.model, built.config, self.plan.model_path, self.tp)
            self.model.eval()
        if self.tp.size > 1:
            self.model.register_forward_pre_hook(lambda *_: self.tp.begin_forward())
        return built

    def _make_state(self, built: BuiltModel, options: EngineOptions) -> MemoryReport:
        """Everything beside the model: what is sized by the limits of a batch."""
        self.plan = replace(self.plan, options=options)
        self._make_backends(built)
        self._make_tables()
        self.clock.lap("buffers")
        report = self._make_kv_cache(built)
        self.clock.lap("kv cache")
        self.graphs.capture()
        self.clock.lap("capture")
        if not self.graphs.logits and self._measured == (0, 0):  # else the model has run
            dry_run(self._launch_whole, self.tables, self._layers())
        given_up = options.enforce_eager and not self.asked.enforce_eager
        eager = "memory ran out while graphs were captured" if given_up else self.graphs.failure
        return replace(report, eager_because=eager, phases=self.clock.report().phases)

    def _make_backends(self, built: BuiltModel) -> None:
        """One backend a KV group, bound to its layers; still without a cache."""
        self.backend_class: type[AttentionBackend] = load_checked(self.loader, self.plan.attention, AttentionBackend)
        self.groups = kv_groups(built.attention_layers)
        limits = batch_limits(self.plan.options)
        with plugin_call(f"{name_of(self.backend_class)}.__init__ failed", self.backend_class):
            self.backends = tuple(self.backend_class(spec, limits, self.device) for spec, _ in self.groups)
        for layer, backend, index in self._layers():
            layer.bind(backend, index)

    def _layers(self) -> list[tuple[Attention, AttentionBackend, int]]:
        """Each attention layer, its backend, its index there."""
        pairs = zip(self.backends, self.groups, strict=True)
        return [(layer, backend, index) for backend, (_, layers) in pairs for index, layer in enumerate(layers)]

    def _make_kv_cache(self, built: BuiltModel) -> MemoryReport:
        options, limits = self.plan.options, batch_limits(self.plan.options)
        size = limits.block_size
        block_bytes = sum(kv_block_bytes(self.backend_class, spec, size) * len(layers) for spec, layers in self.groups)
        self._measured = (0, 0)
        blocks = self.tp.minimum(count_blocks(options, block_bytes, partial(self._kv_budget, block_bytes)))
        try:
            self._allocate(blocks + 1)
        except (RuntimeError, MemoryError, OverflowError) as error:  # torch's OutOfMemoryError is a RuntimeError
            given = options.num_gpu_blocks_override is not None or options.kv_cache_memory is not None
            if is_out_of_memory(error) and not given:
                raise
            raise cannot_allocate(blocks, block_bytes * (blocks + 1), size, error) from error
        return MemoryReport(
            num_blocks=blocks,
            num_groups=len(self.groups),
            block_size=size,
            block_bytes=block_bytes,
            kv_cache_bytes=block_bytes * (blocks + 1),
            weight_bytes=parameter_bytes(built.model),
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=limits.max_tokens,
            step_bytes=self._measured[0],
            graph_bytes=self._measured[1],
            failed_stages=self.failed_stages,
        )

    def _allocate(self, num_blocks: int) -> None:
        if num_blocks >= 1 << 31:
            raise OverflowError("the number of a block is an int32")
        passing = (NanoEngineError, RuntimeError, OverflowError)  # torch's, where sizes are too large
        with plugin_call(f"{name_of(self.backend_class)}.allocate failed", self.backend_class, passing=passing):
            for backend, (_, layers) in zip(self.backends, self.groups, strict=True):
                backend.allocate(len(layers), num_blocks)

    def _kv_budget(self, block_bytes: int) -> int:
        """Bytes for the KV cache: on a GPU what the largest steps, which are run, and graphs leave of its share."""
        if self.device.type != "cuda":
            return CPU_KV_CACHE_BYTES
        self._allocate(2)
        limits = batch_limits(self.plan.options)
        draws = not self._draws_by_kernels  # the kernels need hardly any memory, and compile for what is drawn
        peaks = largest_steps(self._launch_whole, self.tables, self.sampler, limits, draws=draws)
        prefill, sampling = (peak_bytes(self.device, run) for run in peaks)
        for backend in self.backends:
            release(backend)
        row, token = self.vocab_size * self.dtype.itemsize, -(-prefill // limits.max_tokens)
        self._measured = (max(prefill, sampling), self.graphs.sizes.reserve_bytes(row, token))
        self.clock.lap("profile")
        return self.share.kv_budget(block_bytes, *self._measured)

    @property
    def _draws_by_kernels(self) -> bool:
        return self.fused and self.plan.options.fuse_sampling

    def _make_tables(self) -> None:
        limits, options = batch_limits(self.plan.options), self.plan.options
        slot_limits = SlotLimits(
            max_slots=num_slots(options.max_num_seqs, options.spare_slots),
            max_model_len=limits.max_model_len,
            vocab_size=self.vocab_size,
            num_groups=len(self.groups),
            max_blocks=limits.max_blocks,
        )
        ctx = StageContext(slot_limits.max_slots, self.vocab_size, limits.max_model_len, self.device)
        stages = build_stages(self.plan.stages, self.loader, ctx)
        self.failed_stages = stages.failed
        self.tables = SlotTables(slot_limits, [plan for plan, _ in stages.working], self.device, fused=self.fused)
        self.buffers = StepBuffers(limits, len(self.groups), self.device, fused=self.fused)
        self.sampler = Sampler(
            stages.working, self.vocab_size, fuse=options.fuse_sampling, kernels=self._draws_by_kernels
        )
        checked = CheckedModel(self.model, self.config, self.tp, self.backend_class)
        self.checked_model = checked
        self.finish = FinishStep(checked, self.tables, self.sampler, self.tp, self.vocab_size)
        supported = self.backend_class.capabilities.graphs
        sizes = capture_sizes(options, limits, supported, fused=self.fused, tail=self.fused)
        self.graphs = StepGraphs(
            sizes, checked, self.tables, self.buffers, self.sampler, self.tp, self._gather, self._fill
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
        """Apply the plan's writes (a graph does so itself) and run the model, by replaying a graph where one fits."""
        self._apply_writes(plan)
        size = None if self._listener else self.graphs.size_for(plan)  # a replay calls no module
        if size is not None:
            step = pad(plan, size, self.tables.dummy_slot)
            inputs, ran = self.graphs.prepare(step.plan, size), GRAPH_MIXED if size.prefill_tokens else GRAPH_DECODE
            return Forwarded(plan, inputs, None, self.graphs.replay(size), size, ran, step.logits_rows)
        self.tables.flush()
        inputs = self._gather(plan)
        batch = ForwardBatch(num_tokens=plan.num_tokens, num_decode_rows=plan.num_decode_rows)
        hidden = self.checked_model(inputs.input_ids, inputs.positions, batch)
        return Forwarded(plan, inputs, hidden.index_select(0, inputs.logits_index), None)

    def _gather(self, plan: StepPlan) -> GatheredStep:
        inputs = self.buffers.gather(plan, self.tables)
        self._fill(inputs)
        return inputs

    def _fill(self, inputs: GatheredStep) -> None:
        with plugin_step(f"{name_of(self.backend_class)}.fill", self.backend_class):
            for backend, group in zip(self.backends, inputs.groups, strict=True):
                backend.fill(group)

    def _apply_writes(self, plan: StepPlan) -> None:
        self.tables.admit(plan.new)
        self.tables.set_columns(plan.columns)
        self.tables.append_blocks(plan.appends)
        copies = plan.copies
        if not len(copies.group):
            return
        for group in np.unique(copies.group):
            here = copies.group == group
            src, dst = (self.tables.put(x[here].astype(np.int64)) for x in (copies.src, copies.dst))
            self.backends[group].copy_blocks(src, dst)

    @torch.inference_mode()
    def sample(self, step: Forwarded, host_inputs: Sequence[StageColumn] = ()) -> LaunchedStep:
        """Draw a token for each sampled row, write it to its slot, and send the step's result to the host."""
        self.tables.set_columns(host_inputs)
        self.tables.flush()
        return self._captured_tail(step) or self.finish.eager(step)

    def _captured_tail(self, step: Forwarded) -> TailStep | None:
        """The rest of a step as a graph, where its rows ask for nothing that the graph lacks."""
        if step.graph is None or step.which is None or not self.graphs.has_tail(step.graph):
            return None
        kind = self.finish.kind(step.plan.slots)
        if kind is None:
            return None
        with slots_move():
            drawn = self.graphs.replay_tail(step.graph, kind)
            return TailStep(step.plan, drawn, step.which, step.replayed | GRAPH_TAIL)

    def listen(self, modules: Sequence[str]) -> str:
        """From here on copy what passes through these modules; else say which of them is not there."""
        unknown = unknown_module(self.model, modules)
        self._listener = None if unknown else Listener(self.model, modules)
        return unknown

    def heard(self) -> dict[str, Tap]:
        """What was copied since `listen`, which ends."""
        listener, self._listener = self._listener, None
        return {} if listener is None else listener.end()

    def release(self) -> None:
        """Drop everything the device holds, and give it back."""
        self.__dict__.pop("model", None)
        self._drop_state()

    def _drop_state(self) -> None:
        """All but the model."""
        for backend in getattr(self, "backends", ()):
            release(backend)
        for _, layers in getattr(self, "groups", ()):
            for layer in layers:
                layer.unbind()
        for name in ("backends", "groups", "tables", "buffers", "sampler", "finish", "graphs", "checked_model"):
            self.__dict__.pop(name, None)
        free_unused(self.device)
