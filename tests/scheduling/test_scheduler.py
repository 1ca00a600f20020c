"""Fixed cases of the scheduler, on the mock runner."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sched_harness import VOCAB, BreakingLoop, GrammarState, Loop, grammar_processor, prompt_of, shift_processor, truth

from nanoengine.api.errors import ConfigError, RequestError
from nanoengine.core.request import Status
from nanoengine.core.scheduling.block_manager import Pool
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import ROW_BAD_LOGITS

overlaps = pytest.mark.parametrize("overlap", [False, True])


def test_expected_tokens_vary_with_every_input():
    """The truth must tell histories apart, or nothing below means anything."""
    loop = Loop()
    base = truth(loop.request(prompt_of(9)), 256)
    others = [
        loop.request(prompt_of(10)),
        loop.request([*prompt_of(8), 0]),
        loop.request([1, *prompt_of(9)[1:]]),
        loop.request([*prompt_of(9)[4:8], *prompt_of(9)[:4], prompt_of(9)[8]]),
        loop.request(prompt_of(9), seed=8),
        loop.request(prompt_of(9), sample_index=1),
        loop.request(prompt_of(9), processors=(shift_processor(1),)),
        loop.request(prompt_of(9), processors=(grammar_processor(),)),
    ]
    assert all(truth(other, 256) != base for other in others)
    assert len(set(base)) > 4


@overlaps
def test_one_request_and_run_ahead(overlap):
    loop = Loop(overlap=overlap)
    request = loop.add(prompt_of(10), max_tokens=6)
    loop.finish_and_verify()
    assert len(loop.steps) == 6, "a stop by length is known when scheduling: no dead row"
    assert [step.plan.num_decode_rows for step in loop.steps] == [0, 1, 1, 1, 1, 1]
    assert loop.ended[request].finish_reason == "length"


def test_decode_row_is_scheduled_while_its_token_is_in_flight():
    loop = Loop()
    request = loop.add(prompt_of(10))
    loop.launch()
    loop.launch()
    assert request.output_token_ids == []
    assert request.num_in_flight == 2
    loop.finish_and_verify()


@overlaps
@pytest.mark.parametrize("groups", [1, 2])
def test_full_hit_of_exactly_k_blocks(overlap, groups):
    """A prompt of k whole blocks may hit k - 1 of them: the last token must be computed for its logits."""
    loop = Loop(overlap=overlap, groups=groups)
    first = loop.add(prompt_of(12))
    loop.run()
    second = loop.add(prompt_of(12))
    third = loop.add(prompt_of(13))
    loop.finish_and_verify()
    assert (first.num_cached, second.num_cached, third.num_cached) == (0, 8, 12)
    assert loop.scheduler.stats().prefix_hit_tokens == 20


@overlaps
def test_generated_blocks_are_hit(overlap):
    loop = Loop(overlap=overlap)
    first = loop.add(prompt_of(6), max_tokens=15)
    loop.run()
    follow_up = loop.add([*first.token_ids, 5, 6])
    loop.finish_and_verify()
    assert follow_up.num_cached == 20, "21 tokens; the last one's KV was never written"


@overlaps
def test_hit_after_preemption(overlap):
    """Two requests outgrow the pool: the later one is preempted, comes back, and finds its own blocks."""
    loop = Loop(overlap=overlap, num_blocks=9)
    for salt in (1, 2):
        loop.add(prompt_of(13, salt), max_tokens=14)
    loop.finish_and_verify()
    stats = loop.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.resumed_hit_tokens > 0
    assert stats.prefix_hit_tokens == 0, "what a preempted request finds again is no hit of its prompt"


@overlaps
@pytest.mark.parametrize("budget", [1, 3, 4, 7, 16])
def test_prompt_longer_than_the_budget(overlap, budget):
    loop = Loop(overlap=overlap, budget=budget)
    for salt in range(3):
        loop.add(prompt_of(30, salt), max_tokens=5)
    loop.finish_and_verify()
    stats = loop.scheduler.stats()
    assert stats.chunks > 0
    assert stats.mixed_steps > 0 or budget == 1


def test_mixed_step_has_decode_rows_first():
    loop = Loop(budget=8)
    loop.add(prompt_of(3), max_tokens=20)
    loop.step()
    loop.add(prompt_of(30, 1))
    loop.step()
    step = loop.steps[-1]
    assert step.plan.num_decode_rows == 1
    assert step.plan.query_lens.tolist() == [1, 7]
    assert step.plan.sampled.tolist() == [True], "a chunk draws nothing"
    loop.finish_and_verify()


@overlaps
def test_length_edges(overlap):
    loop = Loop(overlap=overlap, max_model_len=20, num_blocks=5)
    full = loop.add(prompt_of(19), max_tokens=50)
    one = loop.add(prompt_of(5, 1), max_tokens=1)
    unbounded = loop.add(prompt_of(5, 2), max_tokens=None)
    loop.finish_and_verify()
    assert [len(loop.tokens[r]) for r in (full, one, unbounded)] == [1, 1, 15]


def test_refused_alone_where_it_cannot_fit():
    loop = Loop(num_blocks=4)
    loop.add(prompt_of(16), max_tokens=1)
    with pytest.raises(RequestError, match="17 tokens need 5 KV blocks of 4 and the cache has 4") as refused:
        loop.add(prompt_of(17))
    assert refused.value.code == "does_not_fit"
    loop.finish_and_verify()


@overlaps
@pytest.mark.parametrize("budget", [4, 64])
def test_eos_at_a_chunk_edge(overlap, budget):
    """The first token drawn, right behind the prompt's last whole chunk and block, ends the request."""
    loop = Loop(overlap=overlap, budget=budget)
    eos = truth(loop.request(prompt_of(8)), 256)[0]
    request = loop.add(prompt_of(8), eos_ids=frozenset({eos}))
    other = loop.add(prompt_of(8, 1), max_tokens=12)
    loop.finish_and_verify()
    assert loop.tokens[request] == [eos]
    assert loop.ended[request].stop_reason is None
    assert len(loop.tokens[other]) == 12
    dead = [step for step in loop.steps[1:] if request in [r for r, _ in step.rows]]
    assert bool([s for s in dead if s.plan.num_decode_rows]) == overlap, "run-ahead leaves a dead row, and only it does"


