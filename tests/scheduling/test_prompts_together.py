"""Prompts that wait for each other where nearly all places are taken (`engine.prompts_together`)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from sched_harness import Loop, prompt_of

from nanoengine.build import _together
from nanoengine.core.scheduling import queues
from nanoengine.core.scheduling.messages import SchedulerConfig
from nanoengine.core.scheduling.queues import MOST_HELD, MOST_TOGETHER, Roster
from nanoengine.params.engine_options import EngineOptions

PLACES = 64  # of which 4 may stay free


def loop_of(tokens: int, places: int = PLACES, *, budget: int = 4096, **given) -> Loop:
    loop = Loop(num_blocks=4096, max_num_seqs=places, budget=budget, caching=False, **given)
    loop.checks = False
    loop.config = loop.scheduler.config = replace(loop.config, prompts_together=tokens)
    return loop


def churn(tokens: int, **given) -> Loop:
    """Prompts of 8 to 15 tokens and outputs of 16 to 79, of three times as many requests as there are places."""
    loop = loop_of(tokens, **given)
    for number in range(3 * PLACES):
        loop.add(prompt_of(8 + number % 8), max_tokens=16 + number * 37 % 64)
    loop.finish_and_verify()
    return loop


def entered(loop: Loop) -> list[int]:
    """How many prompts entered in each step beside many rows that decode."""
    full = [step for step in loop.steps if step.plan.num_decode_rows > 0.8 * PLACES]
    return [len(step.admitted) for step in full if step.admitted]


def check_they_enter_together() -> None:
    """As many as have the tokens that are asked for, and no more; every request gets its tokens."""
    loop, alone = churn(30), churn(0)
    together, one_by_one = entered(loop), entered(alone)
    assert sum(together) / len(together) > 1.5 * sum(one_by_one) / len(one_by_one)
    assert max(together) <= PLACES // 16
    assert len(loop.steps) < 1.1 * len(alone.steps), "places are free for long"


def test_prompts_enter_together() -> None:
    check_they_enter_together()


def check_a_lone_prompt_does_not_wait() -> None:
    """Nor do as many as there are free places."""
    loop = loop_of(1000)
    for _ in range(PLACES - 3):
        loop.add(prompt_of(4), max_tokens=40)
    for _ in range(3):
        loop.step()
    added = [loop.add(prompt_of(5)) for _ in range(2)]
    step = loop.launch()
    assert step is not None
    assert {admission.request for admission in step.admitted} == {request.id for request in added}
    loop.finish_and_verify()


def test_a_lone_prompt_does_not_wait() -> None:
    check_a_lone_prompt_does_not_wait()


def check_prompts_wait_for_few_steps(overlap: bool = False) -> None:
    """One place is free and no other becomes so: its prompt waits for so many steps, and enters."""
    loop = loop_of(1000, overlap=overlap)
    loop.add(prompt_of(4), max_tokens=4)
    for _ in range(PLACES - 1):
        loop.add(prompt_of(4), max_tokens=60)
    late = [loop.add(prompt_of(9), max_tokens=3) for _ in range(4)]
    loop.finish_and_verify()
    entered = [step.plan.step for step in loop.steps if late[0].id in {each.request for each in step.admitted}]
    assert entered == [4 + MOST_HELD]


@pytest.mark.parametrize("overlap", [False, True])
def test_prompts_wait_for_few_steps(overlap: bool) -> None:
    check_prompts_wait_for_few_steps(overlap)


@pytest.mark.parametrize("places", [1, 2, 16, 31, 32])
def test_with_few_places_prompts_enter_and_end(places: int) -> None:
    """Fewer than 32 places: none waits, as one that is free would be a tenth of them and more."""
    loops = [loop_of(tokens, places) for tokens in (0, 1000)]
    for loop in loops:
        for number in range(3 * places):
            loop.add(prompt_of(3 + number % 5), max_tokens=2 + number % 9)
        loop.finish_and_verify()
    alone, together = ([[each.request for each in step.admitted] for step in loop.steps] for loop in loops)
    assert (alone == together) == (places < 32)


def test_requests_that_are_aborted_while_they_wait_leave_no_place_empty() -> None:
    loop = loop_of(1000)
    for number in range(PLACES):
        loop.add(prompt_of(4), max_tokens=6 if number < 3 else 50)
    waiting = [loop.add(prompt_of(9), max_tokens=2) for _ in range(6)]
    for _ in range(8):
        loop.step()
    assert len(loop.scheduler.waiting) == 6, "they wait for each other"
    for request in waiting[:4]:
        loop.abort(request)
    step = loop.launch()
    assert step is not None
    assert len(step.admitted) == 2, "there is room for all that are left"
    loop.finish_and_verify()


def check_no_more_enter_than_a_graph_has_rows() -> None:
    """Of short prompts, and of many free places."""
    roster = Roster.__new__(Roster)
    roster._held = 0
    roster.waiting, roster.running = [SimpleNamespace(num_tokens=5)] * 90, [None] * 200  # type: ignore[list-item]
    config = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=99, prompts_together=99)
    assert roster.places(config, 0) == MOST_TOGETHER == 8


def test_no_more_enter_than_a_graph_has_rows() -> None:
    check_no_more_enter_than_a_graph_has_rows()


def check_nothing_waits_for_ever(seed: int) -> None:
    """Requests of all sizes, also one whose prompt takes several steps, with priorities, some of which are cancelled:
    each ends with its tokens, and none is held back for more steps than may be while places are free."""
    rng = random.Random(seed)
    places = rng.choice([32, 40, 48])
    policy = rng.choice(["fcfs", "priority"])
    loop = loop_of(rng.choice([10, 40, 200, 10**6]), places, budget=rng.choice([96, 256]), policy=policy)
    cancelled = set(rng.sample(range(3 * places), 12))
    added = [
        loop.add(
            prompt_of(200 if number == places + 5 else rng.randint(1, 24)),
            max_tokens=rng.randint(1, 30), priority=rng.randrange(3),
        )
        for number in range(3 * places)
    ]  # fmt: skip
    idle = 0
    while loop.scheduler.running or loop.scheduler.waiting or loop.in_flight:
        loop.step()
        for number in [number for number in cancelled if rng.random() < 0.05]:
            cancelled.discard(number)
            if added[number] not in loop.ended:
                loop.scheduler.abort(added[number])
        scheduler, step = loop.scheduler, loop.steps[-1]
        free = places - len(scheduler.running)
        idle = 0 if step.admitted or not free or not scheduler.waiting or not scheduler.running else idle + 1
        assert idle <= MOST_HELD + 2, "free places stay free"  # two steps are in flight
        full = step.plan.num_tokens == loop.config.max_num_batched_tokens
        assert free < places // 4 or not scheduler.waiting or step.admitted or full, "many places are free"
    loop.finish_and_verify()


@pytest.mark.parametrize("seed", range(10))
def test_nothing_waits_for_ever(seed: int) -> None:
    check_nothing_waits_for_ever(seed)


def held_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queues, "MOST_HELD", 10**9)


def all_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queues, "MOST_HELD", 0)


def without_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queues, "MOST_TOGETHER", 10**9)


def where_none_else_waits(patch: pytest.MonkeyPatch) -> None:
    """The scheduler believes that many requests wait."""
    places = Roster.places

    def broken(self, config, ending):
        self.waiting = (own := self.waiting) + own * PLACES
        try:
            return places(self, config, ending)
        finally:
            self.waiting = own

    patch.setattr(Roster, "places", broken)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (held_for_ever, check_prompts_wait_for_few_steps),
        (all_at_once, check_they_enter_together),
        (without_limit, check_no_more_enter_than_a_graph_has_rows),
        (where_none_else_waits, check_a_lone_prompt_does_not_wait),
    ],
)
def test_mutants(
    mutant: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    ("options", "hidden", "tokens"),
    [
        ({"device": "cuda:0"}, 1024, 1024),
        ({"device": "cuda:0"}, 2048, 0),
        ({"device": "cuda:0", "enforce_eager": True}, 1024, 0),
        ({"device": "cuda:0", "graph_mixed_steps": False}, 1024, 0),
        ({"device": "cpu"}, 1024, 0),
        ({"device": "cpu", "prompts_together": 99}, 4096, 99),
        ({"device": "cuda:0", "prompts_together": 0}, 1024, 0),
    ],
)
def test_by_default_prompts_of_small_models_wait_where_steps_are_graphs(options, hidden: int, tokens: int) -> None:
    built = SimpleNamespace(config=SimpleNamespace(hidden_size=hidden))
    assert _together(EngineOptions(**options), built) == tokens  # type: ignore[arg-type]
