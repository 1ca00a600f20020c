"""How far requests are drafted for, by what was accepted: counts only, so that a run can be repeated."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoengine.api import DrafterContext, DraftSample, DraftState, HostDrafter
from nanoengine.api.draft_checks import CheckedDrafter
from nanoengine.api.errors import RequestError
from nanoengine.api.stats import EngineStats
from nanoengine.core.request import Request
from nanoengine.core.scheduling.speculation import Speculation
from nanoengine.params.resolver import ResolvedParams
from nanoengine.params.speculation import Acceptance

K = 4
CTX = DrafterContext(tokens=K, vocab_size=100, max_model_len=10**6, max_slots=4, device="cpu")


class Scripted(HostDrafter):
    """Guesses the token behind each number: n + 1, n + 2, ..."""

    def __init__(self) -> None:
        super().__init__(CTX, None)
        self.log: list[Any] = []

    def start(self, prompt_token_ids: Sequence[int], sample: DraftSample) -> DraftState:
        self.log.append(("start", tuple(prompt_token_ids), sample.request, sample.index, sample.seed, sample.cache_key))
        return Counting(self.log)


class Counting(DraftState):
    def __init__(self, log: list[Any]) -> None:
        self.log, self.newest = log, 0

    def feed(self, token_ids: Sequence[int]) -> None:
        self.log.append(("feed", tuple(token_ids)))
        self.newest = token_ids[-1]

    def draft(self, most: int) -> Sequence[int]:
        self.log.append(("draft", most))
        return [(self.newest + 1 + i) % 100 for i in range(most)]

    def end(self) -> None:
        self.log.append(("end",))


def request(prompt: int = 5, *, speculate: bool = True, **more: Any) -> Request:
    """One that has a first token, and nothing in flight."""
    params = ResolvedParams(speculate=speculate)
    made = Request(
        id="r/0", parent="r", prompt_token_ids=list(range(prompt)), params=params, seed=7, sample_index=0, arrival=0,
        output_token_ids=[1], **more,
    )  # fmt: skip
    made.num_computed = made.length - 1
    return made


def grow(sample: Request, tokens: Sequence[int]) -> None:
    sample.output_token_ids += tokens
    sample.length = sample.num_tokens
    sample.num_computed = sample.length - 1


def speculation(drafter: HostDrafter | None = None, *, least: float = 0.3, step_tokens: int = 1000) -> Speculation:
    checked = CheckedDrafter(drafter or Scripted(), "drafter 'x' (X of y)")
    return Speculation(checked, tokens=K, min_acceptance=least, step_tokens=step_tokens)


def run(found: Speculation, sample: Request, right: Callable[[int], int], rows: int) -> list[int]:
    """The drafts of each row. right(row): how many of its drafts would be accepted, at most."""
    drafted = []
    for row in range(rows):
        most = found.most(sample)
        drafts = found.propose(sample, most) if most else []
        accepted = min(len(drafts), right(row))
        grow(sample, [0] * (accepted + 1))
        found.committed(sample, len(drafts), accepted)
        drafted.append(len(drafts))
    return drafted


# -- adaptive depth ---------------------------------------------------------------------------------------------------


def test_a_drafter_that_is_always_right_drafts_all() -> None:
    assert run(speculation(), request(), lambda row: K, 50) == [K] * 50


def test_a_drafter_that_is_always_wrong_is_left_out() -> None:
    sample = request()
    drafted = run(speculation(), sample, lambda row: 0, 4000)
    assert sum(drafted) <= 3 * K + 16  # three rows, then one draft after 16, 32, 64, ... 512, 512, ... tokens
    assert drafted[3:19] == [0] * 16
    assert set(drafted[3:]) == {0, 1}


class Hoping(HostDrafter):
    """Behind a 1 it guesses ones, behind anything else nothing."""

    def __init__(self) -> None:
        super().__init__(CTX, None)

    def start(self, prompt_token_ids: Sequence[int], sample: DraftSample) -> DraftState:
        return Ones([])


class Ones(Counting):
    def draft(self, most: int) -> Sequence[int]:
        return [1] * most if self.newest == 1 else []


def waits(found: Speculation, tokens: Sequence[int]) -> int:
    """For how many of these tokens a request waits, instead of running ahead; the drafts behind them are refused."""
    sample, count = request(), 0
    for token in tokens:
        sample.length, sample.num_computed = sample.num_tokens + 1, sample.num_tokens
        waited = found.most(sample) > 0
        count += waited
        grow(sample, [token])
        if waited and (most := found.most(sample)):
            found.committed(sample, len(found.propose(sample, most)), 0)
    return count


def test_waiting_for_drafts_that_do_not_come_costs_as_much_as_a_refused_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second token is the guessed one, and each time nothing can be guessed behind the next."""
    tokens = [0, 1] * 500
    assert waits(speculation(Hoping()), tokens) < 30
    committed = Speculation.committed
    monkeypatch.setattr(Speculation, "committed", lambda self, one, n, m: committed(self, one, 0, m))
    assert waits(speculation(Hoping()), tokens) > 400


