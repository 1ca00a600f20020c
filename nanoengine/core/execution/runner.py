"""One device's share of a step: inputs -> forward -> sample -> tokens to their slots.

`forward` and `sample` are two calls, so that host inputs (a grammar's mask) may be made while the forward pass runs;
`launch` is both. Slot and count writes are the last act of a step: one that raised can be run again. Nothing here waits
for the device: results travel to the host beside the next step, and `LaunchedStep.wait` is where they are awaited.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.core.execution.attention import AttentionBackend, BatchLimits, GraphSupport
from nanoengine.core.execution.build import BuiltModel, build_model, kv_groups
from nanoengine.core.execution.decode_tail import DecodeTail
from nanoengine.core.execution.graphs import DecodeGraphs, graph_sizes
from nanoengine.core.execution.memory import CPU_KV_CACHE_BYTES, MemoryReport, cannot_allocate, count_blocks, gpu_budget
from nanoengine.core.execution.mixed_graphs import PREFILL_ROWS, MixedGraphs, MixedSize, mixed_sizes, pad_mixed
from nanoengine.core.execution.model import ForwardBatch, Model
from nanoengine.core.execution.parallel import TensorParallelGroup
from nanoengine.core.execution.results import LaunchedStep, PendingLogprobs
from nanoengine.core.execution.sampler import DrawRows, Sampler
from nanoengine.core.execution.slots import SlotLimits, SlotTables
from nanoengine.core.execution.stage import Need, StageContext
from nanoengine.core.execution.stages import build_stages
from nanoengine.core.execution.step_inputs import GatheredStep, StepBuffers, decode_plan, padded
from nanoengine.core.execution.weights import dummy_weights, load_weights
from nanoengine.core.setup.choose import load_checked
from nanoengine.core.setup.plan import EnginePlan, TargetLoader
from nanoengine.core.step import StageColumn, StepPlan
from nanoengine.kernels.ops import ops_for

_log = logging.getLogger(__name__)
GRAPH_RESERVE_BYTES = 256 << 20  # what graphs hold besides their logits
PROMPT_LOGITS_ROWS = 128  # positions whose [rows, vocabulary] logits exist at once for prompt log-probs

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A step between its two calls. hidden: [L, H], the rows that need logits; or already logits: [L, V/tp], by
    the graph of that many rows."""

    plan: StepPlan
    inputs: GatheredStep
    hidden: Tensor | None
    logits: Tensor | None
    graph: int | None = None


@dataclass(frozen=True, slots=True)
class _Sampled:
    """token_ids, failed: [S] on the device; logprobs of those rows that asked."""

    token_ids: Tensor
    failed: Tensor
    logprobs: tuple[PendingLogprobs, ...] = ()


