"""Steady rows: requests that decode and ask for nothing else, kept as numpy columns by slot.

From one step to the next such a row is one token longer, and that is all. So neither scheduling nor committing it looks
at its `Request`: what changes stands in columns, and new tokens in a buffer. A request is *opened*, that is its fields
are brought up to date, when something comes due: the first token, a block to publish, a stop token, the end by length,
a full buffer; or when it leaves: it is preempted, aborted, or a step is scheduled one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.draft import Draft
from nanoengine.core.scheduling.messages import ScheduledStep, Update
from nanoengine.core.scheduling.plan_builder import longest_first
from nanoengine.core.scheduling.queues import Handle
from nanoengine.core.step import Bool, Int32, Int64, StepResult, i32

WIDTH = 64  # tokens a row may have in the buffer
MAX_STOPS = 8  # stop ids of a steady row; who has more is looked at one by one
NONE = -1

Rows = npt.NDArray[np.intp]
_NO_ROWS: Rows = np.zeros(0, dtype=np.intp)


def may_be_steady(request: Request) -> bool:
    """Whether all that its steps bring is a token. Constant for a request."""
    params = request.params
    asks = params.logprobs is not None or params.prompt_logprobs is not None
    return not (asks or request.host_tokens or len(request.stop_set) > MAX_STOPS)


class SteadyRows:
    """The steady requests of a scheduler: a member has a row in every step.

    While a request is a member, `num_tokens`, `num_in_flight`, `num_computed`, `last_step` and `output_token_ids` of it
    are those of when it was last opened. A member has computed all of its tokens but the last one: `num_computed` is
    num_tokens + num_in_flight - 1.
    """

    def __init__(self, num_slots: int) -> None:
        self._members: list[Request | None] = [None] * num_slots  # by slot, as are all columns
        self.size = 0
        self._generation: Int64 = np.full(num_slots, NONE, dtype=np.int64)  # NONE: no member, or an opened one
        self._total: Int64 = np.zeros(num_slots, dtype=np.int64)  # tokens, those in flight included
        self._known: Int64 = np.zeros(num_slots, dtype=np.int64)
        self._max_len: Int64 = np.zeros(num_slots, dtype=np.int64)
        self._capacity: Int64 = np.zeros(num_slots, dtype=np.int64)
        self._alarm: Int64 = np.zeros(num_slots, dtype=np.int64)  # known tokens at which commit looks at the request
        self._opened: Int64 = np.zeros(num_slots, dtype=np.int64)  # known tokens when it was last opened
        self._quiet: Bool = np.zeros(num_slots, dtype=np.bool_)
        self._stops: Int32 = np.full((MAX_STOPS, num_slots), NONE, dtype=np.int32)
        self._num_stops = 0  # the most that a member had so far
        self._buffer: Int32 = np.zeros((num_slots, WIDTH), dtype=np.int32)
        self._order: Int32 = np.zeros(0, dtype=np.int32)  # members' slots, longest first
        self._joined: list[int] = []  # slots that have yet to be sorted in
        self._handles: tuple[Handle, ...] | None = None  # in that order; None: to be made when asked for
        self.step = NONE  # the last one scheduled; every member has a row in it

    def __contains__(self, request: Request) -> bool:
        return request.slot >= 0 and self._members[request.slot] is request

    # Members

    def join(self, request: Request) -> None:
        """It had a decode row in the step just booked."""
        slot, stops = request.slot, request.stop_set
        assert self._members[slot] is None, f"slot {slot} has a steady row already"
        total = request.num_tokens + request.num_in_flight
        assert request.num_computed == total - 1, f"request {request.id} is behind"
        self._members[slot] = request
        self._total[slot] = total
        self._max_len[slot] = request.max_len
        self._capacity[slot] = request.capacity
        self._quiet[slot] = request.quiet
        self._stops[:, slot] = NONE
        self._stops[: len(stops), slot] = list(stops)
        self._num_stops = max(self._num_stops, len(stops))
        self._close(request)
        self.size += 1
        self._joined.append(slot)

    def leave(self, request: Request) -> None:
        """Nothing happens where it is no member."""
        slot = request.slot
        if request not in self:
            return
        if self._generation[slot] != NONE:
            self._open(i32([slot]))
        self._members[slot] = None
        self.size -= 1
        order = self._slots()
        self._order, self._handles = order[order != slot], None

    def leave_all(self) -> None:
        if self.size:
            slots = self._slots()
            self._open(slots[self._generation[slots] != NONE])
            self._members = [None] * len(self._members)
            self.size, self._order, self._handles = 0, self._order[:0], None

    def _open(self, slots: Int32) -> None:
        """Brings the members' fields up to date; until `close` the columns of these slots mean nothing."""
        known, total = self._known[slots], self._total[slots]
        counts = known - self._opened[slots]
        each = zip(
            slots.tolist(),
            known.tolist(),
            total.tolist(),
            counts.tolist(),
            self._buffer[slots, : counts.max(initial=0)].tolist(),
            self._quiet[slots].tolist(),
            strict=True,
        )
        for slot, num_tokens, length, count, tokens, quiet in each:
            request = self._members[slot]
            assert request is not None, f"slot {slot} has no steady row"
            request.output_token_ids += tokens[:count]
            request.num_tokens, request.num_in_flight = num_tokens, length - num_tokens
            request.num_computed, request.last_step = length - 1, self.step
            request.num_untold += count if quiet else 0
        self._generation[slots] = NONE

    def _close(self, request: Request) -> None:
        slot, known = request.slot, request.num_tokens
        self._known[slot] = self._opened[slot] = known
        alarm = min(request.publish_at, request.max_len - 1, known + WIDTH)
        self._alarm[slot] = alarm if known > request.prompt_len else known  # the first token is told when it comes
        self._generation[slot] = request.generation

    # Scheduling

    def pick(self, draft: Draft, running: Sequence[Request], blocks: BlockManager) -> list[Request] | None:
        """A token for every member. None: budget or blocks may not do for all, so nobody is a member any more.

        Returns the running requests that are still to be looked at, in order; what they need is there. Among them are
        the members that need a block, for `grow`: blocks are given out in that order.
        """
        ending, growing = self._due()
        for request in ending:
            self.leave(request)
        rest = self._others(running, growing)
        tokens, missing = self.size, len(growing)
        for request in rest:
            if request not in self:
                length = request.num_tokens + request.num_in_flight
                tokens += length - request.num_computed
                missing += max(0, blocks.blocks_for(length) - len(request.block_ids[0]))
        if tokens > draft.budget or missing > blocks.free_blocks:
            self.leave_all()
            return None
        draft.steady = self.size > 0
        draft.budget -= self.size
        return rest

    def grow(self, request: Request, draft: Draft, blocks: BlockManager) -> None:
        """Blocks for a member's next row."""
        draft.grown[request] = len(request.block_ids[0])
        grew = blocks.grow(request, int(self._total[request.slot]))
        assert grew, "pick() saw room for all"
        self._capacity[request.slot] = request.capacity

    def _due(self) -> tuple[list[Request], list[Request]]:
        """Members that end by length with what is in flight, and members that need a block for their next row."""
        slots = self._slots()
        total = self._total[slots]
        ending = total >= self._max_len[slots]
        growing = (total > self._capacity[slots]) & ~ending
        if not (ending.any() or growing.any()):
            return [], []
        return self._of(slots[ending]), self._of(slots[growing])

    def _others(self, running: Sequence[Request], wanted: Sequence[Request]) -> list[Request]:
        """Of `running`, in its order, who is no member, and the members in `wanted`."""
        if not wanted and self.size == len(running):
            return []
        members, also = self._members, set(wanted)
        return [request for request in running if members[request.slot] is not request or request in also]

    def advance(self) -> tuple[Int32, Int32]:
        """A row of the next step for each member -> (slots, starts), int32 each, longest first, then by slot."""
        slots = self._slots()
        total = self._total[slots]
        self._total[slots] = total + 1
        return slots, (total - 1).astype(np.int32)

    def take_back(self) -> list[Request]:
        """Undoes `advance`: the step is not launched. Returns the members."""
        slots = self._slots()
        self._total[slots] -= 1
        return self._of(slots)

    def handles(self) -> tuple[Handle, ...]:
        """Of the rows that `advance` gave."""
        if self._handles is None:
            self._handles = tuple([(request, request.generation) for request in self._of(self._order)])
        return self._handles

    def _slots(self) -> Int32:
        if self._joined:
            slots = np.concatenate([self._order, i32(self._joined)])
            self._order, self._handles = slots[longest_first(self._total[slots], slots)], None
            self._joined.clear()
        return self._order

    def _of(self, slots: Int32) -> list[Request]:
        return [self._members[slot] for slot in slots.tolist()]

    # Results

    def commit(self, step: ScheduledStep, result: StepResult) -> tuple[list[Update], Rows]:
        """Takes in what brings members a token and nothing else.

        Returns:
            their updates, without the quiet ones'; the other rows, to be looked at one by one: members among them are
            open, until `close`.
        """
        slots, counts = step.plan.slots, result.counts
        if not self.size:
            return [], np.arange(len(slots))
        whole = len(result.token_ids) == len(slots) and bool((counts == 1).all())
        tokens = result.token_ids if whole else _first_tokens(result)
        members = self._generation[slots] == step.generations
        plain = members & (self._known[slots] < self._alarm[slots])
        for stops in self._stops[: self._num_stops]:
            plain &= tokens != stops[slots]
        plain &= result.failed == 0
        if not whole:
            plain &= counts == 1
        rows: Any = slice(None)
        others = _NO_ROWS
        if not plain.all():
            rows, others = np.flatnonzero(plain), np.flatnonzero(~plain)
            self._open(slots[members & ~plain])
        self._append(slots[rows], tokens[rows])
        loud = plain & ~self._quiet[slots]
        return (_updates(step.rows, np.flatnonzero(loud).tolist(), tokens.tolist()) if loud.any() else []), others

    def _append(self, slots: Int32, tokens: Int32) -> None:
        known = self._known[slots]
        self._buffer[slots, known - self._opened[slots]] = tokens
        self._known[slots] = known + 1

    def close(self, request: Request) -> None:
        """What happened to an opened member is over; if it is still one, its columns stand again."""
        if request in self:
            assert self._generation[request.slot] == NONE, f"request {request.id} was not opened"
            self._close(request)

    # Invariants

    def check(self, num_steps: int) -> None:
        """num_steps: those in flight."""
        members = [(slot, request) for slot, request in enumerate(self._members) if request is not None]
        assert self.size == len(members)
        assert sorted([*self._order.tolist(), *self._joined]) == [slot for slot, _ in members]
        assert (self._generation == [NONE if r is None else r.generation for r in self._members]).all()
        for slot, request in members:
            known, total = int(self._known[slot]), int(self._total[slot])
            assert request.slot == slot and request.num_tokens == self._opened[slot]
            assert request.num_tokens <= known <= total <= request.max_len
            assert total - known <= num_steps
            assert total - 1 <= request.capacity == self._capacity[slot]
            assert known - request.num_tokens <= WIDTH and known <= max(self._alarm[slot], request.num_tokens)


def _first_tokens(result: StepResult) -> Int32:
    """[B]: each row's first token, NONE for rows without."""
    tokens = np.full(len(result.counts), NONE, dtype=np.int32)
    some = result.counts > 0
    tokens[some] = result.token_ids[(np.cumsum(result.counts) - result.counts)[some]]
    return tokens


def _updates(rows: Sequence[Handle], which: list[int], tokens: list[int]) -> list[Update]:
    new = tuple.__new__  # Update's own is slower
    return [new(Update, (rows[i][0], (tokens[i],), None, None, None, None, 0, None)) for i in which]
