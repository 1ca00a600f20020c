"""Steps launched in parts are the steps they are parts of: the same results bit for bit, on the numpy runner."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_harness import Loop, prompt_of, random_request

from nanoengine.api.errors import RequestError
from nanoengine.core.execution import split
from nanoengine.core.execution.split import Part, SlotsMoved, Splitter, halves, merged, slots_move
from nanoengine.core.step import NewSlots, StepPlan, StepResult
from nanoengine.distributed.wire import encode
from nanoengine.testing.mock_runner import MockRunner


class Arrived:
    def __init__(self, result: StepResult) -> None:
        self.result = result

    def wait(self) -> StepResult:
        return self.result


class SmallRunner(MockRunner):
    """Has memory for `limit` tokens at once. A launch that fails has applied its plan's writes, or none, by turns."""

    def __init__(self, limit: int, **sizes: int) -> None:
        super().__init__(**sizes)
        self.limit, self.attempts, self.rooms = limit, [], 0
        self.splitter = Splitter(self.launch_part, self.make_room)

    def make_room(self) -> None:
        self.rooms += 1

    def launch_part(self, plan: StepPlan) -> Arrived:
        self.attempts.append(plan.num_tokens)
        if plan.num_tokens > self.limit:
            if len(self.attempts) % 2:
                self._enter(plan.new)
                self.block_tables[plan.appends.group, plan.appends.slot, plan.appends.index] = plan.appends.block
            raise MemoryError(f"{plan.num_tokens} tokens")
        super().launch(plan)
        return Arrived(self._results.pop())

    def launch(self, plan: StepPlan) -> None:
        self._results.append(self.splitter.launch(plan).wait())


def small_loop(limit: int, **options: Any) -> Loop:
    loop = Loop(**options)
    plain = loop.runner
    loop.runner = SmallRunner(
        limit,
        groups=len(plain.kv),
        num_blocks=plain.kv.shape[1],
        block_size=plain.block_size,
        max_num_seqs=len(plain.slots),
        max_model_len=plain.token_ids.shape[1] - 1,
        vocab=plain.vocab,
    )
    return loop


def drive(loop: Loop, seed: int, count: int = 12) -> Loop:
    rng = random.Random(seed)
    for _ in range(count):
        with suppress(RequestError):  # it could never fit
            loop.add(**random_request(rng))
        if rng.random() < 0.5:
            loop.step()
    loop.finish_and_verify()
    return loop


OPTIONS = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([14, 60]),
        "block_size": st.sampled_from([1, 4]),
        "budget": st.sampled_from([3, 8, 40, 64]),
        "max_num_seqs": st.sampled_from([2, 8]),
        "caching": st.booleans(),
        "overlap": st.booleans(),
        "groups": st.sampled_from([1, 2]),
    }
)


def test_any_run_in_parts() -> None:
    parts = 0

    @settings(max_examples=30)
    @given(st.integers(1, 20), st.integers(0, 1 << 20), OPTIONS)
    def each(limit: int, seed: int, options: dict[str, Any]) -> None:
        nonlocal parts
        runner: Any = drive(small_loop(limit, **options), seed).runner
        parts += sum(n <= limit for n in runner.attempts)
        assert runner.rooms == sum(n > limit for n in runner.attempts)

    each()
    assert parts > 500


@settings(max_examples=30)
@given(st.integers(0, 1 << 20), st.integers(1, 9))
def test_results_in_parts_equal_those_of_the_whole_step(seed: int, limit: int) -> None:
    """Two runners side by side, one of which splits."""
    whole, split_up = small_loop(10**9, budget=30), small_loop(limit, budget=30)
    found: list[list[StepResult]] = []
    for loop in (whole, split_up):
        results: list[StepResult] = []
        launch = loop.runner.launch

        def recorded(plan: StepPlan, loop: Loop = loop, launch: Any = launch, results: Any = results) -> None:
            launch(plan)
            results.append(loop.runner._results[-1])

        loop.runner.launch = recorded  # type: ignore[method-assign]
        drive(loop, seed, count=6)
        found.append(results)
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert one.parts == 1
        assert encode(replace(other, parts=1)) == encode(one)
    assert any(result.parts > 1 for result in found[1])


def test_a_row_that_fails_in_one_part_gives_no_token() -> None:
    plan = StepPlan(
        slots=np.array([0, 1], np.int32),
        num_decode_rows=1,
        query_lens=np.array([1, 6], np.int32),
        starts=np.array([4, 0], np.int32),
        logits_index=np.array([0, 6], np.int32),
        logits_rows=np.array([0, 1], np.int32),
        sampled=np.array([True, True]),
        prompt_logprobs=np.array([0, 0], np.int32),
    )
    front, rest = halves(Part(plan, 0))
    assert [p.plan.query_lens.tolist() for p in (front, rest)] == [[1, 2], [4]]
    assert [p.first_row for p in (front, rest)] == [0, 1]
    assert rest.plan.starts.tolist() == [2]

    def result(tokens: list[int], counts: list[int], failed: list[int]) -> StepResult:
        return StepResult(**{k: np.array(v, np.int32) for k, v in locals().items() if k != "tokens"}, token_ids=tokens)

    given = [(front, result(np.array([7]), [1, 0], [0, 1])), (rest, result(np.array([9]), [1], [0]))]
    told = merged(plan, given)
    assert told.token_ids.tolist() == [7]
    assert told.counts.tolist() == [1, 0]
    assert told.failed.tolist() == [0, 1]