@overlaps
def test_stop_ids_eos_wins_and_min_tokens(overlap):
    loop = Loop(overlap=overlap)
    tokens = truth(loop.request(prompt_of(8), max_tokens=12), 256)
    at = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    stop = loop.add(prompt_of(8), max_tokens=12, stop_token_ids=frozenset({tokens[at]}))
    both = loop.add(
        prompt_of(8), max_tokens=12, stop_token_ids=frozenset({tokens[at]}), eos_ids=frozenset({tokens[at]})
    )
    edge = loop.add(prompt_of(8), max_tokens=at + 1, eos_ids=frozenset({tokens[at]}))
    later = loop.add(prompt_of(8), max_tokens=12, eos_ids=frozenset({tokens[1]}), min_tokens=5)
    loop.finish_and_verify()
    assert loop.ended[stop][2:4] == ("stop", tokens[at])
    assert len(loop.tokens[stop]) == at + 1
    assert loop.ended[both][2:4] == ("stop", None)
    assert loop.ended[edge][2:4] == ("stop", None), "stop wins over length"
    assert len(loop.tokens[later]) >= 6


def test_a_stop_token_below_min_tokens_does_not_end_a_request():
    """Even if a runner fails to mask it."""
    loop = Loop(overlap=False)
    token = truth(loop.request(prompt_of(8)), 256)[0]
    request = loop.add(prompt_of(8), eos_ids=frozenset({token}), min_tokens=3)
    step = loop.scheduler.schedule()
    for stops in ("stop_ids", "min_lens"):
        assert len(getattr(step.plan.new, stops)) == 1
    loop.runner.launch(step.plan)
    result = loop.runner.wait()
    result.token_ids[0] = token
    (update,) = loop.scheduler.commit(step, result)
    assert update.finish_reason is None
    assert request.status is Status.RUNNING


@overlaps
def test_constant_hash_still_gives_right_tokens(overlap):
    loop = Loop(overlap=overlap, hash_fn=lambda data: b"same", num_blocks=24)
    for salt in (0, 1, 0, 2, 1):
        loop.add(prompt_of(14, salt))
    loop.finish_and_verify()
    again = loop.add(prompt_of(14, 0))
    loop.finish_and_verify()
    assert again.num_cached == 4, "the one block that the one hash can name is found, and verified"