def test_only_the_positions_that_pay_are_drafted() -> None:
    drafted = run(speculation(), request(), lambda row: 2, 400)
    tail = drafted[20:]
    assert set(tail) == {2, 3}  # the third is tried now and then
    assert tail.count(3) < 40


def test_it_comes_back_when_drafts_are_right_again() -> None:
    drafted = run(speculation(), request(), lambda row: K if row >= 300 else 0, 900)
    assert sum(drafted[3:300]) < 10
    back = drafted.index(K, 300)
    assert back - 300 <= 520
    assert set(drafted[back:]) == {K}


def test_it_does_not_stop_for_a_few_misses() -> None:
    rng = random.Random(1)
    drafted = run(speculation(), request(), lambda row: K if rng.random() < 0.8 else 0, 500)
    assert sum(drafted) > 0.8 * K * 500


def test_min_acceptance_zero_never_stops_and_one_stops_at_the_first_miss() -> None:
    assert run(speculation(least=0.0), request(), lambda row: 0, 100) == [K] * 100
    assert run(speculation(least=1.0), request(), lambda row: 0 if row == 3 else K, 10) == [K] * 4 + [0] * 6


def test_many_requests_share_the_tokens_of_a_step() -> None:
    found = speculation(step_tokens=9)
    one, two, three = request(), request(), request()
    assert found.most(one) == K
    assert [found.most(two), found.most(one)] == [3, 3]
    assert [found.most(three), found.most(two), found.most(one)] == [2, 2, 2]
    more = [request() for _ in range(6)]
    assert {found.most(each) for each in more[:1]} == {1}
    for each in more:
        found.most(each)
    assert found.most(one) == 0  # nine requests: a token each
    for each in more:
        found.end(each)
    assert found.most(one) == 2


def test_a_new_request_begins_with_what_others_had() -> None:
    found = speculation()
    for _ in range(8):
        run(found, request(), lambda row: 0, 20)
    assert sum(run(found, request(), lambda row: 0, 15)) == 1  # one draft tries it
    tries = run(found, request(), lambda row: K, 15)
    assert tries[:4] == [1, 2, 3, 4]


@given(rows=st.lists(st.tuples(st.integers(1, K), st.integers(0, K)), max_size=60), least=st.floats(0, 1))
def test_depth_is_in_range_and_repeatable(rows: list[tuple[int, int]], least: float) -> None:
    one, two = Acceptance([1.0] * K, least), Acceptance([1.0] * K, least)
    for number, (drafted, accepted) in enumerate(rows):
        for each in (one, two):
            each.adapt(number, drafted, min(drafted, accepted))
        assert 0 <= one.depth(number) == two.depth(number) <= K
        assert all(0 <= share <= 1 for share in one.shares)


def test_statistics_are_by_position() -> None:
    stats = EngineStats()
    for drafted, accepted in [(3, 3), (4, 2), (3, 0), (1, 1), (0, 0), (2, -1)]:  # the last one failed
        stats.count_drafts(drafted, accepted)
    assert stats.drafted_per_position == [5, 4, 3, 1]
    assert stats.accepted_per_position == [3, 2, 1, 0]
    assert (stats.drafted, stats.accepted) == (13, 6)


# -- what the drafter sees --------------------------------------------------------------------------------------------


def test_the_drafter_is_fed_what_is_new_and_ended_once() -> None:
    drafter = Scripted()
    found, sample = speculation(drafter), request(3, cache_key=b"salt")
    assert found.propose(sample, found.most(sample)) == [2, 3, 4, 5]
    grow(sample, [2, 9])
    assert found.propose(sample, 2) == [10, 11]
    grow(sample, [11, 12, 13])
    found.end(sample)
    found.end(sample)
    assert drafter.log == [
        ("start", (0, 1, 2), "r", 0, 7, b"salt"),
        ("feed", (1,)),
        ("draft", 4),
        ("feed", (2, 9)),
        ("draft", 2),
        ("feed", (11, 12, 13)),
        ("end",),
    ]