def test_a_part_of_one_token_that_fails_ends_the_step() -> None:
    loop = small_loop(0)
    loop.add(prompt_of(5))
    with pytest.raises(MemoryError, match="1 tokens") as caught:
        loop.step()
    assert caught.value.__notes__ == ["with a single token left of its step"]
    runner: Any = loop.runner
    assert runner.attempts == [5, 2, 1, 1]


def test_a_lone_token_gets_a_second_try_with_room_made() -> None:
    class Once(SmallRunner):
        def make_room(self) -> None:
            super().make_room()
            self.limit = 1

    runner = Once(0, groups=1, num_blocks=9, block_size=4, max_num_seqs=2, max_model_len=32, vocab=97)
    loop = Loop(num_blocks=8, max_num_seqs=2, max_model_len=32)
    loop.runner = runner
    loop.add(prompt_of(1), max_tokens=3)
    loop.finish_and_verify()
    assert runner.rooms == 1
    assert runner.attempts == [1, 1, 1, 1]


def test_other_errors_are_not_split() -> None:
    calls = []

    def launch(plan: StepPlan) -> Arrived:
        calls.append(plan)
        raise RuntimeError("a kernel blew up")

    loop = Loop()
    loop.add(prompt_of(5))
    step = loop.scheduler.schedule()
    assert step is not None
    with pytest.raises(RuntimeError, match="blew up"):
        Splitter(launch, lambda: None).launch(step.plan)
    assert len(calls) == 1


def test_what_fails_while_slots_move_is_not_split() -> None:
    calls = []

    def launch(plan: StepPlan) -> Arrived:
        calls.append(plan)
        with slots_move():
            raise MemoryError("none left")

    loop = Loop()
    loop.add(prompt_of(5))
    step = loop.scheduler.schedule()
    assert step is not None
    with pytest.raises(SlotsMoved, match="none left"):
        Splitter(launch, lambda: None).launch(step.plan)
    assert len(calls) == 1
    with pytest.raises(KeyError), slots_move():
        raise KeyError("other errors pass")


# -- mutants ----------------------------------------------------------------------------------------------------------


def _loses_the_rest(part: Part) -> tuple[Part, Part]:
    """What stays behind of the row that is cut is never computed."""
    front, rest = halves(part)
    if rest.plan.num_rows > 1 and front.first_row + front.plan.num_rows > rest.first_row:
        gone = int(rest.plan.query_lens[0])
        keep = rest.plan.logits_rows > 0
        picked = {n: getattr(rest.plan, n)[keep] for n in ("sampled", "prompt_logprobs")}
        plan = replace(
            rest.plan,
            **{n: getattr(rest.plan, n)[1:] for n in ("slots", "query_lens", "starts")},
            logits_index=rest.plan.logits_index[keep] - gone,
            logits_rows=rest.plan.logits_rows[keep] - 1,
            **picked,
        )
        return front, Part(plan, rest.first_row + 1)
    return front, rest


def _writes_twice(part: Part) -> tuple[Part, Part]:
    front, rest = halves(part)
    return front, Part(replace(rest.plan, new=part.plan.new), rest.first_row)


def _no_writes(part: Part) -> tuple[Part, Part]:
    front, rest = halves(part)
    return Part(replace(front.plan, new=NewSlots()), front.first_row), rest


def _same_rows(part: Part) -> tuple[Part, Part]:
    front, rest = halves(part)
    return front, Part(rest.plan, front.first_row)


def _same_starts(part: Part) -> tuple[Part, Part]:
    front, rest = halves(part)
    cut = front.first_row + front.plan.num_rows > rest.first_row
    starts = rest.plan.starts.copy()
    if cut:
        starts[0] = front.plan.starts[-1]
    return front, Part(replace(rest.plan, starts=starts), rest.first_row)


def _twice_the_row(part: Part) -> tuple[Part, Part]:
    front, rest = halves(part)
    return front, Part(rest.plan, rest.first_row) if front.plan.num_rows == 1 else Part(front.plan, rest.first_row)


@pytest.mark.parametrize(
    "mutant", [_loses_the_rest, _writes_twice, _no_writes, _same_rows, _same_starts, _twice_the_row]
)
def test_mutants_are_caught(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    drive(small_loop(5, budget=40), seed=4)
    monkeypatch.setattr(split, "halves", mutant)
    with pytest.raises((AssertionError, IndexError)):
        drive(small_loop(5, budget=40), seed=4)


def test_every_field_of_a_plan_and_of_a_result_is_thought_of() -> None:
    """A new one must be cut, and joined, too."""
    plan = {"step", "new", "columns", "appends", "slots", "num_decode_rows", "query_lens", "starts"}
    plan |= {"logits_index", "logits_rows", "sampled", "prompt_logprobs"}
    assert {f.name for f in fields(StepPlan)} == plan
    result = {"step", "token_ids", "counts", "failed", "sampled_logprobs", "prompt_logprobs", "graphs", "parts"}
    assert {f.name for f in fields(StepResult)} == result