@overlaps
@pytest.mark.parametrize("prompt", [13, 16])
def test_lone_request_that_outgrows_the_pool(overlap, prompt):
    loop = Loop(overlap=overlap, num_blocks=5)
    request = loop.add(prompt_of(prompt), max_tokens=100)
    other = loop.add(prompt_of(5, 3), max_tokens=4)
    loop.finish_and_verify()
    end = loop.ended[request]
    assert (end.finish_reason, end.stop_reason) == ("length", "kv_cache_full")
    assert request.num_tokens == 21, "20 tokens have KV, and one more was drawn from them"
    assert len(loop.tokens[other]) == 4


@overlaps
@pytest.mark.parametrize("when", range(6))
def test_abort_beside(overlap, when):
    loop = Loop(overlap=overlap, budget=8)
    others = [loop.add(prompt_of(9, salt), max_tokens=9) for salt in range(2)]
    gone = loop.add(prompt_of(20, 5), max_tokens=9)
    for _ in range(when):
        loop.step()
    loop.abort(gone)
    loop.abort(gone)
    late = loop.add(prompt_of(9, 7), max_tokens=9)
    loop.finish_and_verify()
    assert all(len(loop.tokens[r]) == 9 for r in (*others, late))
    assert gone not in loop.ended


def test_a_freed_slot_is_reused_at_once():
    loop = Loop(max_num_seqs=1)
    first = loop.add(prompt_of(6))
    second = loop.add(prompt_of(6, 1))
    loop.launch()
    loop.abort(first)
    loop.launch()
    assert [r for step in loop.in_flight for r, _ in step.rows] == [first, second]
    loop.finish_and_verify()


def test_cache_salt_separates():
    loop = Loop()
    for key in (b"", b"a", b"b", b"a"):
        loop.add(prompt_of(13), cache_key=key)
        loop.run()
    loop.finish_and_verify()
    assert [r.num_cached for r in loop.requests] == [0, 0, 0, 12]


def test_without_prefix_caching_nothing_is_found():
    loop = Loop(caching=False)
    for _ in range(3):
        loop.add(prompt_of(13))
        loop.run()
    loop.finish_and_verify()
    assert loop.scheduler.stats().prefix_hit_tokens == 0


@overlaps
def test_samples_of_one_prompt_compute_it_once(overlap):
    """While one request computes a block, those that will miss it wait for the next step, and hit."""
    loop = Loop(overlap=overlap, budget=16)
    for index in range(5):
        loop.add(prompt_of(23), sample_index=index, arrival=0)
    other = loop.add(prompt_of(7, 4))
    loop.finish_and_verify()
    assert [r.num_cached for r in loop.requests[:5]] == [0, 20, 20, 20, 20]
    prefill = sum(int(s.plan.query_lens[s.plan.num_decode_rows :].sum()) for s in loop.steps)
    assert prefill == 23 + 4 * 3 + other.prompt_len
    assert len({tuple(loop.tokens[r]) for r in loop.requests[:5]}) == 5, "samples differ by their index"


def test_deferred_requests_do_not_hold_up_others():
    loop = Loop()
    loop.add(prompt_of(9))
    deferred = loop.add(prompt_of(9), sample_index=1)
    other = loop.add(prompt_of(9, 1))
    loop.launch()
    assert deferred.status is Status.WAITING
    assert other.status is Status.RUNNING
    loop.launch()
    assert deferred.status is Status.RUNNING
    loop.finish_and_verify()


def spread_under_a_small_budget(overlap: bool, scheduler: type[Scheduler] = Scheduler) -> int:
    """Five runners, and from then on a budget of two: the most that their outputs ever differ in length."""
    loop = Loop(overlap=overlap, max_num_seqs=5, scheduler=scheduler)
    for salt in range(5):
        loop.add(prompt_of(2, salt), max_tokens=30)
    loop.step()
    loop.set_budget(2)
    spread = 0
    while len(loop.scheduler.running) == 5:
        loop.step()
        lengths = [len(loop.tokens[r]) for r in loop.requests]
        spread = max(spread, max(lengths) - min(lengths))
    loop.finish_and_verify()
    return spread


@overlaps
def test_budget_below_the_runners_starves_no_request(overlap):
    class InOrder(Scheduler):
        def _pick_running(self, draft):
            self._first = None
            super()._pick_running(draft)

    assert spread_under_a_small_budget(overlap) <= 2
    assert spread_under_a_small_budget(overlap, InOrder) > 20, "the mutant starves three of the five"


