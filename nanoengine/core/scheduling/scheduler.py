"""One token budget: which tokens of which requests run next, and what their results mean.

There is no prefill phase and no decode phase: in each step every request's `num_computed` moves towards its length,
counting tokens in flight, under `max_num_batched_tokens`; running requests first, then waiting ones. Scheduling never
looks at token values, so the next step may be scheduled while one is in flight. What that brings: a victim of
preemption gets its token in flight at commit and is re-admitted only with all its tokens known; a request that turns
out to have ended leaves one dead row, which commit drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Literal

from nanoengine.api.errors import RequestError, engine_failure, is_failure
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.block_manager import BlockManager, Hits
from nanoengine.core.scheduling.draft import Draft, ask_host_processors, may_read_cache, refuse_misfit
from nanoengine.core.scheduling.messages import (
    Admission,
    EngineStats,
    Preemption,
    RowResult,
    ScheduledStep,
    SchedulerConfig,
    Update,
    row_results,
)
from nanoengine.core.scheduling.plan_builder import build_plan
from nanoengine.core.scheduling.policy import Policy, make_policy
from nanoengine.core.scheduling.queues import Roster
from nanoengine.core.step import ROW_BAD_LOGITS, StepPlan, StepResult, num_slots

Verdict = Literal["admitted", "waits", "no room", "failed"]  # "waits": for a hit that this very step computes

_RUNNING, _FINISHED = Status.RUNNING, Status.FINISHED


class Scheduler:
    """Owns the requests between `add` and their last `Update`, their slots and, through `blocks`, their KV blocks.

    Not thread-safe. At most one step may be in flight when `schedule` is called; steps are committed in order.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, policy: Policy | None = None) -> None:
        self.config = config
        self.blocks = blocks
        self.policy = policy or make_policy(config.policy)
        self._stats = EngineStats()
        self._roster = Roster(num_slots(config.max_num_seqs, config.spare_slots), self.policy)
        self.waiting, self.running = self._roster.waiting, self._roster.running
        self._in_flight: dict[int, ScheduledStep] = {}  # by step number, oldest first
        self._resume: Request | None = None  # the first one that the last budget had nothing left for
        self._retry_alone: set[Request] = set()
        self._pending: list[Update] = []
        self._preempted: list[Preemption] = []  # since the last step
        self._num_host = 0  # live requests with host-token processors
        self._next_step = self._added = 0

    # The outside's wishes

    def add(self, request: Request) -> None:
        """Queues a request, and sets its `max_len` and `min_len`. Raises `RequestError` where it could never run."""
        refuse_misfit(request, self.config.max_model_len, self.blocks)
        limit, max_tokens = self.config.max_model_len, request.params.max_tokens
        request.max_len = limit if max_tokens is None else min(limit, request.prompt_len + max_tokens)
        request.min_len = min(request.min_len, limit + 1)  # of what is never reached a plan's int32 need not hold more
        self.blocks.prompt_hashes(request, 0, request.prompt_len)  # not amid a step
        request.order = self._added
        self._roster.enqueue(request)
        self._added += 1
        self._num_host += request.host_tokens

    def abort(self, request: Request) -> None:
        """Lets go of a request at once, also of one that a stop string ended. Its rows in flight are dropped at commit.
        Idempotent."""
        if request.status is not _FINISHED:
            self._remove(request)

    def stats(self) -> EngineStats:
        """A copy of the counters, with the blocks and the requests as they are now."""
        return replace(
            self._stats,
            num_blocks=self.blocks.num_blocks,
            free_blocks=self.blocks.free_blocks,
            running=len(self.running),
            waiting=len(self.waiting),
        )

    def take_updates(self) -> list[Update]:
        """What happened to requests outside of any step's result; to be read after each `schedule`, None or not.

        A request that ended because the cache is full with nothing in flight, failed host-token processors, and those
        over which `schedule` itself raised.
        """
        updates, self._pending = self._pending, []
        return updates

    # Scheduling

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None where nothing can be scheduled before the step in flight is committed.

        What raises meanwhile (a value that a plan cannot hold, a bug) fails one request: the one that was looked at or
        cannot be planned alone, else the newest admitted; then the rest is tried again, until there is a plan.
        """
        assert len(self._in_flight) < 2, "at most one step in flight when the next is scheduled"
        while True:
            draft = Draft(self._next_step, self.config.max_num_batched_tokens)
            try:
                self._fill(draft)
                break
            except BaseException as error:
                if not is_failure(error) or not (self.running or self.waiting):
                    raise
                self._start_without_newest(draft, error)
        while draft.slots or draft.prefill:
            step = self._launch(draft)
            if step is not None:
                return step
        return None

    def _fill(self, draft: Draft) -> None:
        if self._retry_alone:
            if self._in_flight:  # should it break, too, its cause is to be the retried request
                return
            self._pick_retried(draft)
        if not (draft.slots or draft.prefill):
            self._pick_running(draft)
            if self.waiting and not draft.preempted and not self._retry_alone:
                self._admit_waiting(draft)
        if self._num_host:
            self._ask_host_processors(draft)

    def _pick_running(self, draft: Draft) -> None:
        """A row for each running request, as far as the budget goes. Most need no more than one token more: below
        `pick_check_at` such a row is booked right here, as `Draft.book` would."""
        order = self.running.copy() if self._resume is None else self._roster.service_order(self._resume)
        self._resume = None
        slots, starts, budget = draft.slots, draft.starts, draft.budget
        for request in order:
            length = request.length
            if length < request.pick_check_at and budget:
                slots.append(request.slot)
                starts.append(length - 1)
                request.num_computed = length
                request.length = length + 1
                budget -= 1
                continue
            draft.budget = budget
            if request not in self._retry_alone and not self._pick(request, draft):
                self._resume = request
                return
            budget = draft.budget
        draft.budget = budget

    def _pick(self, request: Request, draft: Draft) -> bool:
        """Gives a running request as many of its tokens as budget and blocks allow. False: there is no budget left."""
        if request.length >= request.max_len:  # ends by length once its token in flight is committed
            draft.ending += 1
        elif (
            request.status is _RUNNING  # and was not preempted by one before it
            and not (request.host_tokens and self._is_in_flight(request))
        ):
            if not draft.budget:
                return False
            num_new = min(request.length - request.num_computed, draft.budget)
            end = request.num_computed + num_new
            if end <= request.capacity or self._make_room(request, end, draft):
                draft.book(request, num_new)
        return True

    def _is_in_flight(self, request: Request) -> bool:
        """Whether a step in flight holds a row of it."""
        return request.num_in_flight > 0 or request.last_prefill in self._in_flight

    def _make_room(self, request: Request, end: int, draft: Draft) -> bool:
        """Blocks for the request's first `end` tokens, by preemption if need be. False: it gets no row."""
        first = len(request.block_ids[0])
        while not self.blocks.grow(request, end):
            if len(self.running) == 1:
                self._end_for_blocks(request)
                return False
            victim = self.policy.victim(self.running)
            draft.drop(victim)
            draft.preempted = True
            missing = self.blocks.blocks_for(end) - len(request.block_ids[0])
            self._preempt(victim, f"{request.id} needs {missing} more KV blocks and {self.blocks.free_blocks} are free")
            if victim is request:
                return False
        draft.grown[request] = first
        return True

    def _end_for_blocks(self, request: Request) -> None:
        """No other request can give blocks back: it ends with the tokens it has, the one in flight included."""
        request.length_reason = "kv_cache_full"
        request.max_len, request.commit_check_at = request.length, 0
        if not request.num_in_flight:
            self._remove(request)
            self._pending.append(Update(request, (), "length", request.length_reason))

    def _preempt(self, victim: Request, why: str) -> None:
        """Its blocks and slot go; what it has in flight is appended at commit, and it waits for that."""
        self._preempted.append(Preemption(victim.id, victim.slot, victim.num_computed, why))
        self._release(victim)
        self._roster.enqueue(victim)
        self._stats.preemptions += 1

    # Admission

    def _admit_waiting(self, draft: Draft) -> None:
        """In policy order. A request is overtaken only while it waits for a hit that this very step computes: no more
        than `max_num_seqs` are looked at beyond the admitted ones."""
        waiting, free_slots = self.waiting, self._roster.free_slots
        places = self.config.max_num_seqs - (len(self.running) - draft.ending)
        if not (free_slots and draft.budget and places > 0):
            return
        draft.note_writers(self.blocks)
        at = 0
        while at < len(waiting) and at < self.config.max_num_seqs and free_slots and draft.budget and places > 0:
            request = waiting[at]
            if self._is_in_flight(request):
                return
            if self._ends_unadmitted(request):
                continue
            verdict = self._consider(request, draft, self.config.admission_reserve * (len(self.running) - draft.ending))
            if verdict == "no room":
                return
            at += verdict == "waits"
            places -= verdict == "admitted"

    def _consider(self, request: Request, draft: Draft, reserve: int = 0) -> Verdict:
        """Admits a waiting request, if there is room. Whatever that raises fails it."""
        try:
            readable = may_read_cache(request)
            hits = self.blocks.match(request) if readable else self.blocks.no_hits()
            if readable and draft.writes_next_block(request, len(hits[0]), self.blocks):
                return "waits"
            return "admitted" if self._admit(request, hits, draft, reserve) else "no room"
        except BaseException as error:
            if not is_failure(error):
                raise
            self._fail(request, draft, error)
            return "failed"

    def _ends_unadmitted(self, request: Request) -> bool:
        """A preempted request whose known tokens alone have outgrown the pool ends here."""
        if self.blocks.blocks_for(request.num_tokens) <= self.blocks.num_blocks:
            return False
        self._end_for_blocks(request)
        return True

    def _admit(self, request: Request, hits: Hits, draft: Draft, reserve: int) -> bool:
        """A slot, blocks and its first tokens, if there is room for all its known tokens and `reserve` blocks more."""
        if not self.blocks.claim(request, hits, request.num_tokens, reserve):
            return False
        self._roster.seat(request)
        cached = request.num_computed = request.borrowed = request.capacity
        self._stats.count_admission(request, cached)
        num_new = min(request.num_tokens - cached, draft.budget)
        grew = self.blocks.grow(request, cached + num_new)
        assert grew, "claim() saw room for the whole request"
        draft.admit(request, num_new, cached, self.blocks)
        return True

    def _pick_retried(self, draft: Draft) -> None:
        """One request that is to be retried, alone. Where none can run, nothing is picked and the others go on, freeing
        blocks."""
        for request in self.running:
            if request in self._retry_alone:
                self._pick(request, draft)
                return
        request = next(r for r in self.waiting if r in self._retry_alone)
        if self._roster.free_slots and not self._ends_unadmitted(request):
            self._consider(request, draft)

    def _ask_host_processors(self, draft: Draft) -> None:
        rows = [*draft.slots, *(request.slot for request, *_, sampled in draft.prefill if sampled)]
        for request in [self._roster.owners[slot][0] for slot in rows]:
            if request.host_tokens:
                error = ask_host_processors(request, draft.host_values)
                if error is not None:
                    self._fail(request, draft, error)

    def _fail(self, request: Request, draft: Draft, error: BaseException) -> None:
        """Over this request something raised, or its processor failed: it gets no row, and its update says why."""
        draft.drop(request)
        self._remove(request)
        failure = error if isinstance(error, RequestError) else engine_failure(error)
        self._pending.append(Update(request, error=failure))

    def _start_without_newest(self, draft: Draft, error: BaseException) -> None:
        """Something raised while rows were picked, so that blocks and the device's tables may not agree: all that run
        are preempted, and the newest of them fails."""
        running = self.running.copy()
        cause = max(running, key=attrgetter("admitted")) if running else next(iter(self._retry_alone), self.waiting[0])
        for request in running:
            draft.drop(request)
            self._preempt(request, "scheduling raised")
        self._fail(cause, draft, error)

    def _launch(self, draft: Draft) -> ScheduledStep | None:
        """None: no plan could be made, and one request less is in the draft."""
        try:
            plan = build_plan(draft)
        except BaseException as error:
            if not is_failure(error):
                raise
            self._unplanned(draft, error)
            return None
        self._next_step += 1
        published = []
        for request, _, end, _ in draft.prefill:  # one stream: who reads these blocks is launched later
            published += self.blocks.publish(request, min(end, request.prompt_len))
        preempted, self._preempted = tuple(self._preempted), []
        owners = self._roster.owners
        step = ScheduledStep(
            plan=plan,
            rows=tuple([owners[slot] for slot in plan.slots.tolist()]),
            sampled=(True,) * plan.num_decode_rows + tuple([row.sampled for row in draft.prefill]),
            published=tuple(published),
            admitted=tuple(
                [Admission(r.id, r.slot, r.num_tokens, cached, r.generation > 1) for r, cached in draft.new.items()]
            ),
            preempted=preempted,
        )
        self._in_flight[plan.step] = step
        self._stats.steps += 1
        self._stats.chunks += len(step.sampled) - sum(step.sampled)
        self._stats.mixed_steps += bool(plan.num_decode_rows and draft.prefill)
        return step

    def _unplanned(self, draft: Draft, error: BaseException) -> None:
        """No plan holds these rows: the newest whose own row cannot be planned either fails, else the newest."""
        slots = [*draft.slots, *(row.request.slot for row in draft.prefill)]
        rows = sorted([self._roster.owners[slot][0] for slot in slots], key=attrgetter("admitted"))
        cause = rows[-1]
        for request in reversed(rows):
            try:
                build_plan(draft.only(request))
            except BaseException as alone:
                if not is_failure(alone):
                    raise
                cause, error = request, alone
                break
        self._fail(cause, draft, error)

    # Results

    def commit(self, step: ScheduledStep, result: StepResult) -> list[Update]:
        """Books the oldest step's result: appends tokens, ends requests, publishes blocks; dead rows are dropped.

        Most decode rows bring one token and nothing else: below `commit_check_at` it is appended right here.
        """
        plan = step.plan
        assert result.step == plan.step == next(iter(self._in_flight), None), "steps are committed in order"
        del self._in_flight[plan.step]
        self._stats.steps_split += result.parts > 1
        if result.graphs:
            self._stats.count_graphs(result.graphs)
        updates: list[Update] = []
        plain, new = _num_plain(plan, result), tuple.__new__  # quicker than Update's own
        for (request, generation), token in zip(step.rows, result.token_ids[:plain].tolist(), strict=False):
            output = request.output_token_ids
            if len(output) < request.commit_check_at and token not in request.stop_set:
                output.append(token)
                updates.append(new(Update, (request, (token,), None, None, None, None, 0, None)))
            else:
                self._commit_row(request, generation, RowResult(request.num_tokens, True, (token,)), updates)
        if plain < len(step.rows):
            for (request, generation), row in zip(step.rows[plain:], row_results(step, result, plain), strict=True):
                self._commit_row(request, generation, row, updates)
        return updates

    def _commit_row(self, request: Request, generation: int, row: RowResult, updates: list[Update]) -> None:
        if request.status is _FINISHED:
            return
        if generation == request.void:
            request.length -= row.sampled
            return
        if row.failed:
            request.length -= row.sampled
            self._fail_row(request, generation, row.failed, updates)
            return
        current = request.generation == generation
        if current and row.end >= request.publish_at:
            self.blocks.publish(request, row.end)
        prompt = row.prompt_logprobs
        if prompt is not None:
            request.prompt_logprobs_done = int(prompt.positions[-1]) + 1
        if row.token_ids:
            new, finish_reason, stop_reason = request.append(row.token_ids)
            updates.append(Update(request, tuple(new), finish_reason, stop_reason, row.sampled_logprobs, prompt))
            if finish_reason is not None:
                self._remove(request)
                return
            self._retry_alone.discard(request)  # it came past the point where its step broke
            if current:
                request.commit_check_at = min(request.publish_at, request.max_len - 1) - request.prompt_len
        elif prompt is not None:
            updates.append(Update(request, prompt_logprobs=prompt))

    def _fail_row(self, request: Request, generation: int, failed: int, updates: list[Update]) -> None:
        if failed == ROW_BAD_LOGITS:  # which of the blocks it read or wrote are bad, nothing says
            self.blocks.bar(request)
            if request.borrowed and request.generation == generation:  # the fault may be another request's
                request.void = generation
                self._preempt(request, "its logits were not finite, over blocks that others had computed")
                return
        self._remove(request)
        updates.append(Update(request, failed=failed))

    def fail(self, steps: Sequence[ScheduledStep]) -> list[Request]:
        """Steps that were launched and broke, oldest first. Steps launched after the first of them break with it.

        What they published is withdrawn, and their requests are preempted, to be recomputed: each is retried alone, in
        a step of its own and without run-ahead, until it has drawn a token. Returns the request of the first step if it
        was alone in it: it is the cause, the prefix index knows none of its blocks, and the scheduler has let go of it.
        """
        self._stats.steps_broken += len(steps[0].rows) > 1
        for step in steps:
            del self._in_flight[step.plan.step]
            self.blocks.withdraw(step.published)
        failed = [r for r, _ in steps[0].rows if len(steps[0].rows) == 1 and r.status is not _FINISHED]
        for request in failed:
            self.blocks.bar(request)
        for step in steps:
            for (request, _), sampled in zip(step.rows, step.sampled, strict=True):
                if request.status is _FINISHED:
                    continue
                request.length -= sampled
                self._retry_alone.add(request)
                if request.status is _RUNNING:
                    self._preempt(request, f"step {step.plan.step} broke")
        for request in failed:
            self._remove(request)
        return failed

    # Letting go

    def _release(self, request: Request) -> None:
        """It owns nothing from here on. Slot and blocks may be reused at once: one stream orders the writes."""
        self.blocks.release(request)
        self._roster.drop(request)
        request.num_computed = request.pick_check_at = request.commit_check_at = 0

    def _remove(self, request: Request) -> None:
        self._release(request)
        self._num_host -= request.host_tokens
        self._retry_alone.discard(request)

    # Invariants

    def check(self) -> None:
        """Asserts every invariant of the scheduler and its blocks."""
        self.blocks.check(self.running)
        self._roster.check()
        for request in self.running:
            assert 0 <= request.num_computed <= request.length <= request.max_len
            assert request.num_in_flight in (0, 1, 2)[: len(self._in_flight) + 1]
            if request.pick_check_at:
                assert request.num_computed == request.length - 1 >= request.prompt_len and not request.host_tokens
                assert request.pick_check_at <= min(request.max_len, request.capacity + 1)
            if request.commit_check_at:
                assert request.commit_check_at <= min(request.publish_at, request.max_len - 1) - request.prompt_len
        for request in self.waiting:
            assert request.pick_check_at == request.commit_check_at == 0
        assert self._num_host == sum(request.host_tokens for request in (*self.running, *self.waiting))
        assert self._retry_alone <= {*self.running, *self.waiting}


def _num_plain(plan: StepPlan, result: StepResult) -> int:
    """How many of the first rows brought one token each and nothing else: the decode rows, or none."""
    rows = plan.num_decode_rows
    return 0 if len(result.sampled_logprobs.rows) or (result.counts[:rows] != 1).any() else rows
