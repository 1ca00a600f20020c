"""Scheduling policies in the scheduler: the order of admission, kept places, shares of clients, and broken ones."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_harness import Loop, prompt_of

from nanoengine.api import Policy, PolicyParams, QueuedRequest
from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request, Status
from nanoengine.plugins.policies.fair import Fair
from nanoengine.plugins.policies.fcfs import FCFS
from nanoengine.plugins.policies.params import FairParams
from nanoengine.plugins.policies.priority import Priority

NONE = PolicyParams()


# -- invariants of any policy -----------------------------------------------------------------------------------------

arrivals = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 2), st.sampled_from(["", "a", "b"])), max_size=14
)


@given(arrivals, st.sampled_from(["fcfs", "priority", "fair"]), st.sampled_from([8, 10, 20]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a32_a_preempted_request_keeps_its_place(rows: list[Any], policy: str, blocks: int, overlap: bool) -> None:
    """No request is admitted before one of the same client that is as urgent, came earlier and waits, preempted or
    not."""
    loop = Loop(policy=policy, num_blocks=blocks, max_num_seqs=4, overlap=overlap, caching=False)
    places = {}
    for length, tokens, priority, client in rows:
        request = loop.add(prompt_of(length), max_tokens=tokens, priority=priority, client=client)
        places[request] = request.place
        admitted_in_order(loop, policy)
    while loop.scheduler.running or loop.scheduler.waiting:
        admitted_in_order(loop, policy)
    assert all(request.place == place for request, place in places.items())
    loop.finish_and_verify()


def admitted_in_order(loop: Loop, policy: str) -> None:
    before = {r for r in loop.requests if r.status is Status.WAITING}
    loop.step()
    for admitted in before & set(loop.scheduler.running):
        for left_behind in before & set(loop.scheduler.waiting):
            assert not ahead(left_behind, admitted, policy), "overtaken"


def in_order_to_the_end(loop: Loop) -> None:
    while loop.scheduler.running or loop.scheduler.waiting:
        admitted_in_order(loop, "fcfs")


def ahead(one: Request, other: Request, policy: str) -> bool:
    urgent = (0, 0) if policy == "fcfs" else (one.priority, other.priority)
    same = policy != "fair" or one.client == other.client
    return same and (urgent[0], one.order) < (urgent[1], other.order)


def test_a_preempted_request_that_loses_its_place_would_be_seen() -> None:
    class AtTheEnd(FCFS):
        """As if a preempted request came anew."""

    loop = Loop(policy=AtTheEnd(NONE), num_blocks=8, max_num_seqs=3, overlap=False, caching=False)
    roster = loop.scheduler._roster
    enqueue = roster._enqueue

    def to_the_end(request: Request, *, returned: bool = False) -> None:
        request.place = (10**6 if returned else 0, *request.place)
        enqueue(request, returned=returned)

    roster._enqueue = to_the_end  # type: ignore[method-assign]
    for i in range(8):
        loop.add(prompt_of(9, i), max_tokens=14)
    with pytest.raises(AssertionError, match="overtaken"):
        in_order_to_the_end(loop)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 50)), max_size=60), st.data())
def test_fair_takes_the_waiting_client_with_the_lowest_counter(events: list[Any], data: st.DataObject) -> None:
    """Against a plain model of the paper's rules."""
    weights = {"0": 1.0, "1": 2.0, "2": 0.5}
    policy = Fair(FairParams(weights=weights))
    counters: dict[str, float] = {}
    queue: list[QueuedRequest] = []
    last = None
    for number, (kind, client, size) in enumerate(events):
        request = QueuedRequest(id=str(number), client=str(client), arrival=number, num_prompt_tokens=size)
        if kind < 2:
            others = [counters[each.client] for each in queue]
            if str(client) not in {each.client for each in queue}:
                level = min(others, default=counters.get(last, 0.0) if last is not None else 0.0)
                counters[str(client)] = max(counters.get(str(client), level), level)
            queue.append(request)
            policy.queued(request, False)
        elif kind == 2 and queue:
            (name,) = policy.next_key()
            assert counters[str(name)] == min(counters[each.client] for each in queue)
            admitted = next(each for each in queue if each.client == name)
            queue.remove(admitted)
            if all(each.client != name for each in queue):
                last = name
            policy.left(admitted)
            policy.served(admitted, admitted.num_prompt_tokens, 0)
            counters[str(name)] += admitted.num_prompt_tokens / weights[str(name)]
        elif kind == 3 and str(client) in counters:
            policy.served(request, 0, size)
            counters[str(client)] += 2 * size / weights[str(client)]
        assert {name: policy.counters()[name] for name in counters} == pytest.approx(counters)


