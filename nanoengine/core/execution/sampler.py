"""Applies the logits processors in order and draws the token. One row of logits a drawn token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanoengine.api.parallel import TensorParallelGroup, vocab_slice
from nanoengine.api.processor_checks import checked_logits
from nanoengine.api.processor_params import Phase, StandardOp
from nanoengine.api.processors import LogitsProcessor, Need, ProcessorRows, RaggedColumn
from nanoengine.core.step import ROW_BAD_LOGITS, ROW_FINE, ROW_NOTHING_LEFT
from nanoengine.kernels import all_reduce, bitmask, choice, sampling
from nanoengine.kernels.draw import DrawColumns, draw_tokens
from nanoengine.params.engine_plan import ProcessorPlan

_TRUNCATION_ORDER = (StandardOp.TOP_K, StandardOp.TOP_P, StandardOp.MIN_P)
_ORDER = (StandardOp.TEMPERATURE, *_TRUNCATION_ORDER)  # of the operations that are part of the draw


@dataclass(frozen=True, slots=True)
class _Processor:
    """A processor in its place.

    Attributes:
        where: its name and origin, for errors.
        ops: columns with a standard operation of the draw. standard: it does nothing beyond those.
        mask: its column, if it does nothing but apply a bit mask.
        only_random: greedy rows may do without it. Not where it reads counts: a captured draw makes none, and a host
            state may turn a row random.
    """

    name: str
    where: str
    processor: LogitsProcessor
    ops: Mapping[StandardOp, str]
    standard: bool
    mask: str | None
    only_random: bool

    @classmethod
    def of(cls, plan: ProcessorPlan, processor: LogitsProcessor) -> _Processor:
        ops = {spec.op: name for name, spec in plan.columns.items() if spec.op is not None and not spec.ragged}
        mask = ops.pop(StandardOp.BITMASK, None)
        standard = len(ops) == len(plan.columns) > 0 and processor.phase >= Phase.TEMPERATURE
        only_random = processor.argmax_invariant and Need.OUTPUT_COUNTS not in processor.needs
        mask = mask if len(plan.columns) == 1 else None
        return cls(plan.name, plan.where, processor, ops, standard, mask, only_random)

    @property
    def order(self) -> tuple[int, int]:
        """Phase, then top-k, top-p, min-p before other truncations; registration order decides the rest."""
        ranks = [_TRUNCATION_ORDER.index(op) for op in self.ops if op in _TRUNCATION_ORDER]
        return self.processor.phase, min(ranks, default=len(_TRUNCATION_ORDER))


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawPlan:
    """How the tokens of some rows are drawn: chosen once a step, from what the rows want.

    Attributes:
        called: processors that are applied one by one, in this order. needs: history that they read.
        ops: standard operations that are part of the draw -> (processor, column).
        random: some row is not greedy. min_tokens: some row may be below its least length. logprobs: some row wants
            log-probs.
        tail: the kernels that draw (`sampling_triton.Tail`); None: plain torch.
        reads_only: the kernels do it all: logits of any dtype, which stay as they are.
        mask: the column of the bit mask that is all that is called. captured: the tail whose graphs do the same, behind
            that mask if there is one; None: none do. sharded: each rank can draw from its own slice.
    """

    called: tuple[_Processor, ...]
    needs: frozenset[Need]
    ops: Mapping[StandardOp, tuple[str, str]]
    random: bool
    min_tokens: bool
    logprobs: bool
    tail: int | None
    reads_only: bool
    mask: tuple[str, str] | None
    captured: int | None
    sharded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawRows:
    """What processors and draw read of R rows, on the device.

    Attributes:
        slots: int64 [R]. positions: int64 [R]; absolute position of the token to be drawn (= tokens so far).
        prompt_lens: int64 [R].
        seeds: int64 [R]. sample_index: int64 [R]. greedy: bool [R]; the row takes the arg-max.
        columns: processor -> its columns, gathered by row.
        min_lens: int64 [R]; while a position is below it, `stop_ids` (int64 [R, W]; padding: any valid ids) cannot
            be drawn. Both where some row has `min_tokens`.
        output_counts: int32 [R, V]. prompt_mask: bool [R, V]. token_ids: int32 [slots, max_model_len + 1], the whole
            table. Each where a processor needs it.
    """

    slots: Tensor
    positions: Tensor
    prompt_lens: Tensor
    seeds: Tensor
    sample_index: Tensor
    greedy: Tensor
    columns: Mapping[str, Mapping[str, Tensor | RaggedColumn]]
    min_lens: Tensor | None = None
    stop_ids: RaggedColumn | None = None
    output_counts: Tensor | None = None
    prompt_mask: Tensor | None = None
    token_ids: Tensor | None = None


class Sampler:
    """Applies processors in phase order, then draws.

    With `fuse`, processors of the last two phases whose columns are all standard operations are not called: one search
    finds the thresholds of top-k, top-p and min-p together, and noise is made for what survives. That yields the very
    tokens of the processors called one by one, which happens without `fuse`, and where another processor of these
    phases is active too, or the operations have another order.

    Attributes:
        needs: history that any processor reads.
        standard_columns: operation -> (processor, column), of processors that are nothing but standard operations; {}
            where two claim one operation.
        tails: the kinds of tail that the kernels have. choice: which kernels are on.
    """

    def __init__(
        self,
        processors: Sequence[tuple[ProcessorPlan, LogitsProcessor]],
        vocab_size: int,
        *,
        fuse: bool,
        kernels: choice.KernelChoice | None = None,
    ) -> None:
        """`kernels`: draw by these Triton kernels, where only standard operations of a row's processors are left."""
        self._processors = sorted((_Processor.of(*each) for each in processors), key=lambda p: p.order)
        self._vocab_size, self._fuse, self.choice = vocab_size, fuse, kernels or choice.BY_DEFAULT
        self._kernels: Any = None
        self._mask: Any = bitmask.mask_bits_
        self.tails: tuple[int, ...] = ()
        if kernels is not None:
            from nanoengine.kernels import draw_triton

            self._kernels, self._mask, self.tails = draw_triton, draw_triton.mask_bits_, draw_triton.TAILS
        self.needs: frozenset[Need] = frozenset().union(*(p.processor.needs for p in self._processors))
        claims = [(op, (p.name, column)) for p in self._processors if p.standard for op, column in p.ops.items()]
        clash = not fuse or len({op for op, _ in claims}) < len(claims)
        self.standard_columns: Mapping[StandardOp, tuple[str, str]] = {} if clash else dict(claims)

    def choose(
        self, wanted: Mapping[str, bool], *, random: bool, min_tokens: bool = False, logprobs: bool = False
    ) -> DrawPlan:
        """How to draw for some rows. wanted: processor -> whether a row that is not greedy wants it. What cannot change
        an arg-max is skipped where only greedy rows want it and nothing behind it can. The flags: as in `DrawPlan`."""
        active = [p for p in self._processors if p.name in wanted]
        last = max((at for at, p in enumerate(active) if not p.only_random), default=-1)
        active = [p for at, p in enumerate(active) if at <= last or wanted[p.name]]
        late = [p for p in active if p.processor.phase >= Phase.TEMPERATURE]
        ops = {op: (p.name, column) for p in late for op, column in p.ops.items()}
        places = [place for p in late for place in sorted(map(_ORDER.index, p.ops))]
        fused = self._fuse and all(p.standard for p in late) and places == sorted(set(places))
        if not fused:
            late, ops = [], {}
        called = tuple(active[: len(active) - len(late)])
        cut = any(op in ops for op in _TRUNCATION_ORDER)
        tail = None if self._kernels is None else self._kernels.tail_for(random=random, cut=cut)
        reads_only = tail is not None and not called and not min_tokens
        mask = (called[0].name, called[0].mask) if self._fuse and len(called) == 1 and called[0].mask else None
        standard = all(self.standard_columns.get(op) == column for op, column in ops.items())
        return DrawPlan(
            called=called,
            needs=frozenset().union(*(p.processor.needs for p in called)),
            ops=ops,
            random=random,
            min_tokens=min_tokens,
            logprobs=logprobs,
            tail=tail,
            reads_only=reads_only,
            mask=mask,
            captured=tail if (reads_only or (mask and not min_tokens)) and standard and not logprobs else None,
            sharded=not (cut or min_tokens or logprobs)
            and all((self._fuse and p.mask) or p.processor.sharded for p in called),
        )

    def sample(self, logits: Tensor, rows: DrawRows, plan: DrawPlan) -> tuple[Tensor, Tensor]:
        """One token a row.

        Args:
            logits: float32 [R, V], overwritten: take log-probs of them before. Of any dtype where `plan.reads_only`.

        Returns:
            token ids int64 [R], 0 where failed; failed int32 [R]: `ROW_FINE`, `ROW_BAD_LOGITS` (NaN or +inf among
            the raw logits, or none above -inf), `ROW_NOTHING_LEFT` (after the processors).
        """
        if plan.reads_only:
            return self._draw_by_kernels(logits, rows, plan, None)
        tops = logits.amax(-1)  # a maximum passes NaN and +inf on; -inf below it is padding or a mask
        if plan.min_tokens:
            _forbid_stop(logits, rows)
        for p in plan.called:
            logits = self._apply(p, logits, rows)
        if plan.tail is not None:
            return self._draw_by_kernels(logits, rows, plan, tops)
        token_ids, scores = draw_tokens(logits, _columns(rows, plan), random=plan.random)
        failed = torch.where(scores.isfinite(), ROW_FINE, ROW_NOTHING_LEFT)
        failed = torch.where(tops.isfinite(), failed, ROW_BAD_LOGITS)
        return torch.where(failed == ROW_FINE, token_ids, 0), failed.to(torch.int32)

    def best_keys(self, logits: Tensor, rows: DrawRows, plan: DrawPlan, start: int) -> Tensor:
        """Each row's best in a slice of the vocabulary, int64 [R], to be compared with other slices' (`all_reduce`).

        `logits`: [R, N], ids `start`, `start` + 1, …, as `sample` takes them. `plan.sharded` must be true.
        """
        if plan.reads_only:
            keys: Tensor = self._kernels.best_keys(plan.tail, logits, start, _columns(rows, plan).with_all())
            return keys
        if not logits.shape[1]:
            return all_reduce.no_keys(len(logits), logits.device)
        tops = logits.amax(-1)
        for p in plan.called:
            logits = self._apply(p, logits, rows, start)
        token_ids, scores = draw_tokens(logits, _columns(rows, plan), random=plan.random, start=start)
        return all_reduce.pack_keys(scores, start + token_ids, tops)

    def draw(
        self,
        tail: int,
        logits: Tensor,
        columns: DrawColumns,
        tp: TensorParallelGroup,
        tokens: Tensor,
        failed: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """The draw alone, by kernels, as a graph captures it: tokens int64 [R] and failed int32 [R] are written.

        `logits`: [R, V / tp]; whole rows are gathered only for a tail that truncates. `mask`: int32 [R, words], applied
        in place, of one rank.
        """
        if mask is None and tp.size > 1 and tail != self._kernels.tail_for(random=True, cut=True):
            start, stop = vocab_slice(self._vocab_size, tp)
            keys = self._kernels.best_keys(tail, logits[:, : stop - start], start, columns)
            self._kernels.answer(tp.highest(keys), tokens, failed)
        else:
            logits = tp.all_gather(logits)[:, : self._vocab_size]
            self._kernels.sample(tail, logits, columns, tokens, failed, mask=mask, choice=self.choice)

    def _draw_by_kernels(
        self, logits: Tensor, rows: DrawRows, plan: DrawPlan, tops: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        failed = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
        self._kernels.sample(plan.tail, logits, _columns(rows, plan).with_all(), tokens, failed, raw_tops=tops)
        return tokens, failed

    def _apply(self, p: _Processor, logits: Tensor, rows: DrawRows, start: int = 0) -> Tensor:
        """The logits of ids `start`, `start` + 1, …, as the processor leaves them."""
        if self._fuse and p.mask is not None:
            words = rows.columns[p.name][p.mask]
            assert isinstance(words, Tensor)
            masked: Tensor = self._mask(logits, words, start)
            return masked
        needs, own = p.processor.needs, slice(start, start + logits.shape[1])
        view = ProcessorRows(
            slots=rows.slots,
            positions=rows.positions,
            prompt_lens=rows.prompt_lens,
            vocab_start=start,
            vocab_size=self._vocab_size,
            columns=rows.columns[p.name],
            output_counts=_part(rows.output_counts, own) if Need.OUTPUT_COUNTS in needs else None,
            prompt_mask=_part(rows.prompt_mask, own) if Need.PROMPT_MASK in needs else None,
            token_ids=rows.token_ids if Need.TOKEN_IDS in needs else None,
        )
        return checked_logits(p.processor, p.where, logits, view)


def _columns(rows: DrawRows, plan: DrawPlan) -> DrawColumns:
    ops: dict[str, Any] = {op.value: rows.columns[processor][column] for op, (processor, column) in plan.ops.items()}
    return DrawColumns(
        greedy=rows.greedy, seeds=rows.seeds, positions=rows.positions, sample_index=rows.sample_index, **ops
    )


def _part(history: Tensor | None, own: slice) -> Tensor | None:
    return None if history is None else history[:, own]


def _forbid_stop(logits: Tensor, rows: DrawRows) -> None:
    """Rows that are below their least length cannot draw a stop token. In place."""
    assert rows.min_lens is not None and rows.stop_ids is not None
    early, stop = (rows.positions < rows.min_lens)[:, None], rows.stop_ids
    sampling.forbid_(logits, stop.values, early & sampling.filled(stop.counts, stop.values.shape[1]))
