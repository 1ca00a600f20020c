"""Steps that run out of memory are withdrawn: nothing of them stays booked, no request is preempted for it, and what
runs again is sent whole. On the numpy runner, whose state a failed step leaves in disorder."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_harness import VOCAB, BreakingLoop, Op, grammar_processor, prompt_of, random_ops, run_ops, shift_processor

from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling import draft
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.draft import Draft, TokenBudget
from nanoengine.core.scheduling.messages import ScheduledStep, Update
from nanoengine.core.scheduling.queues import Roster
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import NewSlots, StepPlan, SuppliedColumn
from nanoengine.testing.invariants import check_scheduler


class ShortLoop(BreakingLoop):
    """The device has memory for `limit` tokens at once. A larger step raises when it is launched, as on a GPU, once the
    steps before it have ended; or when it is waited for, as on a CPU, where the step behind it is in flight by then."""

    def __init__(self, limit: int, *, at_launch: bool, **options: Any) -> None:
        super().__init__(False, **options)
        self.limit, self.short_at_launch = limit, at_launch
        self.rng = np.random.default_rng(0)
        self.withdrawn: list[ScheduledStep] = []
        self.unadmitted = self.in_a_row = 0
        self.heavy: Request | None = None  # a step that holds a row of it runs out of memory, too
        self.sizes: list[int] = []  # of the steps that ran
        self.short: list[int] = []  # numbers of the steps in flight, from the one that ran out of memory on
        self.run_step = self.runner.launch
        self.runner.launch = self.launch_plan  # type: ignore[method-assign]
        self.finish_step = self.runner.supply
        self.runner.supply = self.supply_plan  # type: ignore[method-assign]

    def launch(self) -> ScheduledStep | None:
        before = len(self.withdrawn)
        step = super().launch()
        return step if len(self.withdrawn) == before else self.withdrawn[-1]

    def broke_at_launch(self, step: ScheduledStep) -> bool:
        assert step.plan.num_rows <= self.config.max_num_seqs
        if not self.short_at_launch or self.fits(step.plan):
            return super().broke_at_launch(step)
        self.leave_in_disorder(step.plan)
        while self.in_flight:
            self.commit()
        self.withdraw([step])
        return True

    def launch_plan(self, plan: StepPlan) -> None:
        if not self.short and self.fits(plan):
            self.sizes.append(plan.num_tokens)
            self.run_step(plan)
            return
        if not self.short:  # what is behind it does not run
            self.leave_in_disorder(plan)
        self.short.append(plan.step)

    def supply_plan(self, columns: Sequence[SuppliedColumn]) -> None:
        if not self.short:
            self.finish_step(columns)

    def fits(self, plan: StepPlan) -> bool:
        heavy = self.heavy is not None and self.heavy.status is Status.RUNNING and self.heavy.slot in plan.slots
        return plan.num_tokens <= self.limit and not heavy

    def leave_in_disorder(self, plan: StepPlan) -> None:
        """The plan was right; its rows' slots and KV are whatever the failed step has made of them."""
        runner, rng = self.runner, self.rng
        runner._enter(plan.new)
        for column in plan.columns:
            runner._set_column(column)
        runner.block_tables[plan.appends.group, plan.appends.slot, plan.appends.index] = plan.appends.block
        runner._check_plan(plan)
        for cache, slots in zip(runner.kv, runner.written_slots(plan), strict=True):
            cache.reshape(-1)[slots] = 54321
        for slot in plan.slots.tolist():
            runner.lengths[slot], runner.computed[slot] = rng.integers(0, runner.token_ids.shape[1], 2)
            runner.token_ids[slot] = rng.integers(0, VOCAB, runner.token_ids.shape[1])
            runner.block_tables[:, slot] = rng.integers(0, runner.kv.shape[1], runner.block_tables[:, slot].shape)
            runner.columns[slot] = {("shift", "shift"): int(rng.integers(9))}
            runner.slots[slot] = {"seed": 1, "index": 1, "min_len": 0, "stop_ids": set(), "num_logprobs": -1}

    def commit(self) -> list[Update]:
        if self.in_flight[0].plan.step not in self.short:
            self.in_a_row = 0
            return super().commit()
        self.spoil()
        return []

    def spoil(self) -> None:
        if not self.short:
            super().spoil()
            return
        while self.in_flight[0].plan.step not in self.short:
            self.commit()
        steps = list(self.in_flight)
        self.in_flight.clear()
        self.runner.drop()
        self.unsupplied = None
        self.short.clear()
        self.withdraw(steps)

    def withdraw(self, steps: Sequence[ScheduledStep]) -> None:
        scheduler = self.scheduler
        preemptions, waiting = scheduler.stats().preemptions, list(scheduler.waiting)
        held = {request: [list(table) for table in request.block_ids] for request in scheduler.running}
        slots = {request: request.slot for request in scheduler.running}
        failed = scheduler.withdraw(steps)
        check_scheduler(scheduler)
        assert scheduler.stats().preemptions == preemptions
        behind = {each.request for step in steps[1:] for each in step.admitted}
        for request, blocks in held.items():
            if request in failed:
                assert steps[0].plan.num_tokens == 1
                assert request.status is Status.FINISHED
            elif request.id in behind:
                assert request.status is Status.WAITING
            else:
                assert (request.status, request.slot) == (Status.RUNNING, slots[request])
                assert request.block_ids == blocks
            assert not request.num_in_flight
        assert {*scheduler.waiting} - {*waiting} == {r for r in held if r.id in behind and r not in failed}
        assert len(scheduler.running) <= self.config.max_num_seqs
        self.in_a_row += 1
        assert self.in_a_row < 40, "steps do not become smaller"
        self.withdrawn += steps
        self.unadmitted += len(behind)
        self.failed += failed
        for request in failed:
            self.ended[request] = Update(request, error=RequestError("out_of_memory", "by the engine"))

    def finish_and_verify(self) -> None:
        super().finish_and_verify()
        stats, admitted = self.scheduler.stats(), [r for r in self.requests if r.num_cached is not None]
        assert stats.steps_withdrawn == len(self.withdrawn)
        assert stats.prompt_tokens == sum(request.prompt_len for request in admitted)
        assert stats.prefix_hit_tokens == sum(request.num_cached or 0 for request in admitted)


