"""One token budget: which tokens of which requests run next, and what their results mean.

There is no prefill phase and no decode phase: in each step every request's `num_computed` moves towards its length,
counting tokens in flight, under `max_num_batched_tokens`; running requests first, then waiting ones. Scheduling never
looks at token values, so the next step may be scheduled while one is in flight. What that brings: a victim of
preemption gets its token in flight at commit and is re-admitted only with all its tokens known; a request that turns
out to have ended leaves one dead row, which commit drops.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from nanoengine.core.errors import RequestError
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.draft import Draft, ask_host_stages
from nanoengine.core.scheduling.messages import (
    EndReason,
    LogprobShares,
    ScheduledStep,
    SchedulerConfig,
    SchedulerStats,
    Update,
)
from nanoengine.core.scheduling.plan_builder import advance, build_plan
from nanoengine.core.scheduling.policy import Policy, make_policy
from nanoengine.core.step import StepResult

__all__ = ["ScheduledStep", "Scheduler", "SchedulerConfig", "SchedulerStats", "Update"]

_RUNNING, _WAITING, _FINISHED = Status.RUNNING, Status.WAITING, Status.FINISHED


class Scheduler:
    """Owns the requests between `add` and their last `Update`, their slots and, through `blocks`, their KV blocks.

    Not thread-safe. At most one step may be in flight when `schedule` is called; steps are committed in order.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, policy: Policy | None = None) -> None:
        self.config = config
        self.blocks = blocks
        self.policy = policy or make_policy(config.policy)
        self._stats = SchedulerStats()
        self.waiting: list[Request] = []  # sorted by the policy's waiting_key
        self.running: list[Request] = []  # sorted by the policy's running_key
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._handles: list[tuple[Request, int] | None] = [None] * config.max_num_seqs  # slot -> (owner, generation)
        self._in_flight: dict[int, ScheduledStep] = {}  # by step number, oldest first
        self._resume: Request | None = None  # the first one that the last budget had nothing left for
        self._suspects: set[Request] = set()
        self._pending: list[Update] = []
        self._num_host = 0  # live requests with host-token stages
        self._next_step = self._added = self._admissions = 0

    # The outside's wishes

    def add(self, request: Request) -> None:
        """Queues a request, and sets its `max_len`. Raises `RequestError` where it could never run."""
        self._refuse_misfit(request)
        limit, max_tokens = self.config.max_model_len, request.params.max_tokens
        request.max_len = limit if max_tokens is None else min(limit, request.prompt_len + max_tokens)
        request.order = self._added
        self._added += 1
        self._num_host += request.host_tokens
        insort(self.waiting, request, key=self.policy.waiting_key)

    def _refuse_misfit(self, request: Request) -> None:
        num_prompt, limit = request.prompt_len, self.config.max_model_len
        if num_prompt == 0:
            raise RequestError("invalid_prompt", "the prompt is empty: it must have one token at least")
        if num_prompt >= limit:
            raise RequestError(
                "too_long",
                f"the prompt has {num_prompt} tokens and max_model_len is {limit}, which must leave room for one new "
                f"token: shorten the prompt to {limit - 1} tokens or raise max_model_len",
            )
        need, have = self.blocks.blocks_for(num_prompt), self.blocks.num_blocks
        if need > have:
            raise RequestError(
                "does_not_fit",
                f"the prompt's {num_prompt} tokens need {need} KV blocks of {self.blocks.block_size} and the cache has "
                f"{have}: shorten the prompt or give the KV cache more memory",
            )

    def abort(self, request: Request) -> None:
        """Lets go of a request at once, rows in flight or not: they are dropped at commit. Idempotent."""
        if request.status is not _FINISHED:
            self._remove(request)

    def finish(self, request: Request) -> None:
        """The engine found its end (a stop string): mechanically an abort."""
        self.abort(request)

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting or self._pending)

    def stats(self) -> SchedulerStats:
        """The counters since the start, and the blocks as they are now."""
        return replace(self._stats, num_blocks=self.blocks.num_blocks, free_blocks=self.blocks.free_blocks)

    def take_updates(self) -> list[Update]:
        """What happened to requests outside of any step's result; to be read after each `schedule`, None or not.

        A request that ended because the cache is full with nothing in flight, and failed host-token stages.
        """
        updates, self._pending = self._pending, []
        return updates

    # Scheduling

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None where nothing can be scheduled before the step in flight is committed."""
        assert len(self._in_flight) < 2, "at most one step in flight when the next is scheduled"
        draft = Draft(budget=self.config.max_num_batched_tokens)
        if self._suspects:
            if self._in_flight:  # a lone step's verdict must not fall on another one
                return None
            self._pick_suspect(draft)
        if not draft.picks:
            self._pick_running(draft)
            if not draft.preempted and not self._suspects:
                self._admit_waiting(draft)
        if self._num_host:
            self._ask_host_stages(draft)
        return self._launch(draft) if draft.picks else None

    def _pick_running(self, draft: Draft) -> None:
        picks, in_flight, suspects = draft.picks, self._in_flight, self._suspects
        order, self._resume = self._service_order(), None
        for request in order:
            total = request.num_tokens + request.num_in_flight
            if (
                total >= request.max_len  # ends by length once its token in flight is committed
                or request.status is not _RUNNING  # preempted by one before it
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

    def _service_order(self) -> list[Request]:
        """The running requests in policy order; who found the last budget spent comes first in its tier."""
        first = self._resume
        if first is None or first.status is not _RUNNING:
            return self.running.copy()
        tier, at = self.policy.tier(first), self.running.index(first)
        before = [r for r in self.running[:at] if self.policy.tier(r) != tier]
        same = [r for r in self.running[:at] if self.policy.tier(r) == tier]
        after = [r for r in self.running[at:] if self.policy.tier(r) == tier]
        behind = [r for r in self.running[at:] if self.policy.tier(r) != tier]
        return before + after + same + behind

    def _make_room(self, request: Request, end: int, draft: Draft) -> bool:
        """Blocks for the request's first `end` tokens, by preemption if need be. False: it gets no row."""
        first = len(request.block_ids[0])
        while not self.blocks.grow(request, end):
            if len(self.running) == 1:
                self._end_for_blocks(request)
                return False
            victim = self.policy.victim(self.running)
            self._preempt(victim, draft)
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
            self._pending.append(Update(request, (), "length", request.length_reason))

    def _preempt(self, victim: Request, draft: Draft) -> None:
        draft.drop(victim)
        draft.preempted = True
        self._to_waiting(victim)
        self._stats.preemptions += 1

    def _to_waiting(self, request: Request) -> None:
        self._release(request)
        request.status = _WAITING
        insort(self.waiting, request, key=self.policy.waiting_key)

    # Admission

    def _admit_waiting(self, draft: Draft) -> None:
        """In policy order, nobody overtaking but past requests that will hit what this very step computes.

        Those are bounded: no more than `max_num_seqs` are looked at beyond the admitted ones.
        """
        waiting = self.waiting
        if not (waiting and self._free_slots and draft.budget):
            return
        draft.note_writers(self.blocks)
        at = 0
        while at < len(waiting) and at < self.config.max_num_seqs and self._free_slots and draft.budget:
            request = waiting[at]
            if request.num_in_flight or request.last_step in self._in_flight:
                return
            if self._ends_unadmitted(request):
                continue
            hits = self.blocks.match(request) if self._may_read_cache(request) else self.blocks.no_hits()
            if self._may_read_cache(request) and draft.writes_next_block(request, len(hits[0]), self.blocks):
                at += 1
            elif not self.blocks.claim(request, hits, request.num_tokens):
                return
            else:
                del waiting[at]
                self._admit(request, draft)

    @staticmethod
    def _may_read_cache(request: Request) -> bool:
        """Prompt log-probs need every prompt position computed, once."""
        return request.params.prompt_logprobs is None or request.prompt_logprobs_done >= request.prompt_len

    def _ends_unadmitted(self, request: Request) -> bool:
        """A preempted request whose known tokens alone have outgrown the pool ends here."""
        if self.blocks.blocks_for(request.num_tokens) <= self.blocks.num_blocks:
            return False
        self._end_for_blocks(request)
        return True

    def _admit(self, request: Request, draft: Draft) -> None:
        """Gives a request that has claimed its hits (and left `waiting`) a slot, and picks its first tokens."""
        request.slot = self._free_slots.pop()
        request.generation += 1
        request.status = _RUNNING
        request.admitted = self._admissions
        self._admissions += 1
        self._handles[request.slot] = (request, request.generation)
        insort(self.running, request, key=self.policy.running_key)
        cached = request.num_computed = request.capacity
        self._count_hits(request, cached)
        num_new = min(request.num_tokens - cached, draft.budget)
        grew = self.blocks.grow(request, cached + num_new)
        assert grew, "claim() saw room for the whole request"
        draft.admit(request, num_new, cached, self.blocks)

    def _count_hits(self, request: Request, cached: int) -> None:
        if request.num_cached is None:
            request.num_cached = cached
            self._stats.prompt_tokens += request.prompt_len
            self._stats.prefix_hit_tokens += cached
        else:
            self._stats.resumed_hit_tokens += cached

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
        if not self._free_slots or self._ends_unadmitted(request):
            return
        hits = self.blocks.match(request) if self._may_read_cache(request) else self.blocks.no_hits()
        if self.blocks.claim(request, hits, request.num_tokens):
            self.waiting.remove(request)
            self._admit(request, draft)

    def _ask_host_stages(self, draft: Draft) -> None:
        for request, num_new in list(draft.picks.items()):
            if not request.host_tokens or request.num_computed + num_new < request.num_tokens:
                continue
            error = ask_host_stages(request, draft.host_values)
            if error is not None:
                draft.drop(request)
                self._remove(request)
                self._pending.append(Update(request, error=error))

    def _launch(self, draft: Draft) -> ScheduledStep:
        number = self._next_step
        self._next_step += 1
        picks = advance(draft.picks, number)
        plan = build_plan(number, picks, draft.new, draft.grown, draft.host_values)
        published = []
        for request, _, end, _ in picks.prefill:  # one stream: who reads these blocks is launched later
            published += self.blocks.publish(request, min(end, request.prompt_len))
        handles = self._handles
        step = ScheduledStep(
            plan=plan,
            rows=tuple([handles[slot] for slot in plan.slots.tolist()]),
            sampled=(True,) * len(picks.decode) + tuple([row.sampled for row in picks.prefill]),
            published=tuple(published),
        )
        self._in_flight[number] = step
        self._stats.steps += 1
        self._stats.chunks += len(step.sampled) - sum(step.sampled)
        self._stats.mixed_steps += bool(picks.decode and picks.prefill)
        return step

    # Results

    def commit(self, step: ScheduledStep, result: StepResult) -> list[Update]:
        """Books the oldest step's result: appends tokens, ends requests, publishes blocks; dead rows are dropped."""
        plan = step.plan
        assert result.step == plan.step == next(iter(self._in_flight), None), "steps are committed in order"
        del self._in_flight[plan.step]
        tokens, counts, failed = result.token_ids.tolist(), result.counts.tolist(), result.failed.tolist()
        ends = (plan.starts + plan.query_lens).tolist()
        drawn = LogprobShares(result.sampled_logprobs, len(counts))
        prompts = LogprobShares(result.prompt_logprobs, len(counts))
        updates: list[Update] = []
        at = 0
        for row, (request, generation) in enumerate(step.rows):
            new = tuple(tokens[at : at + counts[row]])
            at += counts[row]
            if request.status is _FINISHED:
                continue
            if step.sampled[row]:
                request.num_in_flight -= 1
            if failed[row]:
                self._remove(request)
                updates.append(Update(request, failed=failed[row]))
                continue
            if ends[row] >= request.publish_at and request.generation == generation:
                self.blocks.publish(request, ends[row])
            prompt_logprobs = prompts.of(row)
            if prompt_logprobs is not None:
                request.prompt_logprobs_done = int(prompt_logprobs.positions[-1]) + 1
            if new:
                new, reason, stop_reason = self._append(request, new)
                updates.append(Update(request, new, reason, stop_reason, drawn.of(row), prompt_logprobs))
            elif prompt_logprobs is not None:
                updates.append(Update(request, prompt_logprobs=prompt_logprobs))
        return updates

    def _append(
        self, request: Request, new: tuple[int, ...]
    ) -> tuple[tuple[int, ...], EndReason | None, int | str | None]:
        """Appends tokens up to the one that ends the request -> (those appended, finish_reason, stop_reason)."""
        if self._suspects:
            self._suspects.discard(request)  # it came past the point where its step broke
        for i, token in enumerate(new, start=1):
            request.output_token_ids.append(token)
            request.num_tokens = num_tokens = request.num_tokens + 1
            if token in request.stop_set and num_tokens > request.min_len:
                self._remove(request)
                return new[:i], "stop", None if token in request.params.eos_ids else token
            if num_tokens >= request.max_len:
                self._remove(request)
                return new[:i], "length", request.length_reason
        return new, None, None

    def fail(self, steps: Sequence[ScheduledStep]) -> list[Request]:
        """Steps that were launched and broke, oldest first. Steps launched after the first of them break with it.

        What they published is withdrawn, and their requests are preempted, to be recomputed: they are suspects, run one
        a step and without run-ahead until each has drawn a token. Returns the request of the first step if it was
        alone in it: its fault is shown, and the scheduler has let go of it.
        """
        for step in steps:
            del self._in_flight[step.plan.step]
            self.blocks.withdraw(step.published)
        oldest = next(reversed(self._in_flight), -1)  # the newest that still runs
        for step in steps:
            for (request, _), sampled in zip(step.rows, step.sampled, strict=True):
                if request.status is _FINISHED:
                    continue
                request.num_in_flight -= sampled
                request.last_step = oldest
                self._suspects.add(request)
                if request.status is _RUNNING:
                    self._to_waiting(request)
                    self._stats.preemptions += 1
        guilty = [request for request, _ in steps[0].rows if len(steps[0].rows) == 1]
        guilty = [request for request in guilty if request.status is not _FINISHED]
        for request in guilty:
            self._remove(request)
        return guilty

    # Letting go

    def _release(self, request: Request) -> None:
        """Running -> owning nothing. Its slot and blocks may be reused at once: one stream orders the writes."""
        self.blocks.release(request)
        self.running.remove(request)
        self._handles[request.slot] = None
        self._free_slots.append(request.slot)
        request.slot = -1
        request.generation += 1
        request.num_computed = 0

    def _remove(self, request: Request) -> None:
        if request.status is _RUNNING:
            self._release(request)
        else:
            key = self.policy.waiting_key
            at = bisect_left(self.waiting, key(request), key=key)
            assert self.waiting[at] is request, f"request {request.id} is not in the queue"
            del self.waiting[at]
        request.status = _FINISHED
        self._num_host -= request.host_tokens
        self._suspects.discard(request)

    # Invariants

    def check(self) -> None:
        """Asserts every invariant of the scheduler and its blocks."""
        self.blocks.check(self.running)
        slots = [request.slot for request in self.running]
        assert sorted(slots + self._free_slots) == list(range(self.config.max_num_seqs)), "slots leaked or doubled"
        for name, queue, key in (
            ("waiting", self.waiting, self.policy.waiting_key),
            ("running", self.running, self.policy.running_key),
        ):
            assert all(key(a) < key(b) for a, b in pairwise(queue)), f"{name} is out of order"
        for request in self.running:
            total = request.num_tokens + request.num_in_flight
            assert request.status is _RUNNING and self._handles[request.slot] == (request, request.generation)
            assert 0 <= request.num_computed <= total <= request.max_len
            assert request.num_in_flight in (0, 1, 2)[: len(self._in_flight) + 1]
        for request in self.waiting:
            assert request.status is _WAITING and request.slot == -1 and not request.block_ids
            assert request.num_computed == 0
        for request in (*self.running, *self.waiting):
            assert request.num_tokens == request.prompt_len + len(request.output_token_ids)
        assert self._num_host == sum(request.host_tokens for request in (*self.running, *self.waiting))
        assert self._suspects <= {*self.running, *self.waiting}