@overlaps
@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
@pytest.mark.parametrize("budget", [1, 2, 3])
def test_budget_below_max_num_seqs(overlap, policy, budget):
    loop = Loop(overlap=overlap, budget=budget, max_num_seqs=5, policy=policy)
    for salt in range(5):
        processors = (grammar_processor(),) if salt % 2 else ()
        loop.add(prompt_of(2 + salt, salt), max_tokens=9, processors=processors, priority=-salt)
    loop.finish_and_verify()
    assert len(loop.ended) == 5


def test_priority_orders_admission_and_names_the_victim():
    loop = Loop(policy="priority", num_blocks=8, max_num_seqs=2, overlap=False)
    low = loop.add(prompt_of(6), max_tokens=24, priority=5)
    loop.step()
    later = loop.add(prompt_of(6, 1), max_tokens=24, priority=3)
    high = loop.add(prompt_of(6, 2), max_tokens=24, priority=-1)
    loop.step()
    assert low.status is high.status is Status.RUNNING
    assert later.status is Status.WAITING
    victims = []
    while loop.scheduler.running or loop.scheduler.waiting:
        before = set(loop.scheduler.running)
        loop.step()
        victims += [r for r in before if r.status is Status.WAITING]
    assert victims[0] is low
    assert high not in victims
    assert list(loop.ended) == [high, later, low]
    loop.finish_and_verify()


def test_fcfs_preempts_the_last_admitted_which_returns_first():
    loop = Loop(num_blocks=9, max_num_seqs=2, overlap=False)
    first, second, third = (loop.add(prompt_of(13, salt), max_tokens=14) for salt in range(3))
    while not loop.scheduler.stats().preemptions:
        loop.step()
    assert loop.scheduler.running == [first]
    assert loop.scheduler.waiting == [second, third]
    loop.finish_and_verify()
    assert list(loop.ended) == [first, second, third]


def test_victim_gets_its_token_in_flight_and_waits_for_it():
    loop = Loop(num_blocks=6, max_num_seqs=2)
    first, second = (loop.add(prompt_of(8, salt), max_tokens=8) for salt in range(2))
    while second.status is not Status.WAITING or not second.generation:
        assert loop.launch() or loop.in_flight
        if len(loop.in_flight) == 2 and second.status is not Status.WAITING:
            loop.commit()
    assert second.num_in_flight == 1
    known = second.num_tokens
    loop.commit()
    assert second.num_tokens == known + 1
    assert second.num_in_flight == 0
    loop.finish_and_verify()
    assert loop.scheduler.stats().preemptions >= 1
    assert len(loop.tokens[first]) == 8


@overlaps
def test_requests_with_host_state_that_forces_nothing_run_ahead_as_others(overlap):
    loop = Loop(overlap=overlap, budget=8)
    host = loop.add(prompt_of(20), processors=(grammar_processor(forces=False), shift_processor(3)), max_tokens=9)
    plain = loop.add(prompt_of(6, 1), max_tokens=20, processors=(shift_processor(2),))
    loop.finish_and_verify()
    numbers = [step.plan.step for step in loop.steps if host in [r for r, _ in step.rows]]
    assert (np.diff(numbers) == 1).all()
    assert len(loop.tokens[plain]) == 20
    late = [step for step in loop.steps if step.plan.late]
    assert [step.plan.step for step in late] == numbers[-9:]  # a chunk that is not sampled is not late
    assert not [c for step in loop.steps for c in step.plan.columns if c.processor == "grammar"]


@overlaps
def test_a_host_processor_that_raises_fails_alone(overlap):
    loop = Loop(overlap=overlap)
    bad = loop.add(prompt_of(6), processors=(grammar_processor(fail_at=3),))
    at_once = loop.add(prompt_of(6, 1), processors=(grammar_processor(fail_at=0),))
    good = loop.add(prompt_of(6, 2), processors=(grammar_processor(),))
    loop.finish_and_verify()
    for request, count in ((bad, 3), (at_once, 0)):
        error = loop.ended[request].error
        assert error.code == "processor_failed"
        assert "the grammar is stuck" in str(error)
        assert isinstance(error.__cause__, ValueError)
        assert len(loop.tokens[request]) == count
    assert len(loop.tokens[good]) == 8


def test_unknown_host_column_is_named():
    class Wrong(type(grammar_processor().params)):
        def start(self, prompt_token_ids, ctx):
            return WrongState(-1, [])

    class WrongState(GrammarState):
        def columns(self, drafts):
            return {"alowed": [[1]]}

    loop = Loop()
    processor = grammar_processor()
    request = loop.add(prompt_of(6), processors=(type(processor)("grammar", Wrong(), {}),))
    loop.finish_and_verify()
    assert "did you mean 'allowed'" in str(loop.ended[request].error)