def both_ways(test: Any) -> Any:
    return pytest.mark.parametrize(
        "way", [{"at_launch": True}, {"at_launch": False}, {"at_launch": False, "overlap": False}], ids=str
    )(test)


LOOPS = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([8, 14, 60]),
        "block_size": st.sampled_from([1, 4]),
        "budget": st.sampled_from([3, 8, 40, 64]),
        "max_num_seqs": st.sampled_from([2, 3, 8]),
        "caching": st.booleans(),
        "policy": st.sampled_from(["fcfs", "priority", "fair"]),
        "overlap": st.booleans(),
        "groups": st.sampled_from([1, 2]),
        "at_launch": st.booleans(),
    }
)


def run_short(seed: int, loop: ShortLoop, *, breaks: bool = False, count: int = 40, pooling: float = 0.0) -> ShortLoop:
    """Random operations, while the limit changes."""
    rng = random.Random(seed)
    ops: list[Op] = []
    for op in random_ops(rng, count, breaks=breaks, pooling=pooling):
        if rng.random() < 0.2:
            ops.append(("limit", rng.choice((1, 2, 3, 5, 8, 20, 64))))
        ops.append(op)
    run_ops(loop, ops)
    return loop


@settings(max_examples=40)
@given(st.integers(0, 1 << 20), st.integers(1, 20), st.booleans(), st.sampled_from([0.0, 0.4]), LOOPS)
def test_any_operations_while_memory_is_short(
    seed: int, limit: int, breaks: bool, pooling: float, options: dict[str, Any]
) -> None:
    loop = run_short(seed, ShortLoop(limit, **options), breaks=breaks, pooling=pooling)
    assert breaks or not loop.failed, "each token fits"


