"""One token budget: which tokens of which requests run next.

There is no prefill phase and no decode phase: in each step every request's `num_computed` moves towards its length,
counting tokens in flight, under `max_num_batched_tokens`; running requests first, then waiting ones. Scheduling never
looks at token values, so the next step may be scheduled while one is in flight. It follows that a preempted request
gets its token in flight at commit, and is admitted again only when all its tokens are known; and that a request which
has ended meanwhile leaves one row without an owner (a dead row), which commit drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Literal

from nanoengine.api.errors import RequestError, engine_failure, is_failure
from nanoengine.api.policy_checks import CheckedPolicy
from nanoengine.api.stats import EngineStats
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.block_manager import BlockManager, Hits
from nanoengine.core.scheduling.commit import commit_rows, take_back_rows
from nanoengine.core.scheduling.draft import Draft, TokenBudget, build_plan
from nanoengine.core.scheduling.messages import Admission, ScheduledStep, SchedulerConfig, Update
from nanoengine.core.scheduling.queues import Roster, refuse_misfit
from nanoengine.core.scheduling.speculation import Speculation
from nanoengine.core.step import GRAPH_DECODE, GRAPH_MISSING, GRAPH_MIXED, GRAPH_TAIL, StepPlan, StepResult, num_slots

LEAST_FORCED = 3  # tokens: for fewer it is not worth that a request misses a step before and behind their row
Verdict = Literal["admitted", "waits", "no room", "failed"]  # "waits": for a hit that this very step computes


class Scheduler:
    """Owns the requests between `add` and their last `Update`, their slots and, through `blocks`, their KV blocks.

    Not thread-safe. At most one step may be in flight when `schedule` is called; steps are committed in order.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        policy: CheckedPolicy,
        speculation: Speculation | None = None,
    ) -> None:
        self.config, self.blocks, self.policy, self._speculation = config, blocks, policy, speculation
        self._runs_ahead = speculation is not None and speculation.on_device  # with drafts
        self._stats = EngineStats()
        slots = num_slots(config.max_num_seqs, config.spare_slots)
        self._roster = Roster(slots, self.policy, blocks, self._stats, speculation)
        self.waiting, self.running = self._roster.waiting, self._roster.running
        self._in_flight: dict[int, ScheduledStep] = {}  # by step number, oldest first
        self._first: Request | None = None  # whose turn it is: the last budget had nothing left for it
        self._budget = TokenBudget(config.max_num_batched_tokens)
        self._pending: list[Update] = []
        self._next_step = 0

    # What the engine calls

    def add(self, request: Request) -> None:
        """Queues a request, and sets its `max_len` and `min_len`. Raises `RequestError` where it could never run."""
        refuse_misfit(request, self.config, self.blocks)
        limit = self.config.max_model_len + (request.params.pooling is not None)  # a vector takes no place
        request.max_len = min(limit, request.prompt_len + (request.params.max_tokens or limit))
        request.min_len = min(request.min_len, limit + 1)  # of what is never reached a plan's int32 need not hold more
        unseen = self._runs_ahead and request.host_states  # what a state gives depends on drafts
        request.drafted = self._speculation is not None and request.params.speculate and not unseen
        request.block_hashes = request.block_hashes or self.blocks.hashes_of(request.prompt_bytes, request.cache_key)
        self._roster.add(request)

    def abort(self, request: Request) -> None:
        """Removes a request at once, also one that a stop string ended. Its rows in flight are dropped at commit.
        Idempotent."""
        if request.status is not Status.FINISHED:
            self._roster.remove(request)

    def stats(self) -> EngineStats:
        """A copy of the counters, with the blocks and the requests as they are now."""
        return replace(
            self._stats,
            num_blocks=self.blocks.num_blocks,
            free_blocks=self.blocks.free_blocks,
            running=len(self.running),
            waiting=len(self.waiting),
            drafted_per_position=self._stats.drafted_per_position.copy(),
            accepted_per_position=self._stats.accepted_per_position.copy(),
        )

    def take_updates(self) -> list[Update]:
        """What happened to requests outside of any step's result; to be read after each `schedule`, None or not.

        A request that ended because the cache is full with nothing in flight, and those over which `schedule` itself
        raised.
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
            budget = min(self._budget.now, self.config.max_num_batched_tokens)
            draft = Draft(self._next_step, budget, first=self._first)
            try:
                self._fill(draft)
                if not (draft.slots or draft.prefill):
                    return None
                plan = build_plan(draft)
                break
            except BaseException as error:
                if not is_failure(error) or not (self.running or self.waiting):
                    raise
                self._fail_one(draft, error)
        return self._scheduled(draft, plan)

    def _fill(self, draft: Draft) -> None:
        while self._roster.failed:
            self._fail(draft, *self._roster.failed.popitem())
        if self._roster.retry_alone:
            if self._in_flight:  # steps in flight break together: a retried request is to be alone
                return
            self._pick_retried(draft)
        if not (draft.slots or draft.prefill):
            self._pick_running(draft)
            if self.waiting and not draft.preempted and not self._roster.retry_alone:
                self._admit_waiting(draft)

    def _pick_running(self, draft: Draft) -> None:
        """A row for each running request, as far as the budget goes. Most need no more than one token more: below
        `pick_check_at`, and at it with a block more, such a row is booked right here, as `Draft.book` would."""
        order = self.running.copy() if self._first is None else self._roster.service_order(self._first)
        self._first, slots, starts, budget = None, draft.slots, draft.starts, draft.budget
        for request in order:
            length = request.length
            if length == request.pick_check_at < request.max_len and budget:
                draft.budget = budget
                if not self._make_room(request, length, draft):
                    continue
                budget, request.pick_check_at = draft.budget, min(request.max_len, request.capacity + 1)
            if length < request.pick_check_at and budget:
                if request.host_states:
                    draft.late = True
                slots.append(request.slot)
                starts.append(length - 1)
                request.num_computed, request.length = length, length + 1
                budget -= 1
                continue
            draft.budget = budget
            if request not in self._roster.retry_alone and not self._pick(request, draft):
                self._first = request
                break
            budget = draft.budget
        draft.budget = budget

    def _pick(self, request: Request, draft: Draft) -> bool:
        """Gives a running request as many of its tokens as budget and blocks allow. False: there is no budget left."""
        if request.length >= request.max_len:  # ends by length once its token in flight is committed
            draft.ending += request.num_in_flight == 1  # else its row in flight has drafts, and may bring less
        elif request.status is Status.RUNNING:  # and was not preempted by one before it
            most = self._most_drafts(request) if request.drafted or request.host_states else 0
            ahead = request.drafted and self._runs_ahead
            if most and not ahead and self._is_in_flight(request):  # its drafts follow its last token
                return True
            if not draft.budget:
                return False
            if self.config.whole_prompts and not draft.fits_whole(request.length - request.num_computed):
                return False
            num_new = min(request.length - request.num_computed, draft.budget)
            end = request.num_computed + num_new
            if end <= request.capacity or self._make_room(request, end, draft):
                if request in self._roster.unsent:
                    draft.new[request], draft.grown[request] = request.num_computed, 0
                drafts = self._drafts(request, num_new, most, draft) if most else ()
                if drafts is not None:
                    draft.book(request, num_new, drafts)
        return True

    def _most_drafts(self, request: Request) -> int:
        """How many drafts its next row may have: what its host states force, else what its drafter guesses. Not 0
        behind a row in flight with drafts that were forced: the next row begins where that one ends."""
        if request.jumps and request.num_in_flight > 1:
            return 1
        if request.num_computed == request.length - 1 and (count := num_forced(request, self.config)):
            return count
        return self._speculation.most(request) if self._speculation is not None and request.drafted else 0

    def _drafts(self, request: Request, num_new: int, most: int, draft: Draft) -> Sequence[int] | None:
        """At most so many, for a row of its next tokens. None: the drafter raised, and the request failed."""
        room = draft.room_for_drafts(request, num_new, most, self.blocks)
        request.jumps = num_forced(request, self.config) > 0
        if request.jumps:
            return request.forced[:room]
        try:
            return self._speculation.propose(request, room) if self._speculation is not None and room else ()
        except RequestError as error:
            self._fail(draft, request, error)
            return None

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
            victim = self.running[-1]
            draft.drop(victim)
            draft.preempted = True
            missing, free = self.blocks.blocks_for(end) - len(request.block_ids[0]), self.blocks.free_blocks
            self._roster.preempt(victim, f"{request.id} needs {missing} more KV blocks and {free} are free")
            if victim is request:
                return False
        draft.grown[request] = first
        return True

    def _end_for_blocks(self, request: Request) -> None:
        """No other request can give blocks back: it ends with the tokens it has, the one in flight included."""
        request.length_reason = "kv_cache_full"
        request.max_len, request.commit_check_at = request.length, 0
        if not request.num_in_flight:
            self._roster.remove(request)
            self._pending.append(Update(request, (), "length", request.length_reason))

    # Admission

    def _admit_waiting(self, draft: Draft) -> None:
        """In policy order. A request is overtaken only while it waits for a hit that this very step computes: no more
        than `max_num_seqs` are looked at beyond the admitted ones."""
        waiting, free_slots = self.waiting, self._roster.free_slots
        places = self._roster.places(self.config, draft.ending)
        if not (free_slots and draft.budget and places > 0):
            return
        draft.note_writers(self.blocks)
        at = waits = 0
        while waits < self.config.max_num_seqs and free_slots and draft.budget and places > 0:
            at = at if waits else self._roster.next()
            if at == len(waiting) or self._is_in_flight(request := waiting[at]):
                return
            if self._end_if_outgrown(request):
                continue
            verdict = self._consider(request, draft, self.config.admission_reserve * (len(self.running) - draft.ending))
            if verdict == "no room":
                return
            at, waits = at + (verdict == "waits"), waits + (verdict == "waits")
            places -= verdict == "admitted"

    def _consider(self, request: Request, draft: Draft, reserve: int = 0) -> Verdict:
        """Admits a waiting request, if there is room. Whatever that raises fails it."""
        try:
            if self.config.whole_prompts and not draft.fits_whole(request.num_tokens):
                return "no room"
            hits = self.blocks.match(request) if request.may_read_cache else self.blocks.no_hits()
            if request.may_read_cache and draft.writes_next_block(request, len(hits[0]), self.blocks):
                return "waits"
            return "admitted" if self._admit(request, hits, draft, reserve) else "no room"
        except BaseException as error:
            if not is_failure(error):
                raise
            self._fail(draft, request, error)
            return "failed"

    def _end_if_outgrown(self, request: Request) -> bool:
        """Whether it ended here, as a preempted request does whose known tokens alone have outgrown the pool."""
        if self.blocks.blocks_for(request.num_tokens) <= self.blocks.num_blocks:
            return False
        self._end_for_blocks(request)
        return True

    def _admit(self, request: Request, hits: Hits, draft: Draft, reserve: int) -> bool:
        """A slot, blocks and its first tokens, if there is room for all its known tokens and `reserve` blocks more."""
        if not self.blocks.claim(request, hits, request.num_tokens, reserve):
            return False
        cached = request.num_computed = request.borrowed = request.capacity
        self._roster.seat(request)
        num_new = min(request.num_tokens - cached, draft.budget)
        grew = self.blocks.grow(request, cached + num_new)
        assert grew, "claim() saw room for the whole request"
        draft.admit(request, num_new, cached, self.blocks)
        return True

    def _pick_retried(self, draft: Draft) -> None:
        """One request that is to be retried, alone. Where none can run, nothing is picked and the others go on, freeing
        blocks."""
        for request in self.running:
            if request in self._roster.retry_alone:
                self._pick(request, draft)
                return
        request = next(r for r in self.waiting if r in self._roster.retry_alone)
        if self._roster.free_slots and not self._end_if_outgrown(request):
            self._consider(request, draft)

    def _fail(self, draft: Draft, request: Request, error: BaseException) -> None:
        """Over this request something raised: it gets no row, and its update says why."""
        draft.drop(request)
        self._roster.remove(request)
        self._pending.append(Update(request, error=engine_failure(error)))

    def _fail_one(self, draft: Draft, error: BaseException) -> None:
        """Something raised while rows were picked or planned, so that blocks and the device's tables may not agree: all
        that run are preempted, and one fails: the newest whose row alone cannot be planned, else the newest."""
        running = sorted(self.running, key=attrgetter("admission"), reverse=True)
        cause = running[0] if running else next(iter(self._roster.retry_alone), self.waiting[0])
        for request in running:
            try:
                build_plan(draft.only(request))
            except BaseException as alone:
                if not is_failure(alone):
                    raise
                cause, error = request, alone
                break
        for request in running:
            draft.drop(request)
            self._roster.preempt(request, "scheduling raised")
        self._fail(draft, cause, error)

    def _scheduled(self, draft: Draft, plan: StepPlan) -> ScheduledStep:
        """The step counts as launched from here on."""
        self._next_step += 1
        owners, (preempted, self._roster.preempted) = self._roster.owners, (self._roster.preempted, [])
        step = ScheduledStep(
            plan=plan,
            rows=tuple(map(owners.__getitem__, plan.slots.tolist())),
            drawn=tuple(plan.query_lens[: plan.num_decode_rows].tolist() + [int(row.sampled) for row in draft.prefill]),
            admitted=tuple([
                Admission(r.id, r.slot, r.num_tokens, cached, r.generation > 1)
                for r, cached in draft.new.items() if r not in self._roster.unsent
            ]),
            preempted=tuple(preempted),
            first=draft.first,
        )  # fmt: skip
        self._roster.unsent.difference_update(draft.new)
        self._in_flight[plan.step] = step
        self._stats.steps += 1
        self._stats.chunks += step.drawn.count(0)
        self._stats.mixed_steps += bool(plan.num_decode_rows and draft.prefill)
        return step

    # Results

    def commit(self, step: ScheduledStep, result: StepResult) -> list[Update]:
        """Books the oldest step's result: appends tokens, ends requests, publishes blocks; dead rows are dropped."""
        assert result.step == step.plan.step == next(iter(self._in_flight), None), "steps are committed in order"
        del self._in_flight[result.step]
        self._budget.went_well()
        self._stats.graph_steps += bool(result.graphs & GRAPH_DECODE)
        self._stats.mixed_graph_steps += bool(result.graphs & GRAPH_MIXED)
        self._stats.graph_tails += bool(result.graphs & GRAPH_TAIL)
        self._stats.uncaptured_steps += bool(result.graphs & GRAPH_MISSING)
        rows = zip(step.rows, step.plan.drafts.tolist(), result.counts.tolist(), strict=False)  # without drafts: none
        drafted = [(r, most, max(0, n - 1)) for (r, _), most, n in rows if not (r.jumps or r.status is Status.FINISHED)]
        updates = commit_rows(step, result, self._roster)
        if self._speculation is not None:
            for request, most, accepted in drafted:
                self._speculation.committed(request, most, accepted)
                self._stats.count_drafts(most, accepted)
        return updates

    def fail(self, steps: Sequence[ScheduledStep]) -> list[Request]:
        """Steps that were launched and broke, oldest first. Steps launched after the first of them break with it.

        What they published is withdrawn, and their requests are preempted, to be recomputed: each is retried alone, in
        a step of its own and without run-ahead, until it has drawn a token. Returns the request of the first step if it
        was alone in it: it is the cause; the prefix index holds none of its blocks, and the scheduler has removed it.
        """
        self._stats.steps_broken += len(steps[0].rows) > 1
        for step in steps:
            del self._in_flight[step.plan.step]
            self.blocks.withdraw(step.published)
        failed = [r for r, _ in steps[0].rows if len(steps[0].rows) == 1 and r.status is not Status.FINISHED]
        for request in failed:
            self.blocks.bar(request)
        for step in steps:
            for (request, _), drawn in zip(step.rows, step.drawn, strict=True):
                if request.status is Status.FINISHED:
                    continue
                request.length -= drawn
                self._roster.retry_alone.add(request)
                if request.status is Status.RUNNING:
                    self._roster.preempt(request, f"step {step.plan.step} broke")
        for request in failed:
            self._roster.remove(request)
        return failed

    def withdraw(self, steps: Sequence[ScheduledStep]) -> list[Request]:
        """All steps in flight, oldest first, of which the oldest ran out of memory. None is booked any more: their rows
        run again in steps of fewer tokens, and are sent whole, as it is not known what the device has done.

        Requests keep slots, blocks and turns, but those admitted behind the oldest step go back to the queue: their
        hits may be what it was to compute, their places those of requests that it was to end. Returns the request of
        which memory does not hold a single token, or the whole prompt: the scheduler has removed it.
        """
        self._stats.steps_withdrawn += len(steps)
        for step in reversed(steps):
            del self._in_flight[step.plan.step]
            take_back_rows(step, self._roster, unadmit=step is not steps[0])
        assert not self._in_flight, "the steps behind one that ran out of memory are withdrawn with it"
        self._first = steps[0].first
        least = self.config.whole_prompts and len(steps[0].rows) == 1
        if self._budget.halve(steps[0].plan.num_tokens, least=least):
            return []
        failed = [request for request, _ in steps[0].rows if request.status is not Status.FINISHED]
        for request in failed:
            self._roster.remove(request)
        return failed


def num_forced(request: Request, config: SchedulerConfig) -> int:
    """How many of the tokens that must follow its newest row may be drafts."""
    count = min(len(request.forced), config.most_forced)
    return count if count >= LEAST_FORCED else 0