def test_columns_of_new_slots_share_a_message_and_come_again_after_preemption():
    loop = Loop(num_blocks=7)
    for salt in range(3):
        loop.add(prompt_of(5, salt), max_tokens=14, processors=(shift_processor(salt + 1),))
    loop.finish_and_verify()
    (column,) = loop.steps[0].plan.columns
    assert column.slots.tolist() == [0, 1, 2]
    assert column.values.tolist() == [1, 2, 3]
    assert column.offsets.tolist() == [0, 1, 2, 3]
    assert loop.scheduler.stats().preemptions > 0


@overlaps
@pytest.mark.parametrize("budget", [5, 64])
def test_logprobs_and_prompt_logprobs(overlap, budget):
    loop = Loop(overlap=overlap, budget=budget)
    plain = loop.add(prompt_of(21))
    loop.run()
    asks = loop.add(prompt_of(21), prompt_logprobs=2, logprobs=3)
    chosen = loop.add(prompt_of(11, 1), prompt_logprobs=0, logprobs=0)
    short = loop.add(prompt_of(1, 2), prompt_logprobs=1)
    loop.finish_and_verify()
    assert asks.num_cached == chosen.num_cached == short.num_cached == 0
    assert loop.prompt_positions[asks] == list(range(1, 21))
    assert plain.num_tokens == 29
    after = loop.add(prompt_of(11, 1))
    loop.finish_and_verify()
    assert after.num_cached == 8, "it read no cache, but it published"


@overlaps
def test_prompt_logprobs_are_delivered_once_despite_preemption(overlap):
    loop = Loop(overlap=overlap, num_blocks=9, budget=7)
    for salt in (1, 2, 3):
        loop.add(prompt_of(13, salt), max_tokens=14, prompt_logprobs=1)
    loop.finish_and_verify()
    stats = loop.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.resumed_hit_tokens > 0, "all delivered: it may read the cache then"


@overlaps
def test_failed_row_is_let_go(overlap):
    loop = Loop(overlap=overlap)
    bad, good = loop.add(prompt_of(6)), loop.add(prompt_of(6, 1))
    loop.runner.fail_row = lambda plan, row: (
        ROW_BAD_LOGITS if plan.step == 3 and plan.slots[row] == 0 else 0  # slot 0: the first one
    )
    loop.finish_and_verify()
    assert loop.ended[bad].error.code == "bad_logits"
    assert len(loop.tokens[bad]) == 3
    assert len(loop.tokens[good]) == 8


# Broken steps


@overlaps
@pytest.mark.parametrize("at_launch", [False, True])
@pytest.mark.parametrize("from_token", [0, 9, 25])
def test_broken_steps_find_the_request_that_is_the_cause(overlap, at_launch, from_token):
    loop = BreakingLoop(at_launch, overlap=overlap, budget=24)
    shared = prompt_of(13)
    good = [loop.add(shared, sample_index=i, max_tokens=20) for i in range(2)]
    bad = loop.add([*shared, 3], max_tokens=20)
    good += [loop.add(prompt_of(9, salt), max_tokens=20) for salt in (5, 6)]
    loop.poison(bad, from_token)
    loop.finish_and_verify()
    assert loop.failed == [bad]
    assert all(len(loop.tokens[r]) == 20 for r in good)
    assert loop.scheduler.stats().preemptions > 0
    first, last = loop.broken[0], loop.broken[-1]
    assert len(first[0]) > 1
    assert len(first) == (2 if overlap and not at_launch else 1)
    assert last == [[bad]], "found alone, and not run ahead"


def test_one_broken_step_of_two_requests_recovers():
    """A fault that passes: both are run alone once, then together, and none fails."""
    loop = BreakingLoop(False, overlap=True)
    a, b = loop.add(prompt_of(9)), loop.add(prompt_of(9, 1))
    loop.poison(a)
    loop.launch()
    loop.launch()
    loop.commit()
    loop.poisoned.clear()
    assert len(loop.broken[0]) == 2
    assert loop.failed == []
    assert loop.scheduler.waiting == [a, b]
    assert a.num_in_flight == b.num_in_flight == 0
    before = len(loop.steps)
    loop.finish_and_verify()
    rows = [[r for r, _ in step.rows] for step in loop.steps[before:]]
    assert rows[:2] == [[a], [b]]
    assert {a, b} in map(set, rows)