# -- A31: interactive requests beside a full queue of others ----------------------------------------------------------


def waits(policy: str) -> list[int]:
    """Steps until each of ten interactive requests has a token, beside a hundred others."""
    loop = Loop(policy=policy, max_num_seqs=4, num_blocks=200, budget=32, overlap=True)
    loop.checks = False
    for i in range(100):
        loop.add(prompt_of(12, i), max_tokens=10, priority=5)
    found = []
    for i in range(10):
        urgent = loop.add(prompt_of(5, i), max_tokens=3, priority=-1)
        steps = 0
        while not urgent.output_token_ids:
            loop.step()
            steps += 1
        found.append(steps)
    loop.finish_and_verify()
    return found


def test_a31_an_interactive_request_starts_with_the_next_free_slot() -> None:
    assert max(waits("priority")) <= 10 + 2  # at most as long as a running one has tokens to go
    assert waits("fcfs")[0] > 100


# -- A33: two clients, one of which sends ten times as much -----------------------------------------------------------


def shares(policy: str | Policy, **client_of: Any) -> Mapping[str, int]:
    """The cost of what each client got while both had requests waiting."""
    rng = random.Random(3)
    loop = Loop(policy=policy, max_num_seqs=6, num_blocks=300, budget=64)
    loop.checks = False
    for _ in range(40):
        for client in ("many",) * 10 + ("few",):
            loop.add(prompt_of(rng.randrange(2, 20), rng.randrange(50)), max_tokens=rng.randrange(1, 16), client=client)
    got: Counter[str] = Counter()
    while {request.client for request in loop.scheduler.waiting} == {"many", "few"}:
        loop.step()
    for request in loop.requests:
        if request.num_cached is not None:
            got[request.client] += request.prompt_len - request.num_cached + 2 * len(request.output_token_ids)
    return got


@pytest.mark.parametrize("weights", [{}, {"few": 3.0}, {"many": 2.0, "few": 1.0}], ids=str)
def test_a33_tokens_follow_the_weights_within_a_tenth(weights: dict[str, float]) -> None:
    got = shares(Fair(FairParams(weights=weights)))
    each = [got[client] / weights.get(client, 1.0) for client in ("many", "few")]
    assert sum(got.values()) > 1000
    assert max(each) < 1.1 * min(each)


def test_without_a_fair_policy_ten_times_the_load_gets_ten_times_the_tokens() -> None:
    got = shares("fcfs")
    assert got["many"] > 6 * got["few"]


def test_who_comes_back_has_saved_nothing() -> None:
    policy = Fair(FairParams())
    busy = [QueuedRequest(id=str(i), client="busy", arrival=i) for i in range(3)]
    for request in busy:
        policy.queued(request, False)
    policy.served(busy[0], 1000, 0)
    back = QueuedRequest(id="9", client="back", arrival=9)
    policy.queued(back, False)
    assert policy.counters() == {"busy": 1000.0, "back": 1000.0}
    policy.left(back)
    policy.queued(back, True)  # preempted: it has waited before, and keeps what it is owed
    policy.served(busy[0], 1000, 0)
    assert policy.counters() == {"busy": 2000.0, "back": 1000.0}