def test_short_runs_do_what_they_claim() -> None:
    withdrawn = unadmitted = preemptions = 0
    for seed in range(30):
        rng = random.Random(seed)
        options = {"num_blocks": rng.choice((14, 30, 60)), "budget": rng.choice((8, 40)), "groups": rng.choice((1, 2))}
        loop = run_short(
            seed, ShortLoop(rng.choice((2, 5)), at_launch=seed % 3 == 0, max_num_seqs=4, **options), count=60
        )
        withdrawn += len(loop.withdrawn)
        unadmitted += loop.unadmitted
        preemptions += loop.scheduler.stats().preemptions
    assert withdrawn > 100
    assert unadmitted > 4
    assert preemptions > 20


@both_ways
def test_a_decode_batch_that_never_fits(way: dict[str, Any]) -> None:
    """256 rows where memory holds 200: no request is preempted, half of them run at a time, and all are tried ever more
    rarely."""
    loop = ShortLoop(1 << 30, num_blocks=4096, max_num_seqs=256, budget=1024, **way)
    for salt in range(256):
        loop.add(prompt_of(3, salt), max_tokens=40, logprobs=1 if salt % 5 == 0 else None)
    while any(request.num_tokens == request.prompt_len for request in loop.requests):
        loop.step()
    loop.limit, ran = 200, len(loop.sizes)
    loop.finish_and_verify()
    stats = loop.scheduler.stats()
    assert stats.preemptions == 0
    assert max(loop.sizes[ran:]) == 128
    tried = [step.plan.num_tokens for step in loop.withdrawn]
    assert 2 <= tried.count(256) <= 12, tried
    assert len(loop.ended) == 256


@both_ways
def test_the_budget_is_full_again_after_good_steps(way: dict[str, Any]) -> None:
    loop = ShortLoop(6, budget=64, **way)
    for salt in range(8):
        loop.add(prompt_of(20, salt), max_tokens=12)
    for _ in range(8):
        loop.step()
    assert loop.withdrawn
    assert max(loop.sizes) <= 6
    loop.limit, ran = 1 << 30, len(loop.sizes)
    for _ in range(60):
        loop.step()
        if not loop.scheduler.running:
            loop.add(prompt_of(64, len(loop.requests)), max_tokens=1)
    assert max(loop.sizes[ran:]) == 64
    loop.finish_and_verify()


def test_how_the_budget_follows_what_fits() -> None:
    budget = TokenBudget(1000)
    assert budget.halve(900)
    assert budget.now == 450
    assert budget.halve(401)
    assert budget.now == 200
    doubled, tried, good = [], 0, 0
    for _ in range(4000):  # 300 never fit
        good += 1
        before = budget.now
        budget.went_well()
        if budget.now > before:
            doubled.append((good, budget.now))
            good = 0
        if budget.now > 300:
            tried += 1
            assert budget.halve(budget.now)
    assert doubled[:5] == [(4, 400), (8, 400), (16, 400), (32, 400), (64, 400)]
    assert max(wait for wait, _ in doubled) == TokenBudget.MOST
    assert tried < 12
    for _ in range(4 * TokenBudget.MOST):
        budget.went_well()
    assert budget.now == 1000
    for _ in range(TokenBudget.MOST):  # it went well for so long that the next shortage is a new one
        budget.went_well()
    assert budget.halve(1000)
    for _ in range(TokenBudget.FEWEST):
        budget.went_well()
    assert budget.now == 1000
    for now in (500, 250, 125, 62, 31, 15, 7, 3, 1):
        assert budget.halve(budget.now)
        assert budget.now == now
    assert budget.halve(1), "a single token gets a second try"
    budget.went_well()
    assert budget.halve(1)
    assert not budget.halve(1)