def test_what_a_broken_step_published_is_withdrawn():
    loop = BreakingLoop(False, overlap=False)
    a, b = loop.add(prompt_of(13)), loop.add(prompt_of(13, 1))
    loop.poison(a)
    step = loop.launch()
    assert len(step.published) == 6
    loop.commit()
    assert not len(loop.blocks.match(a)[0])
    assert not len(loop.blocks.match(b)[0])
    loop.poisoned.clear()
    loop.finish_and_verify()


def test_retried_requests_wait_for_room_while_others_run():
    """A request that holds the blocks which a retried one needs goes on, and frees them."""
    loop = BreakingLoop(True, overlap=False, num_blocks=8, max_num_seqs=3, budget=20)
    other = loop.add(prompt_of(18, 9), max_tokens=6)
    loop.launch()
    loop.commit()
    loop.add(prompt_of(6, 1), max_tokens=8)
    loop.add(prompt_of(6, 2), max_tokens=8)
    step = loop.scheduler.schedule()
    assert step.plan.num_rows >= 2
    del loop.scheduler._in_flight[step.plan.step]
    # As if the first one had not been in the step that broke: only the rest are retried.
    loop.scheduler._in_flight[step.plan.step] = step
    kept = [i for i, (r, _) in enumerate(step.rows) if r is other]
    assert kept == [0]
    loop.scheduler.fail([step])
    loop.scheduler._roster.retry_alone.discard(other)
    loop.finish_and_verify()


def test_configuration_errors_name_the_fix():
    with pytest.raises(ConfigError, match="num_gpu_blocks_override"):
        Loop(num_blocks=0)


def test_many_requests_through_few_slots():
    loop = Loop(max_num_seqs=3, num_blocks=20, budget=9)
    for i, length in zip(range(40), itertools.cycle((1, 4, 9, 17)), strict=False):
        loop.add(prompt_of(length, i % 5), max_tokens=1 + i % 7, eos_ids=frozenset({i % VOCAB}))
    loop.finish_and_verify()
    assert len(loop.ended) == 40


@pytest.mark.parametrize("caching", [True, False])
def test_a_reserve_at_admission_saves_preemptions(caching):
    """Blocks that running requests will need are not given to one that would have to give them back at once."""
    preemptions, tokens = [], []
    for reserve in (0, 1, 3):
        loop = Loop(num_blocks=30, block_size=4, max_num_seqs=8, caching=caching, reserve=reserve)
        for i in range(24):
            loop.add(prompt_of(13, i), max_tokens=20)
        computed = 0
        while loop.scheduler.running or loop.scheduler.waiting:
            loop.step()
        computed = sum(step.plan.num_tokens for step in loop.steps)
        loop.finish_and_verify()
        preemptions.append(loop.scheduler.stats().preemptions)
        tokens.append(computed)
    assert preemptions == sorted(preemptions, reverse=True)
    assert preemptions[0] > 2 * preemptions[-1]
    assert tokens[0] > tokens[-1]


def test_a_reserve_holds_back_no_request_when_nothing_runs():
    loop = Loop(num_blocks=10, block_size=4, reserve=100)
    for i in range(3):
        loop.add(prompt_of(30, i), max_tokens=4)
    loop.finish_and_verify()
    assert {len(step.rows) for step in loop.steps} == {1}


def test_a_waiting_prompt_is_followed_through_the_index_once(monkeypatch):
    """While it waits for blocks, each step looks at what is new, not at the whole prompt again."""
    looked: list[int] = []
    follow = Pool.follow

    def counted(pool, keys, parent, tokens):
        looked.append(len(keys))
        return follow(pool, keys, parent, tokens)

    loop = Loop(num_blocks=40, max_num_seqs=4)
    loop.add(prompt_of(121), max_tokens=1)
    loop.run()
    holder = loop.add(prompt_of(5, 1), max_tokens=60)
    loop.step()
    monkeypatch.setattr(Pool, "follow", counted)
    loop.add([*prompt_of(120), *prompt_of(36, 2)], max_tokens=1)
    for _ in range(20):
        loop.step()
    (waiting,) = loop.scheduler.waiting
    assert len(waiting.found[0].blocks) >= 29
    assert looked == [38]
    loop.abort(holder)
    loop.finish_and_verify()
