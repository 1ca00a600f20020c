"""Whatever comes in whatever order: every invariant after every step, and exactly the tokens of running alone."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_harness import VOCAB, BreakingLoop, pooling_request, prompt_of, random_ops, random_request, run_ops

from nanoengine.core.request import Request
from nanoengine.core.scheduling.draft import Draft
from nanoengine.core.scheduling.queues import Roster

RANDOM = st.randoms(use_true_random=False)

loops = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([7, 8, 10, 13, 20, 60]),
        "block_size": st.sampled_from([1, 2, 4, 16]),
        "max_num_seqs": st.sampled_from([1, 2, 3, 6]),
        "budget": st.sampled_from([1, 2, 3, 5, 8, 17, 64]),
        "max_model_len": st.sampled_from([24, 64, 200]),
        "caching": st.booleans(),
        "policy": st.sampled_from(["fcfs", "priority", "fair"]),
        "overlap": st.booleans(),
        "groups": st.sampled_from([1, 2]),
        "reserve": st.sampled_from([0, 0, 1, 5]),
        "drafts": st.sampled_from([0, 0, 1, 4, 8]),
        "accuracy": st.sampled_from([0.0, 0.7, 1.0]),
        "on_device": st.booleans(),
        "hash_fn": st.sampled_from([None, None, None, lambda data: b"same", lambda data: bytes([len(data) % 3])]),
    }
)

requests = st.builds(
    lambda shared, own, salt, rest: {"prompt": prompt_of(shared) + prompt_of(own, salt), **rest},
    st.sampled_from([0, 4, 8, 12, 16]),
    st.integers(1, 14),
    st.integers(0, 2),
    st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 12),
            "priority": st.integers(0, 2),
            "eos_ids": st.frozensets(st.integers(0, VOCAB - 1), max_size=4),
            "prompt_logprobs": st.sampled_from([None, None, 1]),
        }
    ),
)
pooling_requests = st.builds(
    lambda shared, own, salt, pooling: pooling_request(prompt_of(shared) + prompt_of(own, salt), pooling),
    st.sampled_from([0, 4, 8, 12, 16]),
    st.integers(1, 14),
    st.integers(0, 2),
    st.sampled_from(["mean", "last"]),
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), requests),
        st.tuples(st.just("add"), pooling_requests),
        st.tuples(st.just("add"), st.integers(0, 1 << 30).map(lambda seed: random_request(random.Random(seed)))),
        st.tuples(st.sampled_from(["step", "step", "launch"]), st.none()),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("break"), st.none()),
        st.tuples(st.just("bad"), st.integers(0, 5)),
        st.tuples(st.just("budget"), st.sampled_from([1, 2, 5, 64])),
        st.tuples(st.just("raise"), st.sampled_from(["plan", "match", "grow", "claim", "admit", "pick"])),
    ),
    max_size=40,
)


@settings(max_examples=120)
@given(loops, st.booleans(), operations)
def test_any_operations(options, at_launch, ops):
    run_ops(BreakingLoop(at_launch, **options), ops)


def test_crowded_runs_do_what_they_claim():
    """The same on longer random runs in small pools; and what shall be shown did happen."""
    totals: dict[str, int] = {}
    ends: set[str | None] = set()
    broken = bad = drafted = accepted = 0
    for seed in range(30):
        rng = random.Random(seed)
        loop = BreakingLoop(
            False,
            num_blocks=rng.choice((9, 14, 25)),
            budget=rng.choice((1, 3, 6, 12, 40)),
            max_num_seqs=rng.choice((2, 5, 8)),
            caching=rng.random() < 0.8,
            policy=rng.choice(("fcfs", "priority", "fair")),
            overlap=rng.random() < 0.7,
            groups=rng.choice((1, 2)),
            drafts=seed % 3 * 3,
            on_device=seed % 2 == 0,
        )
        run_ops(loop, random_ops(rng, 60))
        drafted, accepted = drafted + loop.guesses.drafted, accepted + loop.guesses.accepted
        for name, value in asdict(loop.scheduler.stats()).items():
            if isinstance(value, int):  # the others are a drafter's and grammars' own
                totals[name] = totals.get(name, 0) + value
        for end in loop.ended.values():
            ends |= {end.finish_reason, end.stop_reason if isinstance(end.stop_reason, str) else None}
            ends.add(end.error and end.error.code)
        broken += len(loop.broken)
        bad += len(loop.bad)
    never = {"steps_withdrawn", "running", "waiting", "preparing"}  # the mock has memory enough, and all requests end
    never |= {name for name in totals if "graph" in name or "captured" in name}
    assert all(value for name, value in totals.items() if name not in never), totals
    assert ends >= {"stop", "length", "kv_cache_full", "processor_failed"}
    assert broken > 5
    assert bad > 5
    assert drafted - accepted > 200 < accepted


@pytest.mark.parametrize("where", ["plan", "match", "grow", "claim", "admit", "pick"])
def test_scheduling_that_raises_now_and_then(where):
    """Each time one request fails; all others get their tokens, and every invariant holds after every step."""
    raised = failed = 0
    for seed in range(8):
        rng = random.Random(seed)
        options = {"num_blocks": rng.choice((14, 30)), "overlap": seed % 3 > 0, "reserve": seed % 2}
        loop = BreakingLoop(False, max_num_seqs=5, **options)
        ops = random_ops(rng, 60, breaks=seed % 2 == 0)
        for at in range(5, len(ops), 6):
            ops.insert(at, ("raise", where))
        run_ops(loop, ops)
        raised += loop.raised
        failed += sum(bool(end.error and end.error.code == "engine_failed") for end in loop.ended.values())
    assert raised == failed > 8


@pytest.mark.parametrize(
    ("where", "owner", "name"),
    [
        ("pick", Request, "unbook"),
        ("plan", Draft, "drop"),
        ("grow", Roster, "preempt"),
        ("claim", Roster, "remove"),
    ],
)
def test_books_that_are_not_put_right_are_seen(monkeypatch, where, owner, name):
    """Mutants: what scheduling had done before it raised stays as it is."""
    monkeypatch.setattr(owner, name, lambda *args: None)
    with pytest.raises((AssertionError, KeyError, TypeError)):  # a row of no request, for one
        test_scheduling_that_raises_now_and_then(where)


@pytest.mark.parametrize("seed", range(6))
def test_the_batch_does_not_change_tokens(seed):
    """The same requests through six different engines."""
    seen = []
    for budget, num_blocks, overlap, caching, slots in (
        (64, 60, True, True, 8),
        (1, 60, False, True, 8),
        (5, 9, True, True, 8),
        (16, 9, False, False, 3),
        (7, 12, True, True, 2),
        (64, 60, True, True, 1),
    ):
        rng = random.Random(seed)
        loop = BreakingLoop(
            False, budget=budget, num_blocks=num_blocks, overlap=overlap, caching=caching, max_num_seqs=slots
        )
        for _ in range(10):
            loop.add(**random_request(rng) | {"max_tokens": rng.randrange(1, 6)})
            loop.step()
        loop.finish_and_verify()
        assert not any(end.stop_reason == "kv_cache_full" for end in loop.ended.values())
        seen.append([loop.tokens[request] for request in loop.requests])
    assert all(tokens == seen[0] for tokens in seen)
