"""Slots, columns and histories as the runner keeps them, in miniature."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoengine.api.processors import LogitsProcessor, ProcessorContext, ProcessorRows, RaggedColumn
from nanoengine.api.specs import SamplerSpec
from nanoengine.core.execution.sampler import DrawPlan, DrawRows, Sampler
from nanoengine.params.engine_plan import ProcessorPlan
from nanoengine.params.resolver import ParamsResolver, ResolvedParams
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.plugins.samplers import register_samplers
from nanoengine.setup.plugins.targets import TargetLoader

BUILT_IN = {spec.name: spec for spec in register_samplers()}
MAX_LEN = 32


@dataclass
class Context:
    """Bytes are tokens, modulo the vocabulary; a leading space melts with the letter behind it."""

    vocab_size: int = 256
    max_model_len: int = MAX_LEN

    def encode(self, text: str) -> list[int]:
        if text.startswith(" ") and len(text) > 1:
            return [(ord(text[1]) + 7) % self.vocab_size, *(ord(c) % self.vocab_size for c in text[2:])]
        return [ord(c) % self.vocab_size for c in text]


@functools.cache
def resolver(
    vocab: int, specs: tuple[SamplerSpec, ...] = tuple(BUILT_IN.values()), eos: tuple[int, ...] = ()
) -> ParamsResolver:
    return ParamsResolver([(s.name, s.params) for s in specs], Context(vocab), frozenset(eos))


def load_processor(spec: SamplerSpec, vocab: int) -> LogitsProcessor:
    ctx = ProcessorContext(max_slots=8, vocab_size=vocab, max_model_len=MAX_LEN, device=torch.device("cpu"))
    return TargetLoader().load(spec.target)(ctx)


def plan_of(spec: SamplerSpec) -> ProcessorPlan:
    return ProcessorPlan(name=spec.name, target=spec.target, columns=spec.params.columns)


def make_sampler(vocab: int, *, fuse: bool, specs: Sequence[SamplerSpec] = tuple(BUILT_IN.values())) -> Sampler:
    return Sampler([(plan_of(spec), load_processor(spec, vocab)) for spec in specs], vocab, fuse=fuse)


@dataclass(frozen=True, kw_only=True)
class Batch(DrawRows):
    """Rows, and what of them want: as the runner's tables know it on the host."""

    wanted: Mapping[str, bool]
    any_min_tokens: bool
    any_random: bool

    def plan(self, sampler: Sampler) -> DrawPlan:
        return sampler.choose(self.wanted, random=self.any_random, min_tokens=self.any_min_tokens)


def draw(sampler: Sampler, logits: Tensor, rows: Batch) -> tuple[Tensor, Tensor]:
    """Token and failure of each row; the logits may be overwritten."""
    return sampler.sample(logits, rows, rows.plan(sampler))


@dataclass
class Tenant:
    """One request: its parameters and its tokens."""

    params: ResolvedParams
    prompt: list[int] = field(default_factory=lambda: [0])
    output: list[int] = field(default_factory=list)
    seed: int = 0
    sample_index: int = 0


