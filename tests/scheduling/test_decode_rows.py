"""A row that brings one token more, and nothing else, is booked and committed in the loops themselves, below the marks
`pick_check_at` and `commit_check_at`. Plans and updates must be those of the general way, in every step."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import pytest
import sched_harness
from hypothesis import given, settings
from sched_harness import BreakingLoop, prompt_of, random_ops, run_ops
from test_properties import loops, operations

from nanoengine.core.request import Request
from nanoengine.core.scheduling import commit
from nanoengine.core.scheduling.draft import Draft
from nanoengine.core.scheduling.messages import Update
from nanoengine.core.scheduling.queues import Roster
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.distributed.wire import encode
from nanoengine.testing.invariants import check_scheduler


class General(Request):
    """Whatever is set, its rows go the general way."""

    pick_check_at = commit_check_at = property(lambda self: 0, lambda self, value: None)


class WatchedLoop(BreakingLoop):
    """Keeps the updates of each step, and counts rows that went the general way."""

    def __init__(self, request_class: type[Request] = Request, **options: Any) -> None:
        super().__init__(False, request_class=request_class, **options)
        self.updates: list[list[tuple[Any, ...]]] = []
        self.general = {"booked": 0, "committed": 0}
        pick = self.scheduler._pick
        self.scheduler._pick = lambda *args: self.count("booked", pick, args)

    def count(self, what: str, call: Any, args: Any) -> Any:
        self.general[what] += 1
        return call(*args)

    def commit(self):
        commit_row = commit._commit_row
        with patch.object(commit, "_commit_row", lambda *args: self.count("committed", commit_row, args)):
            return super().commit()

    def book(self, updates):
        updates = list(updates)
        self.updates.append([contents(update) for update in updates])
        super().book(updates)

    @property
    def num_rows(self) -> int:
        return sum(len(step.rows) for step in self.steps)


def contents(update: Update) -> tuple[Any, ...]:
    drawn, prompt = update.sampled_logprobs, update.prompt_logprobs
    return (
        update.request.id,
        update.new_token_ids,
        update.finish_reason,
        update.stop_reason,
        None if drawn is None else (*drawn.positions.tolist(), *drawn.token_ids.tolist(), *drawn.top_ids.tolist()),
        None if prompt is None else (*prompt.positions.tolist(), *prompt.logprobs.tolist()),
        update.error and update.error.code,
    )


def both(ops: list[Any], request_class: type[Request] = Request, **options: Any) -> WatchedLoop:
    """Runs `ops` both ways; gives the loop whose rows may be plain."""
    plain, general = WatchedLoop(request_class, **options), WatchedLoop(General, **options)
    for loop in (plain, general):
        run_ops(loop, ops)
    assert plain.updates == general.updates
    assert len(plain.steps) == len(general.steps)
    for a, b in zip(plain.steps, general.steps, strict=True):
        assert encode(a.plan) == encode(b.plan), f"step {a.plan.step} is another one"
        assert [(r.id, g) for r, g in a.rows] == [(r.id, g) for r, g in b.rows]
        assert (a.drawn, a.published, a.admitted, a.preempted) == (b.drawn, b.published, b.admitted, b.preempted)
    assert plain.scheduler.stats() == general.scheduler.stats()
    return plain


@settings(max_examples=60)
@given(loops, operations)
def test_any_operations(options, ops):
    both(ops, **options)


def mixed_ops(seed: int) -> list[Any]:
    """Longer outputs than elsewhere, so that most rows of most steps are plain ones."""
    rng = random.Random(seed)
    ops = random_ops(rng, 50, host=seed % 3 == 0, breaks=seed % 4 == 0)
    for name, request in ops:
        if name == "add":
            request["max_tokens"] = rng.randrange(1, 150)
            if rng.random() < 0.6:
                request |= {"eos_ids": frozenset(), "logprobs": None, "prompt_logprobs": None}
            if rng.random() < 0.6:
                request["stop_token_ids"] = frozenset()
    if seed % 2:
        for _ in range(6):
            ops.insert(rng.randrange(20, len(ops)), ("budget", rng.choice((2, 4, 64))))
    if seed % 4 == 2:  # rows are booked, and taken back
        ops.insert(rng.randrange(20, len(ops)), ("raise", "plan"))
    return ops


def crowd(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    return {
        "num_blocks": rng.choice((12, 30, 60, 400)),
        "budget": rng.choice((6, 12, 40, 200)),
        "max_num_seqs": rng.choice((2, 5, 12)),
        "caching": rng.random() < 0.6,
        "policy": rng.choice(("fcfs", "priority")),
        "overlap": rng.random() < 0.8,
        "groups": rng.choice((1, 2)),
    }


SEEDS = (79, *range(16))  # 79: a row that is booked is dropped, as its request must give its blocks back; one mutant
# is seen in no other


def all_crowds(request_class: type[Request] = Request) -> list[WatchedLoop]:
    return [both(mixed_ops(seed), request_class, **crowd(seed)) for seed in SEEDS]


def test_crowded_runs():
    """Longer runs; and they had what they are here for."""
    rows = booked = committed = preempted = ended = 0
    for loop in all_crowds():
        rows += loop.num_rows
        booked += loop.general["booked"]
        committed += loop.general["committed"]
        preempted += loop.scheduler.stats().preemptions
        ended += sum(end.finish_reason == "stop" for end in loop.ended.values())
    assert booked < rows / 2, f"{booked} of {rows} rows were not plain when they were picked"
    assert committed < rows * 0.7, f"{committed} of {rows} rows were not plain when they were committed"
    assert preempted > 20
    assert ended > 20


@pytest.mark.parametrize("overlap", [True, False])
def test_plain_rows_call_nothing(overlap):
    """Neither schedule nor commit calls a function row by row, but at the end; blocks are added in the loop."""
    loop = WatchedLoop(block_size=16, overlap=overlap)
    for i in range(6):
        loop.add(prompt_of(3, i), max_tokens=40)
    for _ in range(4):
        loop.step()
    before = dict(loop.general)
    for _ in range(8):
        loop.step()
    assert loop.general == before
    loop.finish_and_verify()
    assert loop.general["booked"] == 6 * overlap, "a look at what is ending"
    assert loop.general["committed"] == 6 * 2, "the first token and the last; full blocks are published in the loop"


def test_a_row_that_was_picked_before_its_request_is_preempted_is_taken_back(monkeypatch):
    """Requests take turns where the budget is too small for all: the newest one, which is preempted, may come first."""
    picked: list[bool] = []
    drop = Draft.drop
    monkeypatch.setattr(Draft, "drop", lambda self, r: (picked.append(r.slot in self.slots), drop(self, r))[1])
    ops: list[Any] = [("add", {"prompt": prompt_of(2 + i, i), "max_tokens": 30}) for i in range(5)]
    loop = both([*ops, ("step", None), ("budget", 2)], num_blocks=14, max_num_seqs=5, caching=False)
    assert any(picked)
    assert all(len(loop.tokens[request]) == 30 for request in loop.requests)


@pytest.mark.parametrize("computed", [0, 3, 11])
def test_a_row_that_is_taken_back_leaves_no_trace(computed):
    """A decode row, the last chunk of a prompt, and a chunk that draws nothing: the same row can be booked again."""
    loop = WatchedLoop()
    request = loop.request(prompt_of(12), max_tokens=5)
    loop.scheduler.add(request)
    assert loop.blocks.claim(request, loop.blocks.no_hits(), 12)
    assert loop.blocks.grow(request, 12)
    request.num_computed = computed
    before = {name: getattr(request, name) for name in Request.__slots__}
    for num_new in (12 - computed, 12 - computed, 1):
        draft = Draft(0, 20)
        draft.book(request, num_new)
        assert (request.length, request.pick_check_at) == ((13, 13) if computed + num_new == 12 else (12, 0))
        assert draft.budget == 20 - num_new
        draft.drop(request)
        assert {name: getattr(request, name) for name in Request.__slots__} == before
        assert (draft.slots, draft.prefill, draft.budget) == ([], [], 20)


# Mutants


def sets(name: str, value: Any) -> type[Request]:
    """A request on which setting `name` to anything but 0 sets what `value` gives for it instead."""
    slot = getattr(Request, name)

    def change(self: Request, given: int) -> None:
        slot.__set__(self, value(self, given) if given else 0)

    return type("Mutant", (Request,), {name: property(slot.__get__, change)})


def stop_tokens_missed(patch: pytest.MonkeyPatch) -> type[Request]:
    return type("Mutant", (Request,), {"stop_set": property(lambda self: frozenset(), lambda self, value: None)})


def published_late(patch: pytest.MonkeyPatch) -> type[Request]:
    return sets("commit_check_at", lambda request, given: request.max_len - 1 - request.prompt_len)


def length_checked_late_at_commit(patch: pytest.MonkeyPatch) -> type[Request]:
    return sets("commit_check_at", lambda request, given: request.publish_at - request.prompt_len)


def one_token_past_the_end(patch: pytest.MonkeyPatch) -> type[Request]:
    return sets("commit_check_at", lambda request, given: given + 1)


def length_checked_late_when_picked(patch: pytest.MonkeyPatch) -> type[Request]:
    return sets("pick_check_at", lambda request, given: request.capacity + 1)


def blocks_checked_late(patch: pytest.MonkeyPatch) -> type[Request]:
    return sets("pick_check_at", lambda request, given: request.max_len)


def host_rows_are_picked_as_others(patch: pytest.MonkeyPatch) -> type[Request]:
    book = Draft.book

    def broken(self, request, num_new):
        book(self, request, num_new)
        if request.num_in_flight:
            request.pick_check_at = min(request.max_len, request.capacity + 1)

    patch.setattr(Draft, "book", broken)
    return Request


def undo_forgets_the_length(patch: pytest.MonkeyPatch) -> type[Request]:
    def broken(self, num_tokens, drawn):
        self.num_computed, self.pick_check_at = self.num_computed - num_tokens, 0

    patch.setattr(Request, "unbook", broken)
    return Request


def drop_forgets_the_row(patch: pytest.MonkeyPatch) -> type[Request]:
    drop = Draft.drop

    def broken(self, request):
        slots, starts = self.slots.copy(), self.starts.copy()
        drop(self, request)
        self.slots[:], self.starts[:] = slots, starts

    patch.setattr(Draft, "drop", broken)
    return Request


def release_forgets_the_checks(patch: pytest.MonkeyPatch) -> type[Request]:
    release = Roster._release

    def broken(self, request):
        pick, commit = request.pick_check_at, request.commit_check_at
        release(self, request)
        request.pick_check_at, request.commit_check_at = pick, commit

    patch.setattr(Roster, "_release", broken)
    return Request


def a_full_cache_forgets_the_check(patch: pytest.MonkeyPatch) -> type[Request]:
    """The end for want of blocks comes sooner than commit looks."""
    end = Scheduler._end_for_blocks

    def broken(self, request):
        commit = request.commit_check_at
        end(self, request)
        request.commit_check_at = commit

    patch.setattr(Scheduler, "_end_for_blocks", broken)
    return Request


MUTANTS = [
    stop_tokens_missed,
    published_late,
    length_checked_late_at_commit,
    one_token_past_the_end,
    length_checked_late_when_picked,
    blocks_checked_late,
    host_rows_are_picked_as_others,
    undo_forgets_the_length,
    drop_forgets_the_row,
    release_forgets_the_checks,
    a_full_cache_forgets_the_check,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.__name__)
def test_mutants_are_caught(mutant, monkeypatch):
    """By plans and updates, without the invariants' help."""
    monkeypatch.setattr(sched_harness, "check_scheduler", lambda scheduler: None)
    request_class = mutant(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        all_crowds(request_class)


@pytest.mark.parametrize(("name", "by"), [("pick_check_at", 1), ("commit_check_at", 1), ("length", -1), ("length", 2)])
def test_the_invariants_see_a_wrong_mark(name, by):
    loop = WatchedLoop()
    request = loop.add(prompt_of(6), max_tokens=20)
    for _ in range(3):
        loop.step()
    check_scheduler(loop.scheduler)
    setattr(request, name, getattr(request, name) + by)
    with pytest.raises(AssertionError):
        check_scheduler(loop.scheduler)
