"""One device's share of a step: inputs -> forward -> sample -> tokens to their slots.

`forward` and `sample` are two calls, so that host inputs (a grammar's mask) may be made while the forward pass runs;
`execute` is both. Slot and count writes are the last act of a step: one that raised can be run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.core.execution.attention import AttentionBackend, BatchLimits
from nanoengine.core.execution.build import BuiltModel, build_model, kv_groups
from nanoengine.core.execution.memory import MemoryReport, count_blocks
from nanoengine.core.execution.model import ForwardBatch, Model
from nanoengine.core.execution.parallel import TensorParallelGroup
from nanoengine.core.execution.sampler import DrawRows, Sampler
from nanoengine.core.execution.slots import SlotLimits, SlotTables
from nanoengine.core.execution.stage import Need, SamplerStage, StageContext
from nanoengine.core.execution.step_inputs import GatheredStep, StepBuffers
from nanoengine.core.execution.weights import dummy_weights, load_weights
from nanoengine.core.setup.choose import load_checked
from nanoengine.core.setup.plan import EnginePlan, TargetLoader
from nanoengine.core.step import ROW_BAD_LOGITS, ROW_FINE, LogprobRows, StageColumn, StepPlan, StepResult, offsets_of

PROMPT_LOGITS_ROWS = 128  # positions whose [rows, vocabulary] logits exist at once for prompt log-probs

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A step between its two calls. hidden: [L, H], the rows that need logits."""

    plan: StepPlan
    inputs: GatheredStep
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class _Sampled:
    """token_ids, failed: [S] on the device; logprobs of those rows that asked."""

    token_ids: Tensor
    failed: Tensor
    logprobs: LogprobRows