class ModelRunner:
    """Builds the model and everything the device holds from an `EnginePlan`, and runs step plans."""

    def __init__(self, plan: EnginePlan, loader: TargetLoader, tp: TensorParallelGroup) -> None:
        self.plan, self.loader, self.tp = plan, loader, tp
        self.device = torch.device(plan.options.device)
        self.dtype: torch.dtype = getattr(torch, plan.options.dtype)
        self.graphs: DecodeGraphs | None = None
        self.tail: DecodeTail | None = None
        self.mixed: MixedGraphs | None = None

    def start(self) -> MemoryReport:
        """Model, weights, KV cache and tables.

        Raises `ModelError`, `WeightsError`, `PluginError`, `ConfigError`; then `release` gives back what was made.
        """
        with self._on_device():
            return self._start()

    def _start(self) -> MemoryReport:
        options = self.plan.options
        model_class: type[Model] = load_checked(self.loader, self.plan.model, Model)
        ops = ops_for(self.device, fuse=options.fuse_kernels)
        self.fused = ops.name == "triton"
        built = build_model(model_class, self.plan.hf_config, tp=self.tp, dtype=self.dtype, device=self.device, ops=ops)
        self.model, self.vocab_size = built.model, built.config.vocab_size
        if options.load_format == "dummy":
            dummy_weights(built.model, options.seed, self.tp)
        else:
            load_weights(built.model, built.config, self.plan.model_path, self.tp)
        self.model.eval()
        self._make_backends(built)
        self._make_tables()
        report = self._make_kv_cache(built)
        self._capture()
        return report

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
        utilization, reserve = self.plan.options.gpu_memory_utilization, self._graph_bytes()
        budget = gpu_budget(utilization, self.device, self._run_largest_steps, reserve)
        for backend in self.backends:
            backend.release()
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
            self.launch(plan).wait()
            self.tables.num_computed.zero_()
            self.tables.num_tokens.zero_()

    def _graph_sizes(self) -> tuple[int, ...]:
        supported = self.backend_class.capabilities.graphs >= GraphSupport.DECODE
        if self.device.type != "cuda" or self.plan.options.enforce_eager or not supported:
            return ()
        return graph_sizes(batch_limits(self.plan).max_rows)

    def _mixed_sizes(self) -> tuple[MixedSize, ...]:
        always = self.backend_class.capabilities.graphs >= GraphSupport.ALWAYS
        if not (self._graph_sizes() and self.fused and always):
            return ()
        limits = batch_limits(self.plan)
        return mixed_sizes(limits.max_rows, limits.max_tokens)

    def _graph_bytes(self) -> int:
        sizes = self._graph_sizes()
        rows = sum(sizes) + sum(size.rows for size in self._mixed_sizes())
        return rows * self.vocab_size * self.dtype.itemsize + (GRAPH_RESERVE_BYTES if sizes else 0)

    def _capture(self) -> None:
        """Graphs of the decode step; none where they are off, unsupported, or fail (said once)."""
        sizes = self._graph_sizes()
        if not sizes:
            return
        try:
            with torch.inference_mode():
                graphs = DecodeGraphs(sizes, self._decode_pass)
                if self.fused and self.plan.options.fuse_sampling and self.tp.size == 1:
                    tail = DecodeTail(self.sampler, self.tables, self.buffers)
                    tail.capture(graphs.logits)
                    self.tail = tail
                    self.mixed = MixedGraphs(self._mixed_sizes(), self._mixed_pass) if self._mixed_sizes() else None
                self.graphs = graphs
        except Exception as error:  # noqa: BLE001 - a driver's or a compiler's; running eagerly is right all the same
            _log.warning("CUDA graph capture failed, running eagerly: %s: %s", type(error).__name__, error)
            torch.cuda.synchronize(self.device)
        self.tables.num_computed.zero_()
        self.tables.num_tokens.zero_()

    def _decode_pass(self, rows: int) -> Tensor:
        """Forward pass and output layer over `rows` rows of the static buffers, as a graph captures them."""
        if not torch.cuda.is_current_stream_capturing():
            slots = np.full(rows, self.tables.dummy_slot, dtype=np.int32)
            self._gather(decode_plan(slots, batch_limits(self.plan).max_model_len - 1))
        batch = ForwardBatch(num_tokens=rows, num_decode_rows=rows)
        hidden = self.model(self.buffers.input_ids[:rows], self.buffers.positions[:rows], batch)
        logits: Tensor = self.model.compute_logits(hidden)
        return logits

    def _sampling_kernels(self) -> Any:
        if not (self.fused and self.plan.options.fuse_sampling):
            return None
        from nanoengine.kernels import sampling_triton

        return sampling_triton

    def _mixed_pass(self, size: MixedSize) -> Tensor:
        """As `_decode_pass`, with prefill rows behind the decode rows; logits of each row's last token."""
        if not torch.cuda.is_current_stream_capturing():
            lens = np.concatenate((np.ones(size.decode, np.int32), np.zeros(PREFILL_ROWS, np.int32)))
            slots = np.full(size.rows, self.tables.dummy_slot, dtype=np.int32)
            plan = decode_plan(slots, batch_limits(self.plan).max_model_len - 1)
            plan = replace(plan, num_decode_rows=size.decode, query_lens=lens, logits_index=np.zeros_like(slots))
            self._gather(plan, size.tokens)
        batch = ForwardBatch(num_tokens=size.tokens, num_decode_rows=size.decode)
        hidden = self.model(self.buffers.input_ids[: size.tokens], self.buffers.positions[: size.tokens], batch)
        wanted = hidden.index_select(0, self.buffers.logits_index[: size.rows])
        logits: Tensor = self.model.compute_logits(wanted)
        return logits

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
        self.tables = SlotTables(slot_limits, [plan for plan, _ in stages.working], self.device)
        self.buffers = StepBuffers(limits, len(self.groups), self.device, fused=self.fused)
        self.sampler = Sampler(
            stages.working, self.vocab_size, fuse=options.fuse_sampling, kernels=self._sampling_kernels()
        )
        self.argmax_invariant = {plan.name: stage.argmax_invariant for plan, stage in stages.working}

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """The fused call: forward and sample."""
        with self._on_device():
            return self.sample(self.forward(plan))

    def _on_device(self) -> AbstractContextManager[object]:
        """Streams, events and kernels of this GPU, whatever the calling thread's current one is."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Forwarded:
        """Apply the plan's writes and run the model, by replaying a graph where one fits."""
        self._apply_writes(plan)
        only_decode = plan.num_decode_rows == plan.num_rows
        size = self.graphs.size_for(plan.num_rows) if self.graphs is not None and only_decode else None
        if self.graphs is not None and size is not None:
            inputs = self._gather(padded(plan, size, self.tables.dummy_slot))
            return Forwarded(plan, inputs, None, self.graphs.replay(size)[: plan.num_rows], size)
        mixed = self.mixed.size_for(plan) if self.mixed is not None else None
        if self.mixed is not None and mixed is not None:
            return self._replay_mixed(plan, mixed, self.mixed)
        inputs = self._gather(plan)
        batch = ForwardBatch(num_tokens=plan.num_tokens, num_decode_rows=plan.num_decode_rows)
        hidden = self.model(inputs.input_ids, inputs.positions, batch)
        return Forwarded(plan, inputs, hidden.index_select(0, inputs.logits_index), None)

    def _replay_mixed(self, plan: StepPlan, size: MixedSize, graphs: MixedGraphs) -> Forwarded:
        """The padded step by its graph; what comes back is the plan's own rows and logits."""
        step = pad_mixed(plan, size, self.tables.dummy_slot)
        inputs = self._gather(step.plan, size.tokens)
        logits = graphs.replay(size)
        packed = self.tables.put(np.concatenate((step.real_rows, step.logits_rows)))
        rows, wanted = packed[: plan.num_rows], packed[plan.num_rows :]
        own = replace(
            inputs,
            slots=inputs.slots.index_select(0, rows),
            query_lens=inputs.query_lens.index_select(0, rows),
            logits_index=inputs.logits_index.index_select(0, wanted),
        )
        return Forwarded(plan, own, None, logits.index_select(0, wanted))

    def _gather(self, plan: StepPlan, pad_tokens: int = 0) -> GatheredStep:
        inputs = self.buffers.gather(plan, self.tables, pad_tokens)
        for backend, group in zip(self.backends, inputs.groups, strict=True):
            backend.fill(group)
        return inputs

    def _apply_writes(self, plan: StepPlan) -> None:
        self.tables.admit(plan.new)
        self.tables.set_columns(plan.columns)
        self.tables.append_blocks(plan.appends)
        copies = plan.copies
        for group in np.unique(copies.group):
            here = copies.group == group
            src, dst = (self.tables.put(x[here].astype(np.int64)) for x in (copies.src, copies.dst))
            self.backends[group].copy_blocks(src, dst)

    @torch.inference_mode()
    def sample(self, step: Forwarded, host_inputs: Sequence[StageColumn] = ()) -> LaunchedStep:
        """Draw a token for each sampled row, write it to its slot, and send the step's result to the host."""
        plan = step.plan
        self.tables.set_columns(host_inputs)
        captured = self._captured_tail(step)
        if captured is not None:
            return captured
        which = np.flatnonzero(plan.sampled)
        rows = plan.logits_rows[which]
        positions = self._token_positions(step, which) + 1
        prompt_logprobs = self._prompt_logprobs(step)
        drawn = self._draw(step, which, positions)
        slots = step.inputs.slots.index_select(0, self.tables.put(rows.astype(np.int64)))
        self.tables.record(slots, positions, drawn.token_ids)
        real = plan.num_rows  # a graph's padding stands behind
        self.tables.advance(step.inputs.slots[:real], step.inputs.query_lens[:real])
        return LaunchedStep(plan, rows, drawn.token_ids, drawn.failed, drawn.logprobs, prompt_logprobs)

    def _captured_tail(self, step: Forwarded) -> LaunchedStep | None:
        """The rest of a decode step as a graph, where its rows ask for nothing that the graph lacks."""
        if self.tail is None or step.graph is None:
            return None
        plan = step.plan
        kind = self.tail.kind(plan.slots, self._active(plan.slots))
        if kind is None:
            return None
        result, rows = self.tail.replay(step.graph, kind), plan.num_rows
        return LaunchedStep(plan, plan.logits_rows, result.token_ids[:rows], result.failed[:rows], (), ())

    def _active(self, host_slots: npt.NDArray[np.int32]) -> frozenset[str]:
        """Stages that some row wants, but those that cannot change what only greedy rows take."""
        greedy = self.tables.host_greedy[host_slots]
        return frozenset(
            name
            for name, wants in self.tables.host_wants.items()
            if (wants[host_slots] & ~(greedy & self.argmax_invariant[name])).any()
        )

    def _token_positions(self, step: Forwarded, which: Ints) -> Tensor:
        """Absolute positions of the tokens behind the given entries of `logits_index`, int64."""
        index = step.inputs.logits_index.index_select(0, self.tables.put(which))
        return step.inputs.positions.index_select(0, index)

    def _logits(self, step: Forwarded, which: Ints) -> Tensor:
        """Logits of entries of `logits_index`: [R, V], gathered over ranks, without the padding columns."""
        if step.logits is None:
            assert step.hidden is not None
            every = len(which) == len(step.hidden)
            logits = self.model.compute_logits(step.hidden if every else step.hidden[self.tables.put(which)])
        else:
            logits = step.logits
        return self.tp.all_gather(logits)[:, : self.vocab_size]

    def _draw(self, step: Forwarded, which: Ints, positions: Tensor) -> _Sampled:
        plan = step.plan
        rows = plan.logits_rows[which].astype(np.int64)
        if not len(rows):
            none = torch.zeros(0, dtype=torch.int64, device=self.device)
            return _Sampled(none, none.int())
        host_slots = plan.slots[rows]
        logits = self._logits(step, which)
        draw_rows = self._draw_rows(host_slots, positions)
        asked = np.flatnonzero(self.tables.host_num_logprobs[host_slots] >= 0)
        if len(asked) or not self.sampler.takes_any_dtype(draw_rows):
            logits = logits.float()
        raw = logits[self.tables.put(asked)] if len(asked) else None
        token_ids, failed = self.sampler.sample(logits, draw_rows)
        if raw is None:
            return _Sampled(token_ids, failed)
        put = self.tables.put(asked)
        limits = self.tables.host_num_logprobs[host_slots][asked]
        logprobs = self._logprobs(raw, token_ids[put], positions[put], rows[asked], limits)
        return _Sampled(token_ids, failed, (logprobs,))

    def _draw_rows(self, host_slots: npt.NDArray[np.int32], positions: Tensor) -> DrawRows:
        tables = self.tables
        greedy = tables.host_greedy[host_slots]
        active = tuple(sorted(self._active(host_slots)))
        needs = frozenset().union(*(self.sampler.needs_of(name) for name in active))
        slots = tables.put(host_slots.astype(np.int64))

        def history(need: Need) -> Tensor | None:
            return tables.history(need).index_select(0, slots) if need in needs else None

        return DrawRows(
            slots=slots,
            positions=positions,
            prompt_lens=tables.prompt_lens.index_select(0, slots),
            seeds=tables.seeds.index_select(0, slots),
            sample_index=tables.sample_index.index_select(0, slots),
            greedy=tables.greedy.index_select(0, slots),
            min_lens=tables.min_lens.index_select(0, slots),
            stop_ids=tables.stop_ids.gather(slots),
            active=active,
            columns={s: {c: t.gather(slots) for c, t in tables.columns[s].items()} for s in active},
            any_min_tokens=bool(tables.host_min_tokens[host_slots].any()),
            any_random=not bool(greedy.all()),
            output_counts=history(Need.OUTPUT_COUNTS),
            prompt_mask=history(Need.PROMPT_MASK),
            token_ids=tables.token_ids if Need.TOKEN_IDS in needs else None,
        )

    def _logprobs(
        self, raw: Tensor, token_ids: Tensor, positions: Tensor, rows: Ints, limits: npt.NDArray[np.int32]
    ) -> PendingLogprobs:
        """`limits`: int32 [N], how many best ones each row asked for."""
        values, ranks, top_ids, top_values = self.sampler.logprobs(raw, token_ids, int(limits.max()))
        return PendingLogprobs(rows, limits, positions, token_ids, values, ranks, top_ids, top_values)

    def _prompt_logprobs(self, step: Forwarded) -> tuple[PendingLogprobs, ...]:
        """Log-probs of the next prompt token at each position that asked, a bounded number of rows at a time."""
        plan, parts = step.plan, []
        asked = np.flatnonzero(~plan.sampled)
        for first in range(0, len(asked), PROMPT_LOGITS_ROWS):
            which = asked[first : first + PROMPT_LOGITS_ROWS]
            rows = plan.logits_rows[which].astype(np.int64)
            positions = self._token_positions(step, which) + 1
            slots = self.tables.put(plan.slots[rows].astype(np.int64))
            targets = self.tables.token_ids[slots, positions].long()
            raw = self._logits(step, which).float()
            parts.append(self._logprobs(raw, targets, positions, rows, plan.prompt_logprobs[which]))
        return tuple(parts)

    def release(self) -> None:
        """Drop everything the device holds."""
        for backend in getattr(self, "backends", ()):
            backend.release()
        for name in ("model", "backends", "groups", "tables", "buffers", "sampler", "graphs", "tail", "mixed"):
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