class Tables:
    """Slots that requests enter and leave. Padding of ragged rows is junk on purpose: it must be inert."""

    def __init__(self, vocab: int, specs: Sequence[SamplerSpec] = tuple(BUILT_IN.values()), slots: int = 12) -> None:
        self.vocab, self.specs, self.count = vocab, specs, slots
        self.columns = {s.name: {c: self._default(spec) for c, spec in s.params.columns.items()} for s in specs}
        self.tenants: dict[int, Tenant] = {}
        self.token_ids = torch.full((slots, MAX_LEN + 1), vocab - 1, dtype=torch.int32)

    def _default(self, spec: Any) -> list[np.ndarray]:
        empty = np.zeros(0, dtype=spec.dtype) if spec.ragged else np.asarray(spec.default, dtype=spec.dtype)
        return [empty] * self.count

    def enter(self, slot: int, tenant: Tenant) -> None:
        self.tenants[slot] = tenant
        tokens = tenant.prompt + tenant.output
        self.token_ids[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        packed = {processor.name: processor.columns for processor in tenant.params.processors}
        for spec in self.specs:
            self.write(slot, spec, packed.get(spec.name))

    def write(self, slot: int, spec: SamplerSpec, packed: Mapping[str, np.ndarray] | None) -> None:
        for name, column in spec.params.columns.items():
            self.columns[spec.name][name][slot] = self._default(column)[0] if packed is None else packed[name]

    def gather(self, processor: str, slots: Sequence[int]) -> dict[str, Tensor | RaggedColumn]:
        spec = next(s for s in self.specs if s.name == processor)
        out: dict[str, Tensor | RaggedColumn] = {}
        for name, column in spec.params.columns.items():
            rows = [self.columns[processor][name][slot] for slot in slots]
            out[name] = self._ragged(rows) if column.ragged else torch.from_numpy(np.stack(rows))
        return out

    def _ragged(self, rows: Sequence[np.ndarray]) -> RaggedColumn:
        width = max(1, *(len(r) for r in rows)) + 1
        junk = np.arange(width) % min(2, self.vocab)
        values = np.stack([np.concatenate([r, junk[len(r) :]]).astype(r.dtype) for r in rows])
        counts = np.array([len(r) for r in rows], dtype=np.int32)
        return RaggedColumn(torch.from_numpy(values), torch.from_numpy(counts))

    def _counts(self, tokens: list[list[int]]) -> Tensor:
        counts = [np.bincount(np.array(t, dtype=np.int64), minlength=self.vocab) for t in tokens]
        return torch.tensor(np.stack(counts), dtype=torch.int32)

    def rows(self, slots: Sequence[int]) -> Batch:
        """What the runner would hand to the sampler for these slots, in this order."""
        tenants = [self.tenants[s] for s in slots]
        wanted: dict[str, bool] = {}
        for t in tenants:
            for processor in t.params.processors:
                wanted[processor.name] = wanted.get(processor.name, False) or not t.params.greedy
        stop = self._ragged([np.array(sorted(t.params.stop_set), dtype=np.int64) for t in tenants])
        positions = [len(t.prompt) + len(t.output) for t in tenants]
        min_lens = [len(t.prompt) + t.params.min_tokens for t in tenants]
        return Batch(
            slots=torch.tensor(slots),
            positions=torch.tensor(positions),
            prompt_lens=torch.tensor([len(t.prompt) for t in tenants]),
            seeds=torch.tensor([t.seed for t in tenants]),
            sample_index=torch.tensor([t.sample_index for t in tenants]),
            greedy=torch.tensor([t.params.greedy for t in tenants]),
            min_lens=torch.tensor(min_lens),
            stop_ids=stop,
            wanted=wanted,
            columns={name: self.gather(name, slots) for name in wanted},
            any_min_tokens=any(t.params.min_tokens for t in tenants),
            any_random=not all(t.params.greedy for t in tenants),
            output_counts=self._counts([t.output for t in tenants]),
            prompt_mask=self._counts([t.prompt for t in tenants]) > 0,
            token_ids=self.token_ids,
        )

    def processor_rows(self, processor: str, slots: Sequence[int]) -> ProcessorRows:
        rows = self.rows(slots)
        return ProcessorRows(
            slots=rows.slots,
            positions=rows.positions,
            prompt_lens=rows.prompt_lens,
            vocab_start=0,
            vocab_size=self.vocab,
            columns=self.gather(processor, slots),
            output_counts=rows.output_counts,
            prompt_mask=rows.prompt_mask,
            token_ids=rows.token_ids,
        )


class ShiftedTables(Tables):
    """A mutant: each row gets its neighbour's columns."""

    def gather(self, processor: str, slots: Sequence[int]) -> dict[str, Tensor | RaggedColumn]:
        return super().gather(processor, [*slots[1:], slots[0]])


class StaleTables(Tables):
    """A mutant: a request that does not want a processor inherits what the slot's last tenant left."""

    def write(self, slot: int, spec: SamplerSpec, packed: Mapping[str, np.ndarray] | None) -> None:
        if packed is not None:
            super().write(slot, spec, packed)


def tenant(
    vocab: int, prompt: Sequence[int] = (0,), output: Sequence[int] = (), seed: int = 0, **params: Any
) -> Tenant:
    return Tenant(resolver(vocab).resolve(SamplingParams(**params)), list(prompt), list(output), seed)


def rows_of(vocab: int, tenants: Sequence[Tenant], specs: Sequence[SamplerSpec] = tuple(BUILT_IN.values())) -> Batch:
    """Tenants in slots of their own, in reverse, so that slot and row never agree by chance."""
    tables = Tables(vocab, specs, slots=len(tenants) + 1)
    slots = list(range(len(tenants), 0, -1))
    for slot, t in zip(slots, tenants, strict=True):
        tables.enter(slot, t)
    return tables.rows(slots)


def subset(rows: Batch, index: Sequence[int]) -> Batch:
    """Some of the rows, as a batch of their own."""
    pick = torch.tensor(index)

    def take(value: Any) -> Any:
        return RaggedColumn(value.values[pick], value.counts[pick]) if isinstance(value, RaggedColumn) else value[pick]

    names = ("slots", "positions", "prompt_lens", "seeds", "sample_index", "greedy", "min_lens", "stop_ids")
    changes = {name: take(getattr(rows, name)) for name in names}
    for name in ("output_counts", "prompt_mask"):
        changes[name] = take(getattr(rows, name))
    columns = {s: {c: take(v) for c, v in cs.items()} for s, cs in rows.columns.items()}
    return replace(rows, **changes, columns=columns)