class ModelRunner:
    """Builds the model and everything the device holds from an `EnginePlan`, and runs step plans."""

    def __init__(self, plan: EnginePlan, loader: TargetLoader, tp: TensorParallelGroup) -> None:
        self.plan, self.loader, self.tp = plan, loader, tp
        self.device = torch.device(plan.options.device)
        self.dtype: torch.dtype = getattr(torch, plan.options.dtype)

    def start(self) -> MemoryReport:
        """Model, weights, KV cache and tables. Raises `ModelError`, `WeightsError`, `PluginError`, `ConfigError`."""
        options = self.plan.options
        model_class: type[Model] = load_checked(self.loader, self.plan.model, Model)
        built = build_model(model_class, self.plan.hf_config, tp=self.tp, dtype=self.dtype, device=self.device)
        self.model, self.vocab_size = built.model, built.config.vocab_size
        if options.load_format == "dummy":
            dummy_weights(built.model, options.seed, self.tp)
        else:
            load_weights(built.model, built.config, self.plan.model_path, self.tp)
        self.model.eval()
        report = self._make_kv_cache(built)
        self._make_tables(report)
        return report

    def _make_kv_cache(self, built: BuiltModel) -> MemoryReport:
        backend_class: type[AttentionBackend] = load_checked(self.loader, self.plan.attention, AttentionBackend)
        groups = kv_groups(built.attention_layers)
        options, limits = self.plan.options, batch_limits(self.plan)
        block_bytes = sum(backend_class.kv_block_bytes(spec, limits.block_size) * len(ls) for spec, ls in groups)
        blocks = count_blocks(options, block_bytes, self.device)
        self.backends = tuple(backend_class(spec, limits, self.device) for spec, _ in groups)
        for backend, (_, layers) in zip(self.backends, groups, strict=True):
            backend.allocate(len(layers), blocks + 1)
            for index, layer in enumerate(layers):
                layer.bind(backend, index)
        return MemoryReport(
            num_blocks=blocks,
            num_groups=len(groups),
            block_size=limits.block_size,
            block_bytes=block_bytes,
            kv_cache_bytes=block_bytes * (blocks + 1),
            weight_bytes=sum(p.numel() * p.element_size() for p in built.model.parameters()),
        )

    def _make_tables(self, report: MemoryReport) -> None:
        limits, options = batch_limits(self.plan), self.plan.options
        slot_limits = SlotLimits(
            max_slots=options.max_num_seqs,
            max_model_len=limits.max_model_len,
            vocab_size=self.vocab_size,
            num_groups=report.num_groups,
            max_blocks=limits.max_blocks,
        )
        self.tables = SlotTables(slot_limits, self.plan.stages, self.device)
        self.buffers = StepBuffers(limits, report.num_groups, self.device)
        ctx = StageContext(options.max_num_seqs, self.vocab_size, limits.max_model_len, self.device)
        stages = [(s, load_checked(self.loader, s.target, SamplerStage)(ctx)) for s in self.plan.stages]
        self.sampler = Sampler(stages, self.vocab_size, fuse=options.fuse_sampling)
        self.argmax_invariant = {s.name: stage.argmax_invariant for s, stage in stages}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """The fused call: forward, sample, result on the host."""
        return self.sample(self.forward(plan))

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Forwarded:
        """Apply the plan's writes and run the model; the hidden states of the rows that need logits."""
        self._apply_writes(plan)
        inputs = self.buffers.gather(plan, self.tables)
        for backend, group in zip(self.backends, inputs.groups, strict=True):
            backend.fill(group)
        batch = ForwardBatch(num_tokens=plan.num_tokens, num_decode_rows=plan.num_decode_rows)
        hidden = self.model(inputs.input_ids, inputs.positions, batch)
        return Forwarded(plan, inputs, hidden.index_select(0, inputs.logits_index))

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
    def sample(self, step: Forwarded, host_inputs: Sequence[StageColumn] = ()) -> StepResult:
        """Draw a token for each sampled row, write it to its slot, and bring the step's result to the host."""
        plan = step.plan
        self.tables.set_columns(host_inputs)
        which = np.flatnonzero(plan.sampled)
        rows = plan.logits_rows[which]
        positions = self._token_positions(step, which) + 1
        prompt_logprobs, broken = self._prompt_logprobs(step)
        drawn = self._draw(step, which, positions)
        slots = step.inputs.slots.index_select(0, self.tables.put(rows.astype(np.int64)))
        self.tables.record(slots, positions, drawn.token_ids)
        self.tables.advance(step.inputs.slots, step.inputs.query_lens)
        return _to_result(plan, rows, drawn, prompt_logprobs, broken)

    def _token_positions(self, step: Forwarded, which: Ints) -> Tensor:
        """Absolute positions of the tokens behind the given entries of `logits_index`, int64."""
        index = step.inputs.logits_index.index_select(0, self.tables.put(which))
        return step.inputs.positions.index_select(0, index)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V] float32, gathered over ranks, without the padding columns."""
        return self.tp.all_gather(self.model.compute_logits(hidden))[:, : self.vocab_size].float()

    def _draw(self, step: Forwarded, which: Ints, positions: Tensor) -> _Sampled:
        plan = step.plan
        rows = plan.logits_rows[which].astype(np.int64)
        if not len(rows):
            none = torch.zeros(0, dtype=torch.int64, device=self.device)
            return _Sampled(none, none.int(), LogprobRows())
        host_slots = plan.slots[rows]
        hidden = step.hidden if len(which) == len(step.hidden) else step.hidden[self.tables.put(which)]
        logits = self._logits(hidden)
        asked = np.flatnonzero(self.tables.host_num_logprobs[host_slots] >= 0)
        raw = logits[self.tables.put(asked)] if len(asked) else None
        token_ids, failed = self.sampler.sample(logits, self._draw_rows(host_slots, positions))
        logprobs = LogprobRows()
        if raw is not None:
            put = self.tables.put(asked)
            limits = self.tables.host_num_logprobs[host_slots][asked]
            logprobs = self._logprob_rows(raw, token_ids[put], positions[put], rows[asked], limits)
        return _Sampled(token_ids, failed, logprobs)

    def _draw_rows(self, host_slots: npt.NDArray[np.int32], positions: Tensor) -> DrawRows:
        tables = self.tables
        greedy = tables.host_greedy[host_slots]
        active = tuple(
            name
            for name, wants in tables.host_wants.items()
            if (wants[host_slots] & ~(greedy & self.argmax_invariant[name])).any()
        )
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

    def _logprob_rows(
        self, raw: Tensor, token_ids: Tensor, positions: Tensor, rows: Ints, limits: npt.NDArray[np.int32]
    ) -> LogprobRows:
        """`limits`: int32 [N], how many best ones each row asked for."""
        values, ranks, top_ids, top_values = self.sampler.logprobs(raw, token_ids, int(limits.max()))
        wanted = np.arange(top_ids.shape[1]) < limits[:, None]
        return LogprobRows(
            rows=rows.astype(np.int32),
            positions=positions.cpu().numpy().astype(np.int32),
            token_ids=token_ids.cpu().numpy().astype(np.int32),
            logprobs=values.cpu().numpy(),
            ranks=ranks.cpu().numpy().astype(np.int32),
            top_ids=top_ids.cpu().numpy().astype(np.int32)[wanted],
            top_logprobs=top_values.cpu().numpy()[wanted],
            top_offsets=offsets_of(wanted.sum(axis=1)),
        )

    def _prompt_logprobs(self, step: Forwarded) -> tuple[LogprobRows, frozenset[int]]:
        """Log-probs of the next prompt token at each position that asked, a bounded number of rows at a time; and
        the rows whose logits were not finite."""
        plan, parts, broken = step.plan, [], frozenset[int]()
        asked = np.flatnonzero(~plan.sampled)
        for first in range(0, len(asked), PROMPT_LOGITS_ROWS):
            which = asked[first : first + PROMPT_LOGITS_ROWS]
            rows = plan.logits_rows[which].astype(np.int64)
            positions = self._token_positions(step, which) + 1
            slots = self.tables.put(plan.slots[rows].astype(np.int64))
            targets = self.tables.token_ids[slots, positions].long()
            raw = self._logits(step.hidden[self.tables.put(which)])
            part = self._logprob_rows(raw, targets, positions, rows, plan.prompt_logprobs[which])
            broken |= set(part.rows[np.isnan(part.logprobs)].tolist())
            parts.append(part)
        return _concatenate(parts), broken

    def release(self) -> None:
        """Drop everything the device holds."""
        for backend in getattr(self, "backends", ()):
            backend.release()
        for name in ("model", "backends", "tables", "buffers", "sampler"):
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


def _concatenate(parts: Sequence[LogprobRows]) -> LogprobRows:
    if len(parts) <= 1:
        return parts[0] if parts else LogprobRows()
    joined = {
        name: np.concatenate([getattr(p, name) for p in parts])
        for name in ("rows", "positions", "token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")
    }
    counts = np.concatenate([np.diff(p.top_offsets) for p in parts])
    return LogprobRows(**joined, top_offsets=offsets_of(counts))


def _to_result(
    plan: StepPlan, rows: npt.NDArray[np.int32], drawn: _Sampled, prompt: LogprobRows, broken: frozenset[int]
) -> StepResult:
    """Bring the drawn tokens to the host; a failed row gives none."""
    failed = np.full(plan.num_rows, ROW_FINE, dtype=np.int32)
    failed[rows] = drawn.failed.cpu().numpy()
    failed[list(broken)] = ROW_BAD_LOGITS
    fine = failed[rows] == ROW_FINE
    counts = np.zeros(plan.num_rows, dtype=np.int32)
    counts[rows[fine]] = 1
    return StepResult(
        step=plan.step,
        token_ids=drawn.token_ids.cpu().numpy().astype(np.int32)[fine],
        counts=counts,
        failed=failed,
        sampled_logprobs=drawn.logprobs,
        prompt_logprobs=prompt,
    )