@both_ways
def test_what_a_withdrawn_step_published_is_published_by_its_next_run(way: dict[str, Any]) -> None:
    """A second request, which waited for the hit, has it all the same; both are counted as admitted once."""
    loop = ShortLoop(1 << 30, **way)
    first = loop.add(prompt_of(20), max_tokens=2)
    second = loop.add(prompt_of(20), max_tokens=2)
    loop.heavy = first
    for _ in range(2 if loop.overlap else 1):
        loop.launch()
    if loop.in_flight:
        loop.commit()
    assert loop.withdrawn
    assert not loop.in_flight
    assert loop.unadmitted == (not way["at_launch"] and way.get("overlap", True))
    assert loop.cached(first) == 0, "what is not computed is not found"
    loop.heavy = None
    loop.finish_and_verify()
    stats = loop.scheduler.stats()
    assert (stats.prompt_tokens, stats.prefix_hit_tokens, stats.resumed_hit_tokens) == (40, second.num_cached, 0)
    assert (first.num_cached, second.num_cached) == (0, 16)
    assert loop.cached(first) == 5
    assert not any(each.resumed for step in loop.steps for each in step.admitted)


@both_ways
def test_a_request_of_which_no_token_fits_fails_alone(way: dict[str, Any]) -> None:
    """And soon: rows that were withdrawn have the next turn. The others end with their tokens, none is preempted."""
    loop = ShortLoop(1 << 30, max_num_seqs=32, num_blocks=512, budget=256, **way)
    for salt in range(32):
        loop.add(prompt_of(5, salt), max_tokens=30)
    for _ in range(5):
        loop.step()
    loop.heavy = loop.requests[20]
    steps = loop.scheduler.stats().steps
    while not loop.failed:
        loop.step()
    assert loop.scheduler.stats().steps - steps < 40
    loop.finish_and_verify()
    assert loop.failed == [loop.heavy]
    assert loop.scheduler.stats().preemptions == 0
    assert all(end.finish_reason == "length" for request, end in loop.ended.items() if request is not loop.heavy)


def test_no_token_fits_at_all() -> None:
    loop = ShortLoop(0, at_launch=True)
    for salt in range(5):
        loop.add(prompt_of(9, salt), processors=(shift_processor(2), grammar_processor()) if salt % 2 else ())
    loop.finish_and_verify()
    assert loop.failed == loop.requests


def crowded(loop: ShortLoop) -> ShortLoop:
    """The third request gets the place of one whose last token is in flight, in a step that is then withdrawn."""
    _, long, third = (loop.add(prompt_of(n, n), max_tokens=m) for n, m in ((3, 2), (100, 3), (4, 9)))
    loop.launch()
    loop.heavy = long
    loop.launch()
    loop.commit()
    step = loop.launch()
    assert step is not None
    assert [each.request for each in step.admitted] == [third.id]
    loop.heavy = None
    loop.finish_and_verify()
    return loop


CROWDED: dict[str, Any] = {"at_launch": False, "max_num_seqs": 2, "num_blocks": 80}


def test_no_step_gets_more_rows_than_max_num_seqs() -> None:
    assert crowded(ShortLoop(1 << 30, **CROWDED)).unadmitted == 1


@pytest.mark.parametrize("at_launch", [True, False])
def test_an_abort_before_a_withdrawn_row_runs_again(at_launch: bool) -> None:
    """Its slot goes to the next request, which is sent as a new one."""
    loop = ShortLoop(5, at_launch=at_launch, max_num_seqs=2, budget=16)
    gone, stays = loop.add(prompt_of(8)), loop.add(prompt_of(8, 1))
    while not loop.withdrawn:
        loop.step()
    slot = gone.slot
    assert slot >= 0
    loop.abort(gone)
    loop.add(prompt_of(6, 2))
    loop.finish_and_verify()
    assert any(each.slot == slot and each.request == "2" for step in loop.steps for each in step.admitted)
    assert gone not in loop.ended
    assert stays in loop.ended