def test_nothing_is_kept_of_an_ended_request() -> None:
    found = speculation()
    for _ in range(10):
        sample = request()
        run(found, sample, lambda row: 2, 5)
        found.end(sample)
    assert not found._states
    assert not found._acceptance
    assert not found._failed


def test_a_request_without_speculation_has_no_drafts_and_starts_nothing() -> None:
    drafter = Scripted()
    found = speculation(drafter)
    assert found.most(request(speculate=False)) == 0
    assert drafter.log == []


def test_a_prompt_that_is_not_computed_yet_has_no_drafts() -> None:
    sample = request()
    sample.num_computed = 2
    assert speculation().most(sample) == 0


class Silent(Counting):
    def draft(self, most: int) -> Sequence[int]:
        return [5] * (most if self.newest == 9 else min(most, 1))


def test_a_request_runs_ahead_unless_there_is_a_guess_behind_the_token_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafter = Scripted()
    monkeypatch.setattr(drafter, "start", lambda *args: Silent(drafter.log))
    found, sample = speculation(drafter), request()
    sample.length += 1
    sample.num_computed += 1
    assert found.most(sample) == 0  # the only guess is for the token in flight
    sample.output_token_ids[-1] = 9
    found, sample.length = speculation(drafter), sample.num_tokens + 1
    assert found.most(sample) == K


def test_a_request_with_drafts_in_flight_waits() -> None:
    sample = request()
    sample.length += 3
    sample.num_computed += 3
    assert speculation().most(sample) == K


# -- drafters that fail -----------------------------------------------------------------------------------------------


class TooMany(Counting):
    def draft(self, most: int) -> Sequence[int]:
        return [1] * (most + 1)


class Outside(Counting):
    def draft(self, most: int) -> Sequence[int]:
        return [100]


class NoIds(Counting):
    def draft(self, most: int) -> Any:
        return ["a"]


class Endless(Counting):
    def draft(self, most: int) -> Any:
        return itertools.repeat(3)


class Nothing(Counting):
    def draft(self, most: int) -> Any:
        return None


class Exits(Counting):
    def draft(self, most: int) -> Any:
        raise SystemExit(3)


class CannotFeed(Counting):
    def feed(self, token_ids: Sequence[int]) -> None:
        raise KeyError("gone")


class NotAState:
    def __init__(self, log: list[Any]) -> None: ...


FAILURES: list[tuple[type[Any], str]] = [
    (TooMany, r"draft\(\) of drafter 'x' \(X of y\) failed: ValueError: it returned more than the 4"),
    (Endless, "it returned more than the 4"),
    (Outside, "it returned the id 100; ids are 0 to 99"),
    (NoIds, r"draft\(\) of .* failed: TypeError"),
    (Nothing, r"draft\(\) of .* failed: TypeError"),
    (Exits, r"draft\(\) of .* failed: SystemExit"),
    (CannotFeed, r"feed\(\) of .* failed: KeyError: 'gone'.*test_speculation_depth\.py"),
    (NotAState, r"start\(\) of .* failed: TypeError: it returned .*NotAState"),
]


@pytest.mark.parametrize(("state", "text"), FAILURES, ids=lambda each: getattr(each, "__name__", ""))
@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_drafter_that_fails_fails_its_request(
    state: type[Any], text: str, in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = Scripted()
    monkeypatch.setattr(drafter, "start", lambda *args: state(drafter.log))
    found, sample = speculation(drafter), request()
    sample.length += in_flight
    sample.num_computed += in_flight
    most = found.most(sample)  # raises nothing: the request may not get a row at all
    assert most == K
    text = text if not in_flight else text.replace("more than the 4", "more than the 2")
    with pytest.raises(RequestError, match=text) as caught:
        found.propose(sample, most)
    assert caught.value.code == "drafter_failed"
    found.end(sample)
    assert ("end",) not in drafter.log


class CannotEnd(Counting):
    def end(self) -> None:
        raise OSError("disk")


def test_a_drafter_that_cannot_end_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = Scripted()
    monkeypatch.setattr(drafter, "start", lambda *args: CannotEnd(drafter.log))
    found = speculation(drafter)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            sample = request()
            found.propose(sample, 1)
            found.end(sample)
    (message,) = [each.getMessage() for each in caplog.records]
    assert "end() of drafter 'x' (X of y) failed: OSError: disk" in message


def test_ctrl_c_is_not_a_failure_of_the_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted()

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(drafter, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        speculation(drafter).propose(request(), 1)
