"""The step that is being put together: how many tokens it may have, its rows, which are booked as they are picked and
can be taken back, and the `StepPlan` that is made of them. A plan's arrays are built once a step, from lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.step import (
    POOL_ALL,
    POOL_LAST,
    BlockAppends,
    Bool,
    Int32,
    NewSlots,
    ProcessorColumn,
    StepPlan,
    flags,
    i32,
    i64,
    offsets_of,
)

_NO_SLOTS, _NO_APPENDS, _NONE = NewSlots(), BlockAppends(), i32()  # most steps have none


class Prefill(NamedTuple):
    """A prefill row: tokens [start, end); `sampled`: it reaches the request's last token, and draws: a request that
    pools gets its vector then."""

    request: Request
    start: int
    end: int
    sampled: bool


@dataclass(slots=True)
class Draft:
    """A step that is not launched yet.

    Attributes:
        step: its number. budget: tokens that it may still get. first: as in `ScheduledStep`.
        slots, starts: of its decode rows, which continue a generated sequence: the first input of each is the last
            token, at position `start`, which may still be in flight. drafts: slot -> tokens behind it that are guesses.
        prefill: its other rows.
        new: admitted request, or one that is `unsent` -> its tokens whose KV is there.
        grown: request -> index of its first block that the device does not know.
        writers: hash of a prompt block that this step completes -> the request that computes it.
        late: a row draws with host state.
        preempted: a request had to give its blocks back.
        ending: requests whose last token is in flight: they get no row, and leave their place to others.
    """

    step: int
    budget: int
    first: Request | None = None
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    drafts: dict[int, Sequence[int]] = field(default_factory=dict)
    prefill: list[Prefill] = field(default_factory=list)
    new: dict[Request, int] = field(default_factory=dict)
    grown: dict[Request, int] = field(default_factory=dict)
    writers: dict[bytes, Request] = field(default_factory=dict)
    late: bool = False
    preempted: bool = False
    ending: int = 0

    def book(self, request: Request, num_new: int, drafts: Sequence[int] = ()) -> None:
        """Adds a row of the request's next tokens, and books them as computed. drafts: behind a last known token.
        `Scheduler._pick_running` does the same for a request below its `pick_check_at`, which is set here."""
        start, end = request.num_computed, request.num_computed + num_new
        request.num_computed = end + len(drafts)
        self.budget -= num_new + len(drafts)
        sampled = end == request.length
        if sampled:
            request.length += 1 + len(drafts)
            self.late |= bool(request.host_states)
            request.pick_check_at = 0 if drafts or request.drafted else min(request.max_len, request.capacity + 1)
        if num_new == 1 and sampled and end > request.prompt_len:
            self.slots.append(request.slot)
            self.starts.append(start)
            if drafts:
                self.drafts[request.slot] = drafts
        else:
            request.last_prefill = self.step
            self.prefill.append(Prefill(request, start, end, sampled))

    def fits_whole(self, num_tokens: int) -> bool:
        """Whether the step may have a whole prompt; one alone may be larger than what memory left of the budget."""
        if num_tokens > self.budget and not (self.slots or self.prefill):
            self.budget = num_tokens
        return num_tokens <= self.budget

    def room_for_drafts(self, request: Request, num_new: int, most: int, blocks: BlockManager) -> int:
        """How many of at most so many drafts a row of its next tokens may have: behind its last known token, within its
        length and the budget, in blocks that are free."""
        end = request.num_computed + num_new
        if num_new > 1 or end < request.length or end == request.prompt_len:
            return 0
        most = min(most, self.budget - 1, request.max_len - 1 - end)
        first = len(request.block_ids[0])
        if end + most > request.capacity and blocks.grow(request, end + most):
            self.grown.setdefault(request, first)
        return max(0, min(most, request.capacity - end))

    def drop(self, request: Request) -> None:
        """Takes a request out again: its row is not booked any more, and its share of the budget is free."""
        if request.slot in self.slots:
            at = self.slots.index(request.slot)
            del self.slots[at], self.starts[at]
            num_tokens = 1 + len(self.drafts.pop(request.slot, ()))
            request.unbook(num_tokens, num_tokens)
            self.budget += num_tokens
        for _, start, end, sampled in self._prefill_of(request):
            request.unbook(end - start, sampled)
            request.last_prefill = self.step - 1  # which may hold a row of it
            self.budget += end - start
        self.prefill = [row for row in self.prefill if row.request is not request]
        self.new.pop(request, None)
        self.grown.pop(request, None)

    def only(self, request: Request) -> Draft:
        """The same step with the row of one request, to see whether it can be planned alone."""
        slot = request.slot
        return replace(
            self,
            slots=[each for each in self.slots if each == slot],
            starts=[start for each, start in zip(self.slots, self.starts, strict=True) if each == slot],
            drafts={each: tokens for each, tokens in self.drafts.items() if each == slot},
            prefill=self._prefill_of(request),
            new={each: cached for each, cached in self.new.items() if each is request},
            grown={each: first for each, first in self.grown.items() if each is request},
        )

    def _prefill_of(self, request: Request) -> list[Prefill]:
        return [row for row in self.prefill if row.request is request]

    def admit(self, request: Request, num_new: int, cached: int, blocks: BlockManager) -> None:
        """Adds a request that enters the device tables, and the row of its next tokens."""
        self.new[request] = cached
        self.grown[request] = 0
        self.book(request, num_new)
        self._note_writer(request, cached, cached + num_new, blocks)

    def note_writers(self, blocks: BlockManager) -> None:
        """Prompt blocks that running requests complete in this step."""
        for request, start, end, _ in self.prefill:
            self._note_writer(request, start, end, blocks)

    def _note_writer(self, request: Request, start: int, end: int, blocks: BlockManager) -> None:
        for key in blocks.prompt_hashes(request, start, end):
            self.writers.setdefault(key, request)

    def writes_next_block(self, request: Request, num_hits: int, blocks: BlockManager) -> bool:
        """Whether this step computes the first block that the request misses: it had better wait for the hit."""
        if not self.writers or num_hits >= (request.num_tokens - 1) // blocks.block_size:
            return False
        writer = self.writers.get(request.block_hashes[num_hits])
        return writer is not None and blocks.same_block(writer, request, num_hits)


class TokenBudget:
    """How many tokens a step may have. Out of memory: half of what the step had. From then on it doubles after some
    steps that went well, until it is full again.

    Those are few at first, as memory that was short may be free again. They become twice as many each time that the
    doubled budget is too much: a batch that never fits is tried ever more rarely.

    Attributes:
        now: the most tokens of the next step.
    """

    FEWEST, MOST = 4, 1024  # steps that must go well

    def __init__(self, full: int) -> None:
        self.full = self.now = full
        self._wait, self._good, self._doubled, self._least_failed = self.FEWEST, 0, False, False

    def halve(self, num_tokens: int, *, least: bool = False) -> bool:
        """A step of so many tokens ran out of memory. least: it cannot have fewer, as a single token cannot. False: nor
        could the one before it that failed, and since then the allocator gave back what it kept."""
        again, self._least_failed = self._least_failed, least or num_tokens == 1
        if self._doubled:
            self._wait = min(2 * self._wait, self.MOST)
        self.now, self._good, self._doubled = max(1, num_tokens // 2), 0, False
        return not (again and self._least_failed)

    def went_well(self) -> None:
        """A step did."""
        self._good, self._least_failed = self._good + 1, False
        if self._good < self._wait:
            return
        self._good = 0
        if self.now < self.full:
            self.now, self._doubled = min(2 * self.now, self.full), True
        else:
            self._wait, self._doubled = self.FEWEST, False


def build_plan(draft: Draft) -> StepPlan:
    """Decode rows come first, the longest first, then by slot: a device that starts with what takes longest is not left
    with one at the end. Prefill rows follow as they were picked."""
    slots, starts = i32(draft.slots), i32(draft.starts)
    order = np.lexsort((slots, -starts))
    slots, starts, num_decode = slots[order], starts[order], len(order)
    lens, drafts, draft_tokens = np.ones(num_decode, dtype=np.int32), _NONE, _NONE
    logits = rows = np.arange(num_decode, dtype=np.int32)
    if draft.drafts:
        each = [draft.drafts.get(slot, ()) for slot in slots.tolist()]
        drafts = i32([len(tokens) for tokens in each])
        draft_tokens = i32(list(chain.from_iterable(each)))
        lens += drafts
        logits, rows = np.arange(lens.sum(), dtype=np.int32), np.repeat(rows, lens)
    sampled, tops = np.ones(len(rows), dtype=np.bool_), np.zeros(len(rows), dtype=np.int32)
    if draft.prefill:
        index, of_row, drawn, best = _wanted_logits(num_decode, len(rows), draft.prefill)
        logits, rows = np.concatenate([logits, index]), np.concatenate([rows, of_row])
        sampled, tops = np.concatenate([sampled, drawn]), np.concatenate([tops, best])
        drafts = np.pad(drafts, (0, len(draft.prefill))) if len(drafts) else drafts
        more = i32([(row.request.slot, row.start, row.end - row.start) for row in draft.prefill]).T
        slots, starts, lens = map(np.concatenate, zip((slots, starts, lens), more, strict=True))
    return StepPlan(
        step=draft.step,
        new=_new_slots(draft.new) if draft.new else _NO_SLOTS,
        columns=_processor_columns(draft.new) if draft.new else (),
        appends=_block_appends(draft.grown) if draft.grown else _NO_APPENDS,
        slots=slots, num_decode_rows=num_decode, query_lens=lens, starts=starts,
        drafts=drafts, draft_tokens=draft_tokens,
        logits_index=logits, logits_rows=rows, sampled=sampled, prompt_logprobs=tops,
        pooled=_pooled(num_decode, draft.prefill) if draft.prefill else _NONE,
        late=draft.late,
    )  # fmt: skip


def _wanted_logits(first: int, at: int, prefill: Sequence[Prefill]) -> tuple[Int32, Int32, Bool, Int32]:
    """logits_index, logits_rows, sampled, prompt_logprobs of prefill rows: int32, int32, bool, int32, each [L].

    first, at: number of the first one, and of its first token.
    """
    index, rows, drawn, tops = list[int](), list[int](), list[bool](), list[int]()
    for row, (request, start, end, sampled) in enumerate(prefill, start=first):
        top = request.params.prompt_logprobs
        if top is not None:  # logits at j tell the log-prob of prompt token j + 1
            wanted = range(max(start, request.prompt_logprobs_done - 1), min(end, request.prompt_len - 1))
            index += [at + j - start for j in wanted]
            rows += [row] * len(wanted)
            drawn += [False] * len(wanted)
            tops += [top] * len(wanted)
        at += end - start
        if sampled and request.params.pooling is None:
            index.append(at - 1)
            rows.append(row)
            drawn.append(True)
            tops.append(0)
    return i32(index), i32(rows), flags(drawn), i32(tops)


def _pooled(num_decode: int, prefill: Sequence[Prefill]) -> Int32:
    """As in `StepPlan`."""
    each = [(row.request.params.pooling, row.sampled) for row in prefill]
    pooled = [POOL_ALL if pooling == "mean" else POOL_LAST if pooling and sampled else 0 for pooling, sampled in each]
    return i32([0] * num_decode + pooled) if any(pooled) else _NONE


def _new_slots(new: Mapping[Request, int]) -> NewSlots:
    outputs = [i32(request.output_token_ids) for request in new]
    prompts = [np.frombuffer(request.prompt_bytes, dtype=np.int32) for request in new]
    stops = [sorted(request.stop_set) for request in new]
    logprobs = [request.params.logprobs for request in new]
    return NewSlots(
        slots=i32([request.slot for request in new]),
        token_ids=np.concatenate([part for pair in zip(prompts, outputs, strict=True) for part in pair]),
        token_offsets=offsets_of([request.num_tokens for request in new]),
        prompt_lens=i32([request.prompt_len for request in new]), num_computed=i32(list(new.values())),
        seeds=i64([request.seed for request in new]), sample_index=i32([request.sample_index for request in new]),
        greedy=flags([request.params.greedy for request in new]), min_lens=i32([request.min_len for request in new]),
        stop_ids=i32([token for ids in stops for token in ids]), stop_offsets=offsets_of([len(ids) for ids in stops]),
        num_logprobs=i32([-1 if k is None else k for k in logprobs]),
    )  # fmt: skip


def _processor_columns(new: Iterable[Request]) -> tuple[ProcessorColumn, ...]:
    """One message a column: the packed values of new slots."""
    table: dict[tuple[str, str], dict[int, npt.NDArray[Any]]] = {}  # (processor, column) -> slot -> values
    for request in new:
        for processor in request.params.processors:
            for column, value in processor.columns.items():
                table.setdefault((processor.name, column), {})[request.slot] = value
    return tuple(
        ProcessorColumn(
            processor=processor,
            column=column,
            slots=i32(list(values)),
            values=np.concatenate([np.atleast_1d(value) for value in values.values()]),
            offsets=offsets_of([np.size(value) for value in values.values()]),
        )
        for (processor, column), values in table.items()
    )


def _block_appends(grown: Mapping[Request, int]) -> BlockAppends:
    groups, slots, indices, blocks = list[int](), list[int](), list[int](), list[int]()
    for request, first in grown.items():
        for group, table in enumerate(request.block_ids):
            count = len(table) - first
            groups += [group] * count
            slots += [request.slot] * count
            indices += range(first, len(table))
            blocks += table[first:]
    return BlockAppends(group=i32(groups), slot=i32(slots), index=i32(indices), block=i32(blocks))