def test_prompt_logprobs_and_host_states_of_withdrawn_rows() -> None:
    """Log-probs come once for each position, columns of host states for the token that is drawn at last."""
    loop = ShortLoop(7, at_launch=False, budget=30)
    for salt in range(6):
        processors = (grammar_processor(),) if salt % 2 else (shift_processor(salt),)
        loop.add(prompt_of(12, salt), prompt_logprobs=1, logprobs=2, processors=processors)
    loop.finish_and_verify()
    assert sum(len(step.plan.prompt_logprobs) > 4 for step in loop.withdrawn) > 1


# -- mutants -----------------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def _after_withdraw(patch: Patch, change: Callable[[Scheduler, dict[Request, tuple[int, int]]], None]) -> None:
    """`change` is given what num_computed and num_in_flight were before."""
    withdraw = Scheduler.withdraw

    def broken(self: Scheduler, steps: Sequence[ScheduledStep]) -> list[Request]:
        before = {r: (r.num_computed, r.num_in_flight) for r in self.running}
        failed = withdraw(self, steps)
        change(self, {r: kept for r, kept in before.items() if r.status is Status.RUNNING})
        return failed

    patch.setattr(Scheduler, "withdraw", broken)


def computed_stays(patch: Patch) -> None:
    def change(scheduler: Scheduler, before: dict[Request, tuple[int, int]]) -> None:
        for request, (computed, _) in before.items():
            request.num_computed = min(computed, request.num_tokens)

    _after_withdraw(patch, change)


def in_flight_stays(patch: Patch) -> None:
    def change(scheduler: Scheduler, before: dict[Request, tuple[int, int]]) -> None:
        for request, (_, in_flight) in before.items():
            request.length += in_flight

    _after_withdraw(patch, change)


def not_sent_again(patch: Patch) -> None:
    _after_withdraw(patch, lambda scheduler, before: scheduler._roster.unsent.clear())


def blocks_not_sent_again(patch: Patch) -> None:
    fill = Scheduler._fill

    def broken(self: Scheduler, drafted: Draft) -> None:
        fill(self, drafted)
        for request in self._roster.unsent:
            drafted.grown.pop(request, None)

    patch.setattr(Scheduler, "_fill", broken)


def sent_without_their_outputs(patch: Patch) -> None:
    """As new requests."""
    new_slots = draft._new_slots

    def broken(new: dict[Request, int]) -> NewSlots:
        return new_slots(dict.fromkeys(new, 0))

    patch.setattr(draft, "_new_slots", broken)


def published_stays(patch: Patch) -> None:
    patch.setattr(BlockManager, "withdraw", lambda self, published: None)


def admitted_behind_stay(patch: Patch) -> None:
    patch.setattr(Roster, "unseat", lambda self, request: None)


def counted_twice(patch: Patch) -> None:
    counted = Roster._count
    patch.setattr(Roster, "_count", lambda self, request, times: times > 0 and counted(self, request, times))


def the_same_step_again(patch: Patch) -> None:
    patch.setattr(TokenBudget, "halve", lambda self, tokens, **options: True)


MUTANTS = [
    computed_stays,
    in_flight_stays,
    not_sent_again,
    blocks_not_sent_again,
    sent_without_their_outputs,
    published_stays,
    admitted_behind_stay,
    counted_twice,
    the_same_step_again,
]


def short_runs() -> None:
    for seed in range(16):
        options = {"num_blocks": 30, "max_num_seqs": 4, "budget": (8, 40)[seed % 2], "at_launch": seed % 3 == 0}
        run_short(seed, ShortLoop(4, **options))
    crowded(ShortLoop(1 << 30, **CROWDED))
    test_what_a_withdrawn_step_published_is_published_by_its_next_run({"at_launch": False})


def test_no_mutant_no_failure() -> None:
    short_runs()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.__name__)
def test_mutants_are_caught(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, RecursionError)):
        short_runs()


def test_blocks_that_are_not_published_again_are_missed(monkeypatch: Patch) -> None:
    monkeypatch.setattr(BlockManager, "publish_again", lambda self, request: None)
    with pytest.raises(AssertionError):
        test_what_a_withdrawn_step_published_is_published_by_its_next_run({"at_launch": True})
