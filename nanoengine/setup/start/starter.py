"""Starts a runner: model, weights, attention backends, tables, KV cache, graphs. Measures each phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nanoengine.api.attention import AttentionBackend
from nanoengine.api.checks import foreign_methods
from nanoengine.api.drafters import DeviceDrafter
from nanoengine.api.errors import ModelError, NanoEngineError, is_out_of_memory
from nanoengine.api.model import Attention, Model
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.plugin_calls import name_of, plugin_call
from nanoengine.api.processors import ProcessorContext
from nanoengine.api.sources import cache_root
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.core.execution.sampler import Sampler
from nanoengine.core.execution.slots import SlotLimits, SlotTables
from nanoengine.core.execution.step_inputs import StepBuffers
from nanoengine.core.step import num_slots
from nanoengine.kernels.compile_processes import CompileProcesses
from nanoengine.kernels.device import on_device
from nanoengine.kernels.ops import KernelChoice, RealTokens, ops_for
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.engine_plan import EnginePlan
from nanoengine.setup.plugins.choose import load_checked
from nanoengine.setup.plugins.speculation import make_drafter
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.start.backend_checks import dry_run, kv_block_bytes
from nanoengine.setup.start.build_model import (
    BuiltModel,
    build_model,
    kv_groups,
    parameter_bytes,
    quantised_layers,
    weight_bytes,
    weights_freed_on_error,
)
from nanoengine.setup.start.capture import capture_graphs, compile_ahead
from nanoengine.setup.start.choose_quantization import choose_methods, skipped_by
from nanoengine.setup.start.clock import Dequantised, StartClock
from nanoengine.setup.start.graph_sizes import capture_sizes, reserve_bytes
from nanoengine.setup.start.largest_steps import largest_steps
from nanoengine.setup.start.memory import (
    CPU_KV_CACHE_BYTES,
    GpuShare,
    MemoryReport,
    batch_limits,
    cannot_allocate,
    count_blocks,
    peak_bytes,
    weights_misfit,
)
from nanoengine.setup.start.processors import build_processors
from nanoengine.setup.start.profile_notes import ProfileNotes, notes_path
from nanoengine.setup.start.quantization import packed_format
from nanoengine.setup.start.release import free_unused, release, release_caches
from nanoengine.setup.start.shortage import with_less
from nanoengine.setup.start.weights import dummy_weights, load_weights


def start_runner(
    plan: EnginePlan,
    loader: TargetLoader,
    tp: TensorParallelGroup,
    clock: StartClock | None = None,
    *,
    processes: CompileProcesses | None = None,
) -> tuple[ModelRunner, MemoryReport]:
    """A runner with model, weights, KV cache and tables, and the report of its memory. `clock` measures the phases.
    processes: which compile kernels, beside threads of this one.

    If memory is too small for the steps that the options allow, the runner is made for smaller ones, and the report has
    their numbers. Nothing stays allocated if this raises an error.

    Raises `ModelError`, `WeightsError`, `PluginError`, `DeviceMemoryError`, `ConfigError`.
    """
    with on_device(torch.device(plan.options.device)):
        return _Start(plan, loader, tp, clock or StartClock(), processes).run()


class _Start:
    """One start of a runner. `layers` and `backends` are those of the current attempt."""

    def __init__(
        self,
        plan: EnginePlan,
        loader: TargetLoader,
        tp: TensorParallelGroup,
        clock: StartClock,
        processes: CompileProcesses | None,
    ) -> None:
        self.processes = processes
        self.plan, self.asked, self.loader, self.tp, self.clock = plan, plan.options, loader, tp, clock
        self.device = torch.device(plan.options.device)
        self.dtype: torch.dtype = getattr(torch, plan.options.dtype)
        self.drafts = plan.speculation.tokens if plan.speculation else 0  # of a row, at the most
        self.dequantised: Dequantised | None = None
        self.layers: Sequence[Sequence[Attention]] = ()
        self.backends: Sequence[AttentionBackend] = ()

    def run(self) -> tuple[ModelRunner, MemoryReport]:
        options = self.plan.options
        model_class: type[Model] = load_checked(self.loader, self.plan.model, Model)
        self.choice = KernelChoice.of(options.kernels)
        ops = ops_for(
            self.device, fuse=options.fuse_kernels, attends_qkv=options.fuse_attention, products=options.fuse_products,
            kernels=self.choice, cache=cache_root(),
        )  # fmt: skip
        self.fused = ops.name == "triton"
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # creates the context
            self.share = GpuShare.at_start(self.device, options.gpu_memory_utilization)
        self.clock.lap("device")
        place: dict[str, Any] = {
            "tp": self.tp, "dtype": self.dtype, "device": self.device, "ops": ops,
            "max_model_len": options.max_model_len, "expert_parallel": options.enable_expert_parallel,
            "kv_dtype": options.kv_dtype, "choose": choose_methods(self.plan.quantization, self.loader, options),
        }  # fmt: skip
        try:
            built = self._make_model(model_class, place)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            needed = weight_bytes(model_class, self.plan.hf_config, **place)
            raise weights_misfit(needed, self.device, error) from error
        self.clock.lap("weights")
        try:
            if self.tp.size > 1:  # ranks could choose different sizes
                return self._make_state(built, options)
            return with_less(options, partial(self._make_state, built), self._undo)
        except BaseException:
            self._undo()
            raise

    def _make_model(self, model_class: type[Model], place: dict[str, Any]) -> BuiltModel:
        built = build_model(model_class, self.plan.hf_config, **place)
        what, passing = f"{name_of(model_class)}: loading its weights failed", (NanoEngineError, OSError)
        others = foreign_methods(built.model)
        with (
            weights_freed_on_error([built.model]),
            plugin_call(what, model_class, ModelError, passing=passing, others=others),
        ):
            if self.plan.options.load_format == "dummy":
                dummy_weights(built.model, self.plan.options.seed, self.tp)
            else:
                packed = packed_format(self.plan.hf_config) if self.plan.quantization is None else None
                skip = skipped_by(place["choose"])
                loaded = load_weights(built.model, built.config, self.plan.model_path, self.tp, packed, skip)
                self.dequantised = loaded.dequantised
            built.model.eval()
        if self.tp.size > 1:
            built.model.register_forward_pre_hook(lambda *_: self.tp.begin_forward())
        return built

    def _make_state(self, built: BuiltModel, options: EngineOptions) -> tuple[ModelRunner, MemoryReport]:
        """Makes everything except the model: what depends on the limits of a batch."""
        self.plan = replace(self.plan, options=options)
        path = notes_path(self.plan, self.device)
        notes = ProfileNotes.read(path)
        self.notes = notes if self.tp.minimum(int(notes is not None)) else None  # ranks run the same steps
        self._make_backends(built)
        runner = self._make_runner(built)
        self.clock.lap("buffers")
        report = self._make_kv_cache(built, runner)
        self.clock.lap("kv cache")
        compiled = self.notes is not None or self._compiled
        failure = capture_graphs(runner, later=self._later, is_compiled=compiled, processes=self.processes)
        if self.notes is None and not failure and runner.graphs.used:
            self._peaks.write(path)
        self.clock.lap("capture")
        if not runner.graphs.used and self._measured == (0, 0):  # else the model has run
            dry_run(runner.launch, runner.tables)
        given_up = options.enforce_eager and not self.asked.enforce_eager
        eager = "memory ran out while graphs were captured" if given_up else failure
        return runner, replace(report, eager_reason=eager, phases=self.clock.report().phases)

    @property
    def _later(self) -> bool:
        """Whether most graphs are captured when they are wanted. Ranks would wait for each other in a step."""
        return self.plan.options.lazy_graphs and self.tp.size == 1

    def _undo(self) -> None:
        """Gives back all that is not the model's or a runner's."""
        release_caches(self.layers, self.backends)
        self.layers = self.backends = ()
        free_unused(self.device)

    def _make_backends(self, built: BuiltModel) -> None:
        """Makes a backend for each KV group and binds it to its layers. The KV cache is made later."""
        self.backend_class: type[AttentionBackend] = load_checked(self.loader, self.plan.attention, AttentionBackend)
        groups, limits = kv_groups(built.attention_layers), batch_limits(self.plan.options)
        self.specs, self.layers = [spec for spec, _ in groups], [layers for _, layers in groups]
        with plugin_call(f"{name_of(self.backend_class)}.__init__ failed", self.backend_class):
            self.backends = tuple(self.backend_class(spec, limits, self.device) for spec in self.specs)
        for backend, layers in zip(self.backends, self.layers, strict=True):
            for index, layer in enumerate(layers):
                layer.bind(backend, index)

    def _make_runner(self, built: BuiltModel) -> ModelRunner:
        limits, options, vocab_size = batch_limits(self.plan.options), self.plan.options, built.config.vocab_size
        slot_limits = SlotLimits(
            max_slots=num_slots(options.max_num_seqs, options.spare_slots),
            max_model_len=limits.max_model_len,
            vocab_size=vocab_size,
            num_groups=len(self.layers),
            max_blocks=limits.max_blocks,
        )
        ctx = ProcessorContext(slot_limits.max_slots, vocab_size, limits.max_model_len, self.device)
        processors = build_processors(self.plan.processors, self.loader, ctx)
        self.failed_processors = processors.failed
        tables = SlotTables(slot_limits, [plan for plan, _ in processors.working], self.device, fused=self.fused)
        buffers = StepBuffers(limits, tables, self.backends)
        built.step.real = RealTokens(buffers.out.slot_mapping[0], limits.block_size)
        kernels = self.choice if self.fused and options.fuse_sampling else None
        sampler = Sampler(processors.working, vocab_size, fuse=options.fuse_sampling, kernels=kernels)
        capabilities, fused = self.backend_class.capabilities, self.fused
        sizes = capture_sizes(options, limits, capabilities, fused=fused, tail=fused, drafts=self.drafts)
        return ModelRunner(
            device=self.device,
            tp=self.tp,
            model=built.model,
            config=built.config,
            backends=self.backends,
            buffers=buffers,
            sampler=sampler,
            sizes=sizes,
            drafter=self._make_drafter(slot_limits),
            release=self._undo,
        )

    def _make_drafter(self, limits: SlotLimits) -> DeviceDrafter | None:
        """Each rank's own; a host drafter is the scheduler's."""
        plan = self.plan.speculation
        if plan is None or not plan.device:
            return None
        made = make_drafter(
            plan,
            self.loader,
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_model_len,
            max_slots=limits.max_slots,
            device=str(self.device),
        )
        assert isinstance(made, DeviceDrafter)
        return made

    def _make_kv_cache(self, built: BuiltModel, runner: ModelRunner) -> MemoryReport:
        options, limits = self.plan.options, batch_limits(self.plan.options)
        size, pairs = limits.block_size, list(zip(self.specs, self.layers, strict=True))
        block_bytes = sum(kv_block_bytes(self.backend_class, spec, size) * len(layers) for spec, layers in pairs)
        self._measured, self._peaks, self._compiled = (0, 0), ProfileNotes(0, 0, 0), False
        budget = partial(self._kv_budget, block_bytes, runner)
        blocks = self.tp.minimum(count_blocks(options, block_bytes, budget))
        try:
            self._allocate(blocks + 1)
        except (RuntimeError, MemoryError, OverflowError) as error:  # torch's OutOfMemoryError is a RuntimeError
            given = options.num_gpu_blocks_override is not None or options.kv_cache_memory is not None
            if is_out_of_memory(error) and not given:
                raise
            raise cannot_allocate(blocks, block_bytes * (blocks + 1), size, error) from error
        return MemoryReport(
            num_blocks=blocks,
            num_groups=len(self.layers),
            block_size=size,
            block_bytes=block_bytes,
            kv_cache_bytes=block_bytes * (blocks + 1),
            weight_bytes=parameter_bytes(built.model),
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens or 0,
            step_bytes=self._measured[0],
            graph_bytes=self._measured[1],
            failed_processors=self.failed_processors,
            dequantised=self.dequantised,
            quantised=quantised_layers(built.model),
        )

    def _allocate(self, num_blocks: int) -> None:
        if num_blocks >= 1 << 31:
            raise OverflowError("the number of a block is an int32")
        passing = (NanoEngineError, RuntimeError, OverflowError)  # torch's, where sizes are too large
        with plugin_call(f"{name_of(self.backend_class)}.allocate failed", self.backend_class, passing=passing):
            for backend, layers in zip(self.backends, self.layers, strict=True):
                backend.allocate(len(layers), num_blocks)

    def _kv_budget(self, block_bytes: int, runner: ModelRunner) -> int:
        """Bytes for the KV cache. On a GPU, runs the largest steps, and returns what they and graphs leave free."""
        if self.device.type != "cuda":
            return CPU_KV_CACHE_BYTES
        limits = batch_limits(self.plan.options)
        found = self.notes if self.notes is not None and self.notes.prefill else self._measure(runner)
        self._peaks = found
        prefill, sampling, later = found.prefill, found.sampling, found.kept if found is self.notes else 0
        row, token = runner.tables.limits.vocab_size * self.dtype.itemsize, -(-prefill // limits.max_tokens)
        self._measured = (max(prefill, sampling), reserve_bytes(runner.graphs.sizes, row, token))
        self.clock.lap("profile")
        return self.share.kv_budget(block_bytes, *self._measured) - later

    def _measure(self, runner: ModelRunner) -> ProfileNotes:
        """Runs the largest steps, with a cache of two blocks."""
        free = self.share.left()
        self._allocate(2)
        options = self.plan.options
        draws = not (self.fused and options.fuse_sampling)  # the kernels need almost no memory, and would be compiled
        peaks = largest_steps(
            runner.launch, runner.tables, runner.sampler, batch_limits(options), draws=draws,
            max_logprobs=options.max_logprobs, drafts=self.drafts,
        )  # fmt: skip
        compile_ahead(runner, later=self._later, largest=peaks[0], processes=self.processes)
        self._compiled = True
        prefill, sampling = (peak_bytes(self.device, run) for run in peaks)
        for backend in self.backends:
            release(backend)
        return ProfileNotes(prefill, sampling, max(0, free - self.share.left()))
