"""Orders and applies the logits processors, draws the token, reports log-probs. One row of logits a drawn token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanoengine.api.errors import PluginError, shown
from nanoengine.api.parallel import TensorParallelGroup, padded_length
from nanoengine.api.plugin_calls import place_and_fix, plugin_step
from nanoengine.api.processors import LogitsProcessor, Need, ProcessorRows, RaggedColumn
from nanoengine.api.specs import Phase, StandardOp
from nanoengine.core.step import ROW_BAD_LOGITS, ROW_FINE, ROW_NOTHING_LEFT
from nanoengine.kernels import all_reduce, sampling
from nanoengine.kernels.philox import draw_keys
from nanoengine.params.engine_plan import ProcessorPlan

_TRUNCATION_ORDER = (StandardOp.TOP_K, StandardOp.TOP_P, StandardOp.MIN_P)
_NEUTRAL: Mapping[StandardOp, tuple[float, torch.dtype]] = {
    StandardOp.TEMPERATURE: (1, torch.float32),
    StandardOp.TOP_K: (0, torch.int32),
    StandardOp.TOP_P: (1, torch.float32),
    StandardOp.MIN_P: (0, torch.float32),
}


@dataclass(frozen=True, slots=True)
class DrawColumns:
    """What a draw reads of R rows, on the device: fresh tensors in an eager tail, static views in a captured one.

    Attributes:
        greedy: bool or int32 [R]. seeds, positions, sample_index: int64 [R], the draw's key.
        ops: column of each standard operation that some row may want, [R].
    """

    greedy: Tensor
    seeds: Tensor
    positions: Tensor
    sample_index: Tensor
    ops: Mapping[StandardOp, Tensor]


@dataclass(frozen=True, slots=True)
class _Processor:
    """A processor in its place.

    Attributes:
        where: its name and origin, for errors.
        ops: columns with a standard operation. standard: it does nothing beyond those.
    """

    name: str
    where: str
    processor: LogitsProcessor
    ops: Mapping[StandardOp, str]
    standard: bool

    @property
    def order(self) -> tuple[int, int]:
        """Phase, then top-k, top-p, min-p before other truncations; registration order decides the rest."""
        ranks = [_TRUNCATION_ORDER.index(op) for op in self.ops if op in _TRUNCATION_ORDER]
        return self.processor.phase, min(ranks, default=len(_TRUNCATION_ORDER))


class Sampler:
    """Applies processors in phase order, then draws.

    With `fuse`, processors of the last two phases whose columns are all standard operations are not called: one search
    finds the thresholds of top-k, top-p and min-p together, and noise is made for what survives. That yields the very
    tokens of the processors called one by one, which happens without `fuse`, and where another processor of
    these phases is active between them.
    """

    def __init__(
        self,
        processors: Sequence[tuple[ProcessorPlan, LogitsProcessor]],
        vocab_size: int,
        *,
        fuse: bool,
        kernels: bool = False,
    ) -> None:
        """`kernels`: draw by Triton kernels, where all that is left of a row's processors is standard operations."""
        self._processors = sorted((_placed(plan, processor) for plan, processor in processors), key=lambda s: s.order)
        self._by_name = {s.name: s for s in self._processors}
        self._vocab_size = vocab_size
        self._fuse = fuse
        self._kernels = TritonDraw() if kernels else None
        self.argmax_invariant = {s.name: s.processor.argmax_invariant for s in self._processors}
        self.standard_columns = self._standard_columns() if fuse else {}
        self.needs: frozenset[Need] = frozenset().union(*(s.processor.needs for s in self._processors))

    def needs_of(self, name: str) -> frozenset[Need]:
        """History that the processor reads."""
        return self._by_name[name].processor.needs

    def _standard_columns(self) -> dict[StandardOp, tuple[str, str]]:
        """Operation -> (processor, column), for processors that are nothing but standard operations; {} where two claim
        one operation."""
        claims = [(op, (s.name, column)) for s in self._processors if s.standard for op, column in s.ops.items()]
        return dict(claims) if len({op for op, _ in claims}) == len(claims) else {}

    def takes_any_dtype(self, rows: DrawRows) -> bool:
        """Whether `sample` of these rows only reads the logits, by kernels: they need not be float32 then."""
        active = self._wanted(rows)
        return self._kernels is not None and not rows.any_min_tokens and len(self._fusable(active)) == len(active)

    def _wanted(self, rows: DrawRows) -> list[_Processor]:
        active = [s for s in self._processors if s.name in rows.active]
        return active if rows.any_random else [s for s in active if not s.processor.argmax_invariant]

    def sample(self, logits: Tensor, rows: DrawRows) -> tuple[Tensor, Tensor]:
        """One token a row.

        Args:
            logits: float32 [R, V], overwritten: take `logprobs` of them before. Where `takes_any_dtype`, of any.

        Returns:
            token ids int64 [R], 0 where failed; failed int32 [R]: `ROW_FINE`, `ROW_BAD_LOGITS` (NaN or +inf among
            the raw logits, or none above -inf), `ROW_NOTHING_LEFT` (after the processors).
        """
        active = self._wanted(rows)
        fused = self._fusable(active)
        if self.takes_any_dtype(rows):
            return self._draw_by_kernels(logits, rows, _columns_of(fused, rows), None)
        sound = logits.amax(-1).isfinite()  # a maximum passes NaN and +inf on; -inf below it is padding or a mask
        if rows.any_min_tokens:
            self._forbid_stop(logits, rows)
        for s in active:
            if s not in fused:
                logits = self._apply(s, logits, rows)
        ops = _columns_of(fused, rows)
        if self._kernels is not None:
            return self._draw_by_kernels(logits, rows, ops, sound)
        token_ids, scores = draw_tokens(logits, rows, ops)
        failed = torch.where(sound, torch.where(scores.isfinite(), ROW_FINE, ROW_NOTHING_LEFT), ROW_BAD_LOGITS)
        return torch.where(failed == ROW_FINE, token_ids, 0), failed.to(torch.int32)

    def takes_shards(self, rows: DrawRows) -> bool:
        """Whether no row wants a processor that needs the whole vocabulary: `best_keys` then serves them."""
        active = self._wanted(rows)
        fused = self._fusable(active)
        cut = any(op in _TRUNCATION_ORDER for s in fused for op in s.ops)
        return not (cut or rows.any_min_tokens) and all(s in fused or s.processor.sharded for s in active)

    def best_keys(self, logits: Tensor, rows: DrawRows, start: int) -> Tensor:
        """Each row's best in a slice of the vocabulary, int64 [R], to be compared with other slices' (`all_reduce`).

        `logits`: [R, N], ids `start`, `start` + 1, …, as `sample` takes them.
        """
        active = self._wanted(rows)
        fused = self._fusable(active)
        ops = _columns_of(fused, rows)
        if self.takes_any_dtype(rows):
            assert self._kernels is not None
            tail = self._kernels.tail(random=rows.any_random, cut=False)
            return self._kernels.best_keys(tail, logits, start, self._columns(rows, ops))
        if not logits.shape[1]:
            return all_reduce.no_keys(len(logits), logits.device)
        tops = logits.amax(-1)
        for s in active:
            if s not in fused:
                logits = self._apply(s, logits, rows, start)
        token_ids, scores = draw_tokens(logits, rows, ops, start)
        return all_reduce.pack_keys(scores, start + token_ids, tops)

    @staticmethod
    def logprobs(raw_logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs under the raw logits, which must be those before `sample`.

        Args:
            raw_logits: float32 [R, V]. token_ids: int64 [R]. k: how many of the likeliest.

        Returns:
            log-prob float32 [R], rank int32 [R] (1 + tokens strictly likelier), ids int32 [R, k] and log-probs
            float32 [R, k] of the likeliest, best first, ties by lowest id.
        """
        return sampling.token_logprobs(raw_logits, token_ids, k)

    def _fusable(self, active: Sequence[_Processor]) -> list[_Processor]:
        """The processors whose work is done in `_draw`: all of the last two phases, or none."""
        late = [s for s in active if s.processor.phase >= Phase.TEMPERATURE]
        ops = [op for s in late for op in s.ops]
        fits = self._fuse and all(s.standard for s in late) and len(set(ops)) == len(ops)
        return late if fits else []

    def _apply(self, s: _Processor, logits: Tensor, rows: DrawRows, start: int = 0) -> Tensor:
        needs = s.processor.needs
        columns = slice(start, start + logits.shape[1])
        view = ProcessorRows(
            slots=rows.slots,
            positions=rows.positions,
            prompt_lens=rows.prompt_lens,
            vocab_start=start,
            vocab_size=self._vocab_size,
            columns=rows.columns[s.name],
            output_counts=_part(rows.output_counts, columns) if Need.OUTPUT_COUNTS in needs else None,
            prompt_mask=_part(rows.prompt_mask, columns) if Need.PROMPT_MASK in needs else None,
            token_ids=rows.token_ids if Need.TOKEN_IDS in needs else None,
        )
        given = (logits.shape, logits.dtype, logits.device)  # the processor may change the tensor itself
        with plugin_step(s.where, type(s.processor)):
            out: object = s.processor.apply(logits, view)
        if isinstance(out, Tensor) and (out.shape, out.dtype, out.device) == given:
            return out
        shape, dtype, device = given
        if not isinstance(out, Tensor):
            text = f"{shown(out):.80} of type {type(out).__name__}, not the logits, a Tensor"
        else:
            got = f"{out.dtype} {tuple(out.shape)}" + (f" on {out.device}" if out.device != device else "")
            text = f"{got} instead of the {dtype} {tuple(shape)} it was given"
        error = PluginError(f"{s.where} returned {text}")
        error.add_note(place_and_fix(None, type(s.processor).apply, s.where).removeprefix(", "))
        raise error

    def _forbid_stop(self, logits: Tensor, rows: DrawRows) -> None:
        stop = rows.stop_ids
        early = (rows.positions < rows.min_lens)[:, None]
        sampling.forbid_(logits, stop.values, early & sampling.filled(stop.counts, stop.values.shape[1]))

    def _draw_by_kernels(
        self, logits: Tensor, rows: DrawRows, ops: Mapping[StandardOp, Tensor], sound: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert self._kernels is not None
        tail = self._kernels.tail(random=rows.any_random, cut=any(op in ops for op in _TRUNCATION_ORDER))
        tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        failed = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
        self._kernels.sample(tail, logits, self._columns(rows, ops), tokens, failed, sound)
        return tokens, failed

    def _columns(self, rows: DrawRows, ops: Mapping[StandardOp, Tensor]) -> DrawColumns:
        """As the kernels take them: each operation has a column, that of its neutral value where no row wants it."""
        count, device = len(rows.slots), rows.slots.device
        neutral = {
            op: torch.full((count,), value, dtype=dtype, device=device)
            for op, (value, dtype) in _NEUTRAL.items()
            if op not in ops
        }
        return DrawColumns(rows.greedy, rows.seeds, rows.positions, rows.sample_index, {**neutral, **ops})

    @property
    def tails(self) -> tuple[int, ...]:
        """The kinds of tail that the kernels have."""
        return () if self._kernels is None else self._kernels.tails

    def tail_of(self, active: frozenset[str], *, random: bool) -> int | None:
        """The kind of tail (`sampling_triton.Tail`) that serves rows of these processors; None: no kernels alone do."""
        if self._kernels is None:
            return None
        columns = self.standard_columns
        if not active <= {processor for processor, _ in columns.values()}:
            return None
        cut = any(columns[op][0] in active for op in _TRUNCATION_ORDER if op in columns)
        return self._kernels.tail(random=random, cut=cut)

    def draw(self, tail: int, logits: Tensor, columns: DrawColumns, tokens: Tensor, failed: Tensor) -> None:
        """The draw alone, by kernels: as a graph captures it. tokens: int64 [R]; failed: int32 [R]; both written."""
        assert self._kernels is not None
        self._kernels.sample(tail, logits, columns, tokens, failed)

    def draw_sharded(
        self, tail: int, logits: Tensor, columns: DrawColumns, tp: TensorParallelGroup, tokens: Tensor, failed: Tensor
    ) -> None:
        """As `draw`, of logits [R, V / tp]; whole rows are gathered only for a tail that truncates."""
        assert self._kernels is not None
        if tp.size > 1 and tail != self._kernels.tail(random=True, cut=True):
            start, stop = vocab_slice(self._vocab_size, tp)
            keys = self._kernels.best_keys(tail, logits[:, : stop - start], start, columns)
            self._kernels.answer(tp.highest(keys), tokens, failed)
        else:
            self.draw(tail, tp.all_gather(logits)[:, : self._vocab_size], columns, tokens, failed)


class TritonDraw:
    """The Triton kernels of a draw, which eager and captured tails share."""

    def __init__(self) -> None:
        from nanoengine.kernels import sampling_shard_triton, sampling_triton

        self._whole: Any = sampling_triton
        self._shards: Any = sampling_shard_triton
        self.tails: tuple[int, ...] = tuple(sampling_triton.Tail)

    def tail(self, *, random: bool, cut: bool) -> int:
        tails = self._whole.Tail
        return int(tails.GREEDY if not random else tails.TRUNCATION if cut else tails.TEMPERATURE)

    def sample(
        self, tail: int, logits: Tensor, c: DrawColumns, tokens: Tensor, failed: Tensor, sound: Tensor | None = None
    ) -> None:
        top_k, top_p, min_p = (c.ops.get(op) for op in _TRUNCATION_ORDER)
        self._whole.sample(
            logits, self._whole.Tail(tail), tokens, failed, **self._key(c), top_k=top_k, top_p=top_p, min_p=min_p,
            sound=sound,
        )  # fmt: skip

    def best_keys(self, tail: int, logits: Tensor, start: int, c: DrawColumns) -> Tensor:
        keys: Tensor = self._shards.best_keys(logits, self._whole.Tail(tail), start, **self._key(c))
        return keys

    def answer(self, keys: Tensor, tokens: Tensor, failed: Tensor) -> None:
        self._shards.answer(keys, tokens, failed)

    @staticmethod
    def _key(c: DrawColumns) -> dict[str, Tensor | None]:
        temperature = c.ops.get(StandardOp.TEMPERATURE)
        return {
            "greedy": c.greedy, "temperature": temperature,
            "seeds": c.seeds, "positions": c.positions, "sample_index": c.sample_index,
        }  # fmt: skip


def _part(history: Tensor | None, columns: slice) -> Tensor | None:
    return None if history is None else history[:, columns]


def _placed(plan: ProcessorPlan, processor: LogitsProcessor) -> _Processor:
    if not isinstance(getattr(processor, "phase", None), Phase):
        raise PluginError(f"{plan.where} must set `phase` to a nanoengine.api.Phase")
    ops = {spec.op: name for name, spec in plan.columns.items() if spec.op is not None and not spec.ragged}
    standard = len(ops) == len(plan.columns) > 0 and processor.phase >= Phase.TEMPERATURE
    return _Processor(plan.name, plan.where, processor, ops, standard)


def _columns_of(processors: Sequence[_Processor], rows: DrawRows) -> dict[StandardOp, Tensor]:
    return {op: _scalar(rows, s.name, column) for s in processors for op, column in s.ops.items()}


def _scalar(rows: DrawRows, processor: str, column: str) -> Tensor:
    values = rows.columns[processor][column]
    assert not isinstance(values, RaggedColumn), (processor, column)
    return values


@dataclass(frozen=True, slots=True)
class DrawRows:
    """What a draw knows of its R rows. Tensors are on the device; flags and names are on the host.

    Attributes:
        slots: int64 [R]. positions: int64 [R]; absolute position of the token to be drawn (= tokens so far).
        prompt_lens: int64 [R].
        seeds: int64 [R]. sample_index: int64 [R]. greedy: bool [R]; the row takes the arg-max.
        min_lens: int64 [R]; while a position is below it, `stop_ids` (int64 [R, W]; padding: any valid ids) cannot
            be drawn.
        active: processors that some row wants. columns: their columns, gathered by row.
        any_min_tokens: some row may be below its `min_lens`. any_random: some row is not greedy.
        output_counts: int32 [R, V]. prompt_mask: bool [R, V]. token_ids: int32 [slots, max_model_len + 1], the whole
            table. Each where an active processor needs it.
    """

    slots: Tensor
    positions: Tensor
    prompt_lens: Tensor
    seeds: Tensor
    sample_index: Tensor
    greedy: Tensor
    min_lens: Tensor
    stop_ids: RaggedColumn
    active: tuple[str, ...] = ()
    columns: Mapping[str, Mapping[str, Tensor | RaggedColumn]] = field(default_factory=dict)
    any_min_tokens: bool = False
    any_random: bool = False
    output_counts: Tensor | None = None
    prompt_mask: Tensor | None = None
    token_ids: Tensor | None = None


def draw_tokens(
    logits: Tensor, rows: DrawRows, ops: Mapping[StandardOp, Tensor], start: int = 0
) -> tuple[Tensor, Tensor]:
    """Columns int64 [R] and their scores [R], finite where a token was possible. Column 0 is id `start`."""
    if not rows.any_random:
        return _argmax(logits)
    keys = draw_keys(rows.seeds, rows.positions, rows.sample_index)
    if not sampling.on_host(logits):
        greedy_ids, greedy_scores = _argmax(logits)
        ids, scores = _draw_random(logits, keys, ops, start)
        return torch.where(rows.greedy, greedy_ids, ids), torch.where(rows.greedy, greedy_scores, scores)
    random = (~rows.greedy).nonzero().flatten()
    if len(random) == len(logits):
        return _draw_random(logits, keys, ops, start)
    ids, scores = _argmax(logits)
    chosen = {op: column[random] for op, column in ops.items()}
    ids[random], scores[random] = _draw_random(logits[random], keys[random], chosen, start)
    return ids, scores


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the highest, int64 [R], and its logit."""
    ids = logits.argmax(-1)
    return ids, logits.gather(1, ids[:, None]).squeeze(1)


def _draw_random(logits: Tensor, keys: Tensor, ops: Mapping[StandardOp, Tensor], start: int) -> tuple[Tensor, Tensor]:
    """Temperature, truncation and draw; overwrites the logits."""
    if StandardOp.TEMPERATURE in ops:
        sampling.scale_by_temperature_(logits, ops[StandardOp.TEMPERATURE])
    top_k, top_p, min_p = (ops.get(op) for op in (StandardOp.TOP_K, StandardOp.TOP_P, StandardOp.MIN_P))
    if top_k is not None or top_p is not None or min_p is not None:
        return sampling.draw_truncated(logits, keys, top_k, top_p, min_p, start)
    return sampling.draw(logits, keys, start)


def vocab_slice(vocab_size: int, tp: TensorParallelGroup) -> tuple[int, int]:
    """First id of this rank's slice of the vocabulary, and the id behind its last."""
    width = padded_length(vocab_size, tp.size)
    return min(tp.rank * width, vocab_size), min((tp.rank + 1) * width, vocab_size)
