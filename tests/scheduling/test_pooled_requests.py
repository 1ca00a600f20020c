"""Requests that pool hidden states, in the scheduler: one vector and no token, whatever happens."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from sched_harness import BreakingLoop, Loop, pooling_request, prompt_of, random_ops, run_ops

from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request
from nanoengine.core.scheduling import commit, draft
from nanoengine.core.scheduling.messages import SchedulerConfig, Update
from nanoengine.core.step import POOL_ALL, POOL_LAST, ROW_BAD_LOGITS

POOLINGS = ("mean", "last")


class Counted(BreakingLoop):
    """What happened to requests that pool."""

    def __init__(self, **options: Any) -> None:
        super().__init__(False, **options)
        self.happened: Counter[str] = Counter()

    def book(self, updates: Any) -> None:
        updates = list(updates)
        super().book(updates)
        for update in updates:
            if update.pooled is not None:
                self.note(update.request)

    def note(self, request: Request) -> None:
        pooling = request.params.pooling
        plans = [step.plan for step in self.steps for row, _ in step.rows if row is request]
        self.happened[f"{pooling} ended"] += 1
        self.happened[f"{pooling} in chunks"] += len(plans) > 1
        self.happened[f"{pooling} again"] += request.generation > 2
        self.happened[f"{pooling} beside others"] += any(plan.num_decode_rows for plan in plans)
        self.happened[f"{pooling} from the cache"] += bool(request.num_cached)


def crowd(seeds: range) -> Counter[str]:
    """Random runs; each vector is checked against that of running alone."""
    total: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        loop = Counted(
            num_blocks=rng.choice((9, 12, 30)),
            budget=rng.choice((3, 6, 12, 40)),
            max_num_seqs=4,
            groups=1 + seed % 2,
            overlap=seed % 4 != 0,
            policy=rng.choice(("fcfs", "priority")),
            drafts=rng.choice((0, 0, 3)),
        )
        run_ops(loop, random_ops(rng, 50, pooling=0.5))
        total += loop.happened
    return total


def test_random_runs_give_the_vectors_of_running_alone() -> None:
    happened = crowd(range(30))
    for pooling in POOLINGS:
        for what in ("ended", "in chunks", "again", "beside others"):
            assert happened[f"{pooling} {what}"] > 2, f"{pooling} {what}"
    assert happened["last from the cache"] > 5
    assert not happened["mean from the cache"]


def the_last_chunk_alone(patch: pytest.MonkeyPatch) -> None:
    pool = commit._pool

    def broken(request: Request, row: Any, *rest: Any) -> None:
        pool(request, row._replace(start=0), *rest)

    patch.setattr(commit, "_pool", broken)


def what_was_added_before_a_preemption_counts(patch: pytest.MonkeyPatch) -> None:
    pool = commit._pool

    def broken(request: Request, row: Any, *rest: Any) -> None:
        pool(request, row._replace(start=1), *rest)

    patch.setattr(commit, "_pool", broken)


def the_cache_is_read_for_a_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "may_read_cache", property(lambda request: request.void_generation < 0))


def the_whole_chunk_for_the_last(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(draft, "POOL_LAST", POOL_ALL)


def the_last_token_of_each_chunk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(draft, "POOL_ALL", POOL_LAST)


MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    the_last_chunk_alone,
    what_was_added_before_a_preemption_counts,
    the_cache_is_read_for_a_mean,
    the_whole_chunk_for_the_last,
    the_last_token_of_each_chunk,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutants_are_caught(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        crowd(range(30))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_prompt_may_be_as_long_as_max_model_len(pooling: str) -> None:
    loop = Loop(max_model_len=24, budget=10)
    request = loop.add(**pooling_request(prompt_of(24), pooling))
    loop.finish_and_verify()
    assert loop.ended[request].pooled is not None
    assert [step.plan.query_lens.tolist() for step in loop.steps] == [[10], [10], [4]]
    assert not any(len(step.plan.logits_index) for step in loop.steps), "a token's logits were computed"


def test_both_fill_the_prefix_cache_and_the_last_one_reads_it() -> None:
    loop = Loop(block_size=4)
    first = loop.add(**pooling_request(prompt_of(16), "mean"))
    loop.run()
    assert loop.cached(first) == 4
    again = [loop.add(**pooling_request(prompt_of(16), pooling)) for pooling in POOLINGS]
    drawn = loop.add(prompt_of(16), max_tokens=2)
    loop.finish_and_verify()
    assert [request.num_cached for request in (*again, drawn)] == [0, 12, 12]


def test_its_place_is_free_while_its_vector_is_in_flight() -> None:
    loop = Loop(max_num_seqs=1)
    for salt in range(3):
        loop.add(**pooling_request(prompt_of(8, salt), "mean"))
    loop.finish_and_verify()
    assert len(loop.steps) == 3


def test_a_vector_that_is_not_finite_fails_its_request_alone() -> None:
    loop = BreakingLoop(False, budget=8)
    bad = loop.add(**pooling_request(prompt_of(12, 1), "mean"))
    fine = loop.add(**pooling_request(prompt_of(5, 2), "last"))
    loop.runner.fail_row = lambda plan, row: ROW_BAD_LOGITS * (plan.starts[row] == 8)
    loop.run()
    assert isinstance(loop.ended[bad].error, RequestError)
    assert loop.ended[bad].error.code == "bad_logits"
    assert loop.cached(bad) == 0, "the index holds what may be wrong"
    assert loop.ended[fine].pooled is not None


def whole(budget: int) -> Loop:
    loop = Loop(budget=budget)
    config = loop.config
    loop.config = loop.scheduler.config = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=config.max_model_len,
        whole_prompts=True,
    )
    return loop


def test_where_attention_looks_ahead_a_prompt_is_whole_or_refused_with_the_numbers() -> None:
    loop = whole(budget=12)
    for length in (7, 5, 12):
        loop.add(**pooling_request(prompt_of(length, length), "mean"))
    with pytest.raises(RequestError, match="13 tokens must run in one step, which has 12: raise max_num_batched_tok"):
        loop.add(**pooling_request(prompt_of(13), "mean"))
    loop.finish_and_verify()
    assert [step.plan.query_lens.tolist() for step in loop.steps] == [[7, 5], [12]]


def test_an_update_with_a_vector_has_no_token() -> None:
    loop, found = Loop(budget=4), list[Update]()
    loop.add(**pooling_request(prompt_of(10), "mean"))
    while not found:
        loop.launch()
        found = loop.commit()
    [update] = found
    assert update.finish_reason == "stop"
    assert update.new_token_ids == ()
    assert update.pooled is not None
