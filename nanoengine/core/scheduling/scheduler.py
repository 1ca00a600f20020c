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
    ScheduledStep,
    SchedulerConfig,
    Update,
    append_token,
    append_tokens,
    cut,
    take_untold,
)
from nanoengine.core.scheduling.plan_builder import Picks, advance, build_plan, take_back
from nanoengine.core.scheduling.policy import Policy, make_policy
from nanoengine.core.scheduling.queues import Roster
from nanoengine.core.scheduling.steady import Rows, SteadyRows, may_be_steady
from nanoengine.core.step import ROW_BAD_LOGITS, StepResult, num_slots, offsets_of

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
        slots = num_slots(config.max_num_seqs, config.spare_slots)
        self._roster = Roster(slots, self.policy)
        self.waiting, self.running = self._roster.waiting, self._roster.running
        self._steady = SteadyRows(slots)
        self._in_flight: dict[int, ScheduledStep] = {}  # by step number, oldest first
        self._resume: Request | None = None  # the first one that the last budget had nothing left for
        self._suspects: set[Request] = set()
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
            draft = Draft(budget=self.config.max_num_batched_tokens)
            try:
                self._fill(draft)
                break
            except BaseException as error:
                if not is_failure(error) or not (self.running or self.waiting):
                    raise
                self._start_without_newest(error)
        while draft.picks or draft.steady:
            step = self._launch(draft)
            if step is not None:
                return step
        return None

    def _fill(self, draft: Draft) -> None:
        if self._suspects:
            if self._in_flight:  # a lone step's verdict must not fall on another one
                return
            self._pick_suspect(draft)
        if not draft.picks:
            self._pick_running(draft)
            if not draft.preempted and not self._suspects:
                self._admit_waiting(draft)
        if self._num_host:
            self._ask_host_processors(draft)

    def _pick_running(self, draft: Draft) -> None:
        picks, in_flight, suspects = draft.picks, self._in_flight, self._suspects
        if self._resume is not None:
            self._steady.leave_all()  # there is not enough for all at once
        order = self._steady.pick(draft, self.running, self.blocks) if self._steady.size else None
        if order is None:
            order, self._resume = self._roster.service_order(self._resume), None
        for request in order:
            if draft.steady and request in self._steady:
                self._steady.grow(request, draft, self.blocks)
                continue
            total = request.num_tokens + request.num_in_flight
            if total >= request.max_len:  # ends by length once its token in flight is committed
                draft.ending += 1
                continue
            if (
                request.status is not _RUNNING  # preempted by one before it
                or (request.host_tokens and request.last_step in in_flight)
                or (suspects and request in suspects)
            ):
                continue
            budget = draft.budget
            if not budget:
                self._resume = request
                return
            num_new = total - request.num_computed
            if num_new > budget:
                num_new = budget
            end = request.num_computed + num_new
            if end > request.capacity and not self._make_room(request, end, draft):
                continue
            picks[request] = num_new
            draft.budget -= num_new

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
        """Nobody is left to yield: it ends with the tokens it has, the one in flight included."""
        request.length_reason = "kv_cache_full"
        request.max_len = request.num_tokens + request.num_in_flight
        if not request.num_in_flight:
            self._remove(request)
            self._pending.append(Update(request, take_untold(request), "length", request.length_reason))

    def _preempt(self, victim: Request, why: str) -> None:
        """Its blocks and slot go; what it has in flight is appended at commit, and it waits for that."""
        self._preempted.append(Preemption(victim.id, victim.slot, victim.num_computed, why))
        self._release(victim)
        self._roster.enqueue(victim)
        self._stats.preemptions += 1

    # Admission

    def _admit_waiting(self, draft: Draft) -> None:
        """In policy order, nobody overtaking but past requests that will hit what this very step computes.

        Those are bounded: no more than `max_num_seqs` are looked at beyond the admitted ones.
        """
        waiting, free_slots = self.waiting, self._roster.free_slots
        places = self.config.max_num_seqs - (len(self.running) - draft.ending)
        if not (waiting and free_slots and draft.budget and places > 0):
            return
        draft.note_writers(self.blocks)
        at = 0
        while at < len(waiting) and at < self.config.max_num_seqs and free_slots and draft.budget and places > 0:
            request = waiting[at]
            if request.num_in_flight or request.last_step in self._in_flight:
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

    def _pick_suspect(self, draft: Draft) -> None:
        """One suspect alone. Where none can run, nothing is picked and the innocent go on, freeing blocks."""
        for request in self.running:
            if request in self._suspects:
                num_new = min(request.num_tokens - request.num_computed, draft.budget)
                end = request.num_computed + num_new
                if end <= request.capacity or self._make_room(request, end, draft):
                    draft.picks[request] = num_new
                return
        request = next(r for r in self.waiting if r in self._suspects)
        if self._roster.free_slots and not self._ends_unadmitted(request):
            self._consider(request, draft)

    def _ask_host_processors(self, draft: Draft) -> None:
        for request, num_new in list(draft.picks.items()):
            if not request.host_tokens or request.num_computed + num_new < request.num_tokens:
                continue
            error = ask_host_processors(request, draft.host_values)
            if error is not None:
                self._fail(request, draft, error)

    def _fail(self, request: Request, draft: Draft, error: BaseException) -> None:
        """Over this request something raised, or its processor failed: it gets no row, and its update says why."""
        draft.drop(request)
        self._remove(request)
        failure = error if isinstance(error, RequestError) else engine_failure(error)
        self._pending.append(Update(request, error=failure))

    def _start_without_newest(self, error: BaseException) -> None:
        """Something raised while rows were picked, so that blocks and the device's tables may not tell one story: all
        that run are preempted, and the newest of them fails."""
        running = self.running.copy()
        guilty = max(running, key=attrgetter("admitted")) if running else next(iter(self._suspects), self.waiting[0])
        for request in running:
            self._preempt(request, "scheduling raised")
        self._fail(guilty, Draft(0), error)

    def _launch(self, draft: Draft) -> ScheduledStep | None:
        """None: no plan could be made, and one request less is in the draft."""
        number = self._next_step
        picks = advance(draft.picks, number)
        steady = self._steady.advance() if draft.steady else None
        try:
            plan = build_plan(number, picks, draft.new, draft.grown, draft.host_values, steady)
        except BaseException as error:
            if not is_failure(error):
                raise
            self._unplanned(number, picks, draft, error)
            return None
        self._next_step += 1
        published = []
        for request, _, end, _ in picks.prefill:  # one stream: who reads these blocks is launched later
            published += self.blocks.publish(request, min(end, request.prompt_len))
        preempted, self._preempted = tuple(self._preempted), []
        step = ScheduledStep(
            plan=plan,
            rows=self._roster.owners(plan.slots.tolist()) if picks.decode or picks.prefill else self._steady.handles(),
            generations=self._roster.generations[plan.slots],
            sampled=(True,) * plan.num_decode_rows + tuple([row.sampled for row in picks.prefill]),
            published=tuple(published),
            admitted=tuple(
                [Admission(r.id, r.slot, r.num_tokens, cached, r.generation > 1) for r, cached in draft.new.items()]
            ),
            preempted=preempted,
        )
        self._in_flight[number] = step
        self._stats.steps += 1
        self._stats.chunks += len(step.sampled) - sum(step.sampled)
        self._stats.mixed_steps += bool(plan.num_decode_rows and picks.prefill)
        self._steady.step = number
        if picks.decode and plan.num_decode_rows >= self.config.steady_rows and self._is_calm(draft):
            for request in picks.decode:
                if request not in draft.new and may_be_steady(request):
                    self._steady.join(request)
        return step

    def _unplanned(self, number: int, picks: Picks, draft: Draft, error: BaseException) -> None:
        """No plan holds these rows: the newest whose own row cannot be planned either fails, else the newest."""
        take_back(picks, next(reversed(self._in_flight), -1))
        rows = sorted([*draft.picks, *(self._steady.take_back() if draft.steady else ())], key=attrgetter("admitted"))
        guilty = rows[-1]
        for request in reversed(rows):
            try:
                build_plan(number, picks.only(request), *draft.only(request))
            except BaseException as alone:
                if not is_failure(alone):
                    raise
                guilty, error = request, alone
                break
        self._fail(guilty, draft, error)
        draft.steady = self._steady.size > 0

    def _is_calm(self, draft: Draft) -> bool:
        """Whether decode rows are likely to stay: who becomes steady and leaves at once costs more than it saves."""
        short = self._suspects or draft.preempted or self._resume is not None
        return not short and self.blocks.free_blocks >= len(self.running)

    # Results

    def commit(self, step: ScheduledStep, result: StepResult) -> list[Update]:
        """Books the oldest step's result: appends tokens, ends requests, publishes blocks; dead rows are dropped."""
        plan = step.plan
        assert result.step == plan.step == next(iter(self._in_flight), None), "steps are committed in order"
        del self._in_flight[plan.step]
        self._stats.count_graphs(result.graphs)
        self._stats.steps_split += result.parts > 1
        updates, rows = self._steady.commit(step, result)
        if rows.size:
            self._commit_rows(step, result, rows, updates)
        return updates

    def _commit_rows(self, step: ScheduledStep, result: StepResult, which: Rows, updates: list[Update]) -> None:
        plan, num_rows = step.plan, len(step.rows)
        tokens = result.token_ids.tolist()
        drawn, prompts = cut(result.sampled_logprobs, num_rows), cut(result.prompt_logprobs, num_rows)
        plain = not (drawn or prompts)
        each = zip(
            which.tolist(),
            offsets_of(result.counts)[which].tolist(),
            result.counts[which].tolist(),
            result.failed[which].tolist(),
            (plan.starts[which] + plan.query_lens[which]).tolist(),
            strict=True,
        )
        for row, first, count, failure, end in each:
            request, generation = step.rows[row]
            if request.status is _FINISHED:
                continue
            if step.sampled[row]:
                request.num_in_flight -= 1
            if generation == request.void:
                continue
            if failure:
                if failure == ROW_BAD_LOGITS:  # nobody knows which of the blocks it read or wrote are bad
                    self.blocks.bar(request)
                    if request.borrowed and request.generation == generation:  # the fault may be another request's
                        request.void = generation
                        self._preempt(request, "its logits were not finite, over blocks that others had computed")
                        continue
                self._remove(request)
                updates.append(Update(request, failed=failure))
                continue
            if end >= request.publish_at and request.generation == generation:
                self.blocks.publish(request, end)
            told = None if plain else prompts.get(row)
            if told is not None:
                request.prompt_logprobs_done = int(told.positions[-1]) + 1
            if count:
                if plain and count == 1:
                    update = append_token(request, tokens[first])
                else:
                    update = append_tokens(request, tokens[first : first + count], drawn.get(row), told)
                updates.append(update)
                if update.finish_reason is not None:
                    self._remove(request)
                elif self._suspects:
                    self._suspects.discard(request)  # it came past the point where its step broke
            elif told is not None:
                updates.append(Update(request, prompt_logprobs=told))
            self._steady.close(request)

    def fail(self, steps: Sequence[ScheduledStep]) -> list[Request]:
        """Steps that were launched and broke, oldest first. Steps launched after the first of them break with it.

        What they published is withdrawn, and their requests are preempted, to be recomputed: they are suspects, run one
        a step and without run-ahead until each has drawn a token. Returns the request of the first step if it was
        alone in it: its fault is shown, the prefix index knows none of its blocks, and the scheduler has let go of it.
        """
        self._stats.steps_broken += len(steps[0].rows) > 1
        self._steady.leave_all()
        for step in steps:
            del self._in_flight[step.plan.step]
            self.blocks.withdraw(step.published)
        guilty = [r for r, _ in steps[0].rows if len(steps[0].rows) == 1 and r.status is not _FINISHED]
        for request in guilty:
            self.blocks.bar(request)
        oldest = next(reversed(self._in_flight), -1)  # the newest that still runs
        for step in steps:
            for (request, _), sampled in zip(step.rows, step.sampled, strict=True):
                if request.status is _FINISHED:
                    continue
                request.num_in_flight -= sampled
                request.last_step = oldest
                self._suspects.add(request)
                if request.status is _RUNNING:
                    self._preempt(request, f"step {step.plan.step} broke")
        for request in guilty:
            self._remove(request)
        return guilty

    # Letting go

    def _release(self, request: Request) -> None:
        """It owns nothing from here on. Slot and blocks may be reused at once: one stream orders the writes."""
        self._steady.leave(request)
        self.blocks.release(request)
        self._roster.drop(request)
        request.num_computed = 0

    def _remove(self, request: Request) -> None:
        self._release(request)
        self._num_host -= request.host_tokens
        self._suspects.discard(request)

    # Invariants

    def check(self) -> None:
        """Asserts every invariant of the scheduler and its blocks."""
        self.blocks.check(self.running)
        self._roster.check()
        self._steady.check(len(self._in_flight))
        for request in self.running:
            if request in self._steady:
                continue
            total = request.num_tokens + request.num_in_flight
            assert 0 <= request.num_computed <= total <= request.max_len
            assert request.num_in_flight in (0, 1, 2)[: len(self._in_flight) + 1]
        assert self._num_host == sum(request.host_tokens for request in (*self.running, *self.waiting))
        assert self._suspects <= {*self.running, *self.waiting}