def test_idle_clients_are_forgotten() -> None:
    policy = Fair(FairParams())
    for number in range(5000):
        request = QueuedRequest(id=str(number), client=f"client {number}", arrival=number)
        policy.queued(request, False)
        policy.left(request)
        policy.served(request, 10, 10)
    assert len(policy.counters()) < 2500


# -- a policy of one's own --------------------------------------------------------------------------------------------


def test_a_custom_policy_is_used() -> None:
    class ShortestFirst(Policy):
        def waiting_key(self, request: QueuedRequest) -> tuple[int, ...]:
            return (request.num_prompt_tokens,)

    loop = Loop(max_num_seqs=1, policy=ShortestFirst(NONE))
    for length in (9, 5, 7):
        loop.add(prompt_of(length, length))
    loop.finish_and_verify()
    assert [r.prompt_len for r in loop.ended] == [5, 7, 9]


def test_a_key_is_asked_for_once() -> None:
    """So a policy whose keys change cannot break the order of the queue."""
    counted: Counter[str] = Counter()

    class Changing(Priority):
        def waiting_key(self, request: QueuedRequest) -> tuple[int, ...]:
            counted[request.id] += 1
            return (random.Random(sum(counted.values())).randrange(100),)

    loop = Loop(max_num_seqs=3, num_blocks=8, policy=Changing(NONE))
    for i in range(12):
        loop.add(prompt_of(9, i), max_tokens=12)
    loop.finish_and_verify()
    assert loop.scheduler.stats().preemptions > 0
    assert set(counted.values()) == {1}


def test_a_policy_sees_each_event_once_and_all_tokens() -> None:
    class Books(Policy):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.waiting: set[str] = set()
            self.got: Counter[tuple[str, str]] = Counter()
            self.returned = 0

        def queued(self, request: QueuedRequest, returned: bool) -> None:
            assert request.id not in self.waiting
            self.waiting.add(request.id)
            self.returned += returned

        def left(self, request: QueuedRequest) -> None:
            self.waiting.remove(request.id)

        def served(self, request: QueuedRequest, prompt: int, generated: int) -> None:
            self.got[request.id, "prompt"] += prompt
            self.got[request.id, "generated"] += generated

    books = Books(NONE)
    loop = Loop(max_num_seqs=3, num_blocks=8, policy=books)
    for i in range(12):
        loop.add(prompt_of(9, i % 5), max_tokens=12)
        loop.step()
        assert books.waiting == {request.id for request in loop.scheduler.waiting}
    loop.abort(loop.scheduler.waiting[0])
    loop.finish_and_verify()
    assert not books.waiting
    assert books.returned == loop.scheduler.stats().preemptions > 0
    for request in loop.requests:
        cached = request.prompt_len if request.num_cached is None else request.num_cached
        assert books.got[request.id, "prompt"] == request.prompt_len - cached
        assert books.got[request.id, "generated"] == len(request.output_token_ids)


@pytest.mark.parametrize("wrong", [[1], 1, None, (1.0,), (None,), (True,), ("text",)], ids=repr)
@pytest.mark.parametrize("method", ["waiting_key", "running_key", "next_key"])
def test_what_is_no_key_fails_one_request(method: str, wrong: Any) -> None:
    class Wrong(Policy):
        asked = 0

        def waiting_key(self, request: QueuedRequest) -> tuple[int, ...]:
            return (1,)

    def at_third(self: Any, *about: Any) -> Any:
        self.asked += 1
        return wrong if self.asked == 3 else (1,)

    kind = type("Wrong", (Wrong,), {method: at_third})
    loop = Loop(max_num_seqs=2, policy=kind(NONE))
    errors = []
    for i in range(6):
        try:
            loop.add(prompt_of(9, i), max_tokens=5)
        except RequestError as error:
            errors.append(error)
    loop.finish_and_verify()
    errors += [end.error for end in loop.ended.values() if end.error]
    assert len(errors) == 1
    assert errors[0].code == "policy_failed"
    assert f"{method}() of scheduling policy" in str(errors[0])
