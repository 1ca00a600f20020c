"""Plans and results of real schedules, through bytes and back."""

from __future__ import annotations

import random
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from sched_harness import (
    BreakingLoop,
    grammar_processor,
    pooling_request,
    prompt_of,
    random_ops,
    run_ops,
    shift_processor,
)

from nanoengine.core.step import StepPlan, StepResult
from nanoengine.distributed.wire import decode, encode


def assert_same(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if is_dataclass(a):
        for f in fields(a):
            assert_same(getattr(a, f.name), getattr(b, f.name), f"{where}.{f.name}")
    elif isinstance(a, tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, where
        np.testing.assert_array_equal(a, b, err_msg=where)
    else:
        assert a == b, where


class WireLoop(BreakingLoop):
    """Nothing but bytes passes between scheduler and runner."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(False, **kwargs)
        self.results: list[StepResult] = []
        run, commit = self.runner.launch, self.scheduler.commit

        def launch(plan: StepPlan) -> None:
            copy = decode(StepPlan, encode(plan))
            assert_same(plan, copy, "plan")
            run(copy)

        def commit_copy(step: Any, result: StepResult) -> Any:
            copy = decode(StepResult, encode(result))
            assert_same(result, copy, "result")
            self.results.append(copy)
            return commit(step, copy)

        self.runner.launch = launch  # type: ignore[method-assign]
        self.scheduler.commit = commit_copy  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", range(4))
def test_random_runs_through_bytes(seed):
    loop = WireLoop(num_blocks=14, budget=9, groups=1 + seed % 2)
    run_ops(loop, random_ops(random.Random(seed), 40, pooling=0.2))
    assert len(loop.results) > 10


def test_every_part_of_a_message_was_carried():
    """Or the equality above would compare empty arrays only."""
    loop = WireLoop(num_blocks=9, budget=9)
    loop.add(
        prompt_of(13, 1),
        max_tokens=14,
        processors=(shift_processor(2), grammar_processor()),
        logprobs=2,
        prompt_logprobs=1,
    )
    loop.add(prompt_of(13, 2), max_tokens=14, stop_token_ids=frozenset({5, 3}), min_tokens=2)
    loop.add(**pooling_request(prompt_of(13, 3), "mean"))
    loop.finish_and_verify()
    plans = [step.plan for step in loop.steps]
    assert any(len(plan.pooled) for plan in plans)
    assert any(len(result.pooled) == 2 for result in loop.results)
    assert any(len(plan.new.token_ids) > 13 for plan in plans), "outputs go again with a preempted request"
    assert {column.processor for plan in plans for column in plan.columns} == {"shift"}
    assert {plan.late for plan in plans} == {True, False}
    assert any(len(plan.appends.block) for plan in plans)
    assert any(not plan.sampled.all() for plan in plans)
    assert any(plan.new.stop_ids.tolist() == [3, 5] for plan in plans)
    assert any(len(result.sampled_logprobs.top_ids) == 2 for result in loop.results)
    assert any(len(result.prompt_logprobs.top_ids) for result in loop.results)
    assert loop.scheduler.stats().preemptions > 0


def test_an_empty_message():
    for message in (StepPlan(), StepResult()):
        assert_same(message, decode(type(message), encode(message)), "empty")


def test_messages_are_small_quick_and_writable():
    """No archive, no pickle: 256 decode rows in a few kilobytes. What is read from a bytearray can be written."""
    rows = np.arange(256, dtype=np.int32)
    plan = StepPlan(slots=rows, query_lens=rows, starts=rows, logits_index=rows, logits_rows=rows, num_decode_rows=256)
    data = encode(plan)
    assert len(data) < 256 * 4 * 5 + 300
    for given in (data, bytearray(data)):
        copy = decode(StepPlan, given)
        assert_same(plan, copy, "plan")
        assert copy.slots.flags.writeable
        assert copy.slots.flags.aligned


@pytest.mark.parametrize("bad", [np.zeros(2, np.float16), np.zeros((2, 2), np.int32)])
def test_what_no_message_holds_is_refused(bad: Any):
    with pytest.raises(TypeError, match="message"):
        encode(StepPlan(slots=bad))
