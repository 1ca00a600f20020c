"""Steady rows in columns are scheduled and committed as one by one: the same plans, the same news, in every step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from sched_harness import BreakingLoop, prompt_of, random_ops, random_request, run_ops
from test_properties import loops, operations

from nanoengine.core.scheduling import steady
from nanoengine.core.scheduling.messages import Update
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.scheduling.steady import WIDTH, SteadyRows
from nanoengine.distributed.wire import encode


class WatchedLoop(BreakingLoop):
    """Keeps the news of each step, and what the steady rows did."""

    def __init__(self, steady: bool, **options: Any) -> None:
        super().__init__(False, steady=steady, **options)
        self.news: list[set[tuple[Any, ...]]] = []
        self.members: list[int] = []
        self.fullest = 0

    def launch(self):
        step = super().launch()
        rows = self.scheduler._steady
        self.members.append(rows.size)
        self.fullest = max(self.fullest, int((rows._known - rows._opened).max()))
        return step

    def book(self, updates):
        updates = list(updates)
        self.news.append({told(update) for update in updates})
        assert len(self.news[-1]) == len(updates)
        super().book(updates)


def told(update: Update) -> tuple[Any, ...]:
    drawn, prompt = update.sampled_logprobs, update.prompt_logprobs
    return (
        update.request.id,
        update.new_token_ids,
        update.finish_reason,
        update.stop_reason,
        None if drawn is None else (*drawn.positions.tolist(), *drawn.token_ids.tolist(), *drawn.top_ids.tolist()),
        None if prompt is None else (*prompt.positions.tolist(), *prompt.logprobs.tolist()),
        update.failed,
        update.error and update.error.code,
    )


def both(ops: list[Any], **options: Any) -> WatchedLoop:
    """Runs `ops` both ways; gives the loop with steady rows."""
    columns, single = (WatchedLoop(steady, **options) for steady in (True, False))
    for loop in (columns, single):
        run_ops(loop, ops)
    assert not any(single.members)
    assert columns.news == single.news
    assert len(columns.steps) == len(single.steps)
    for a, b in zip(columns.steps, single.steps, strict=True):
        assert encode(a.plan) == encode(b.plan), f"step {a.plan.step} is another one"
        assert [(r.id, g) for r, g in a.rows] == [(r.id, g) for r, g in b.rows]
        assert np.array_equal(a.generations, b.generations)
        assert (a.sampled, a.published, a.admitted, a.preempted) == (b.sampled, b.published, b.admitted, b.preempted)
    assert columns.scheduler.stats() == single.scheduler.stats()
    return columns


@settings(max_examples=80)
@given(loops, operations)
def test_any_operations(options, ops):
    both(ops, **options)


def mixed_ops(seed: int) -> list[Any]:
    """Longer outputs than elsewhere, so that most rows of most steps are steady ones."""
    rng = random.Random(seed)
    ops = random_ops(rng, 50, host=seed % 3 == 0, breaks=seed % 4 == 0)
    for name, request in ops:
        if name == "add":
            request["max_tokens"] = rng.randrange(1, 150)
            if rng.random() < 0.6:
                request |= {"eos_ids": frozenset(), "logprobs": None, "prompt_logprobs": None}
            if rng.random() < 0.6:
                request["stop_token_ids"] = frozenset()
    return ops


def crowd(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    return {
        "num_blocks": rng.choice((30, 60, 400)),
        "budget": rng.choice((6, 12, 40, 200)),
        "max_num_seqs": rng.choice((2, 5, 12)),
        "caching": rng.random() < 0.6,
        "policy": rng.choice(("fcfs", "priority")),
        "overlap": rng.random() < 0.8,
        "groups": rng.choice((1, 2)),
    }


SEEDS = range(16)


def all_crowds() -> list[WatchedLoop]:
    return [both(mixed_ops(seed), **crowd(seed)) for seed in SEEDS]


def test_crowded_runs():
    """Longer runs; and they had what they are here for."""
    steps = steady = fullest = preempted = ended = 0
    for loop in all_crowds():
        steps += len(loop.members)
        steady += sum(size > 1 for size in loop.members)
        fullest = max(fullest, loop.fullest)
        preempted += loop.scheduler.stats().preemptions
        ended += sum(end.finish_reason == "stop" for end in loop.ended.values())
    assert steady > steps / 4, f"{steady} of {steps} steps had steady rows"
    assert preempted > 20
    assert ended > 20
    assert fullest == WIDTH


@pytest.mark.parametrize("overlap", [True, False])
def test_a_run_of_steady_rows_looks_at_no_request(overlap, monkeypatch):
    """Neither schedule nor commit goes row by row, but where a block is due or the end."""
    loop = WatchedLoop(True, block_size=16, overlap=overlap)
    requests = [loop.add(prompt_of(3, i), max_tokens=40) for i in range(6)]
    for _ in range(4):
        loop.step()
    assert loop.scheduler._steady.size == 6
    looked: list[int] = []
    commit = Scheduler._commit_rows
    monkeypatch.setattr(Scheduler, "_commit_rows", lambda self, *args: (looked.append(1), commit(self, *args))[1])
    for _ in range(8):
        loop.step()
    assert not looked
    assert all(request.num_tokens < 3 + len(loop.tokens[request]) for request in requests)
    loop.finish_and_verify()
    assert looked


def test_quiet_requests_are_told_at_a_block_and_at_the_end():
    loops = [BreakingLoop(False, block_size=16, num_blocks=80, max_num_seqs=12) for _ in range(2)]
    for quiet, loop in zip((True, False), loops, strict=True):
        for seed in range(12):
            rng = random.Random(seed)
            request = random_request(rng, host=False) | {"max_tokens": 70, "logprobs": None, "prompt_logprobs": None}
            loop.add(**request, quiet=quiet)
        loop.told = []
        book = loop.book
        loop.book = lambda updates, loop=loop, book=book: (loop.told.append(len(updates)), book(updates))[1]
        loop.finish_and_verify()
    quiet, loud = loops
    assert [quiet.tokens[r] for r in quiet.requests] == [loud.tokens[r] for r in loud.requests]
    assert sum(quiet.told) < sum(loud.told) / 2


# Mutants


def stop_tokens_missed(patch: pytest.MonkeyPatch) -> None:
    join = SteadyRows.join

    def broken(rows, request):
        join(rows, request)
        rows._stops[:, request.slot] = -1

    patch.setattr(SteadyRows, "join", broken)


def published_late(patch: pytest.MonkeyPatch) -> None:
    close = SteadyRows._close

    def broken(rows, request):
        close(rows, request)
        rows._alarm[request.slot] = request.max_len - 1

    patch.setattr(SteadyRows, "_close", broken)
    patch.setattr(SteadyRows, "check", lambda rows, num_steps: None)


def flight_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Who is opened has nothing in flight."""
    opened = SteadyRows._open

    def broken(rows, slots):
        members = [rows._members[slot] for slot in slots.tolist()]
        opened(rows, slots)
        for request in members:
            request.num_in_flight = 0

    patch.setattr(SteadyRows, "_open", broken)


def order_not_renewed(patch: pytest.MonkeyPatch) -> None:
    """Who joins comes last."""
    patch.setattr(steady, "longest_first", lambda lengths, slots: np.arange(len(slots)))


def blocks_in_slot_order(patch: pytest.MonkeyPatch) -> None:
    pick = SteadyRows.pick

    def broken(self, *given):
        rest = pick(self, *given)
        return rest if rest is None else sorted(rest, key=lambda request: -request.slot)

    patch.setattr(SteadyRows, "pick", broken)


@pytest.mark.parametrize(
    "mutant",
    [stop_tokens_missed, published_late, flight_forgotten, order_not_renewed, blocks_in_slot_order],
    ids=lambda each: each.__name__,
)
def test_mutants_are_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        all_crowds()
