"""Host states: fed each token once, in order, before the draw behind it, whatever else happens; and steps with them run
ahead as others. Bit for bit on the mock model, against tokens computed from the history alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoengine import LLM, RequestOutput, SamplingParams, build_engine
from nanoengine.core import engine
from nanoengine.core.engine import Engine
from nanoengine.core.execution.executor import Call, InProcessExecutor
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.core.request import Request
from nanoengine.core.scheduling.draft import Draft
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.params.host_states import BoundState
from nanoengine.params.speculation import MAX_DRAFTS
from nanoengine.testing.invariants import check_scheduler
from nanoengine.testing.mock_model import reference_logits

from . import chain_plugin
from .chain_plugin import allowed, chain_at, hashed
from .support import VOCAB, greedy, mock_llm, prompts, tokens_of
from .test_drafts import with_drafts
from .test_same_tokens import WAYS

COUNT = 12
PLUGIN = Path(chain_plugin.__file__)
CHAIN = SamplingParams(temperature=0, max_tokens=COUNT, chain=3)


def chained(prompt: Sequence[int], count: int = COUNT, chain: int = 3) -> tuple[int, ...]:
    """The likeliest of the ids that the history allows, token by token."""
    tokens = list(prompt)
    for _ in range(count):
        ids = allowed(hashed(tokens), chain_at(hashed(tokens), chain), VOCAB)
        tokens.append(ids[int(reference_logits(tokens, VOCAB)[torch.tensor(ids)].argmax())])
    return tuple(tokens[len(prompt) :])


def follows(prompt: Sequence[int], output: Sequence[int], chain: int = 3) -> bool:
    tokens = list(prompt)
    for token in output:
        if token not in allowed(hashed(tokens), chain_at(hashed(tokens), chain), VOCAB):
            return False
        tokens.append(token)
    return True


def chain_llm(tmp_path: Path, **options: Any) -> LLM:
    return mock_llm(tmp_path, plugins=[chain_plugin], **options)


RUNS = pytest.mark.parametrize(("overlap", "together"), [(True, False), (True, True), (False, True)])


@RUNS
@pytest.mark.parametrize("name", WAYS)
def test_the_tokens_are_those_of_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overlap: bool, together: bool
) -> None:
    options, asked, happened = WAYS[name]
    seen = asked_together(monkeypatch) if together else [2]
    params = [CHAIN.replace(max_tokens=24), SamplingParams(temperature=0, max_tokens=24)]
    with chain_llm(tmp_path, **{"overlap": overlap, **options}) as llm:
        found = tokens_of(llm.generate(asked, [params[i % 4 == 3] for i in range(len(asked))], use_tqdm=False))
        stats = llm.stats()
        check_scheduler(llm.engine.scheduler)
    assert found == [greedy(p, 24) if i % 4 == 3 else chained(p, 24) for i, p in enumerate(asked)]
    assert max(seen) > 1 or name == "batch 1"
    assert happened(stats), stats
    assert stats.free_blocks == stats.num_blocks


@pytest.mark.parametrize("fuse", [True, False])
def test_samples_and_equal_requests_have_states_of_their_own(tmp_path: Path, fuse: bool) -> None:
    """The draw does not depend on how a request runs: with others or alone, run ahead or not."""
    prompt, drawn = [4, 5, 6], CHAIN.replace(temperature=2.0, chain=7, n=3, seed=5)
    asked = [drawn, drawn, drawn.replace(seed=6)]
    found = []
    for options in ({}, {"overlap": False, "max_num_seqs": 2}, {"num_gpu_blocks_override": 22}):
        with chain_llm(tmp_path, fuse_sampling=fuse, **options) as llm:
            outputs = llm.generate([prompt] * 3, asked, use_tqdm=False)
            found.append([[sample.token_ids for sample in output.outputs] for output in outputs])
            assert (llm.stats().preemptions > 0) == ("num_gpu_blocks_override" in options)
    assert found[0] == found[1] == found[2]
    same, again, other = found[0]
    assert same == again != other
    assert len({*same, *other}) == 6
    assert all(follows(prompt, tokens, 7) for tokens in same + other)


def watched(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the engine does with its steps, in order: ("launch" | "supply" | "wait", number)."""
    events, executor = list[tuple[str, int]](), llm._built.executor
    launch = executor.launch

    def launching(plan: Any) -> Any:
        events.append(("launch", plan.step))
        handle = launch(plan)
        supply = handle.supply
        if handle.late:

            def supplying(columns: Any) -> Any:
                events.append(("supply", plan.step))
                return awaited(supply(columns), plan.step)

            monkeypatch.setattr(handle, "supply", supplying)
            return handle
        return awaited(handle, plan.step)

    def awaited(handle: Any, number: int) -> Any:
        wait = handle.wait

        def waiting() -> Any:
            events.append(("wait", number))
            return wait()

        monkeypatch.setattr(handle, "wait", waiting)
        return handle

    monkeypatch.setattr(executor, "launch", launching)
    return events


def test_a_step_is_launched_before_the_one_before_it_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with chain_llm(tmp_path) as llm:
        events = watched(llm, monkeypatch)
        assert tokens_of(llm.generate([[1, 2]], CHAIN.replace(max_tokens=6), use_tqdm=False)) == [chained([1, 2], 6)]
        assert events[:3] == [("launch", 0), ("supply", 0), ("launch", 1)]
        for n in range(1, 6):
            at = events.index(("launch", n))
            assert events[at : at + 3] == [("launch", n), ("wait", n - 1), ("supply", n)]
        events.clear()
        llm.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    assert not [event for event in events if event[0] == "supply"]
    first = events[0][1]
    assert events[:6] == [
        ("launch", first),
        ("launch", first + 1),
        ("wait", first),
        ("launch", first + 2),
        ("wait", first + 1),
        ("launch", first + 3),
    ]


def test_a_chunk_that_draws_nothing_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with chain_llm(tmp_path, max_num_batched_tokens=4) as llm:
        events = watched(llm, monkeypatch)
        prompt = list(range(20))
        assert tokens_of(llm.generate([prompt], CHAIN, use_tqdm=False)) == [chained(prompt)]
    assert [number for what, number in events if what == "supply"] == list(range(4, 4 + COUNT))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("blocks", [1024, 30])
def test_staggered_arrival_and_aborts_in_flight(tmp_path: Path, overlap: bool, blocks: int) -> None:
    asked, aborted, done = prompts(14, shared=5, longest=20), [2, 5, 9], dict[str, RequestOutput]()
    with chain_llm(tmp_path, overlap=overlap, num_gpu_blocks_override=blocks) as llm:
        step = arrived = 0
        while arrived < len(asked) or llm.text_engine.has_unfinished_requests():
            if step % 3 == 0 and arrived < len(asked):
                llm.text_engine.add_request(str(arrived), asked[arrived], CHAIN.replace(max_tokens=24))
                arrived += 1
            for i in aborted:
                if step == 3 * i + 4:
                    llm.engine.abort_request(str(i))
            done |= {output.request_id: output for output in llm.text_engine.step() if output.finished}
            step += 1
        stats = llm.stats()
    for i, prompt in enumerate(asked):
        found = done[str(i)].outputs[0].token_ids
        assert (len(found) < 24) == (i in aborted)
        assert found == chained(prompt, 24)[: len(found)]
    assert (stats.preemptions > 0) == (blocks == 30)
    assert stats.free_blocks == stats.num_blocks


def test_stops_min_tokens_and_log_probs_go_with_it(tmp_path: Path) -> None:
    prompt = [9, 8]
    whole = chained(prompt)
    stop = whole[5]
    assert stop not in whole[:5]
    with chain_llm(tmp_path) as llm:
        ask = CHAIN.replace(stop_token_ids=[stop], logprobs=2, prompt_logprobs=1)
        stopped, plain = llm.generate([prompt, prompt], [ask, ask.replace(chain=0)], use_tqdm=False)
        (later,) = llm.generate([prompt], ask.replace(min_tokens=9, chain=VOCAB), use_tqdm=False)
    assert stopped.outputs[0].token_ids == whole[:6]
    assert stopped.outputs[0].finish_reason == "stop"
    assert later.outputs[0].token_ids[:9].count(stop) == 0
    first = stopped.outputs[0].logprobs, plain.outputs[0].logprobs
    assert first[0] is not None
    assert first[1] is not None
    best = plain.outputs[0].token_ids[0]
    assert first[0][0][best] == first[1][0][best], "log-probs are those of the raw logits"


@pytest.mark.parametrize("known", [1, 5, COUNT - 1])
def test_a_state_gets_the_tokens_that_a_request_begins_with(tmp_path: Path, known: int) -> None:
    prompt = [4, 5, 6]
    whole = chained(prompt)
    begun: Any = {"prompt_token_ids": prompt, "generated_token_ids": whole[:known]}
    with chain_llm(tmp_path) as llm:
        assert tokens_of(llm.generate([begun], CHAIN, use_tqdm=False)) == [whole]


# Forced tokens, and drafts

JUMPS = CHAIN.replace(chain=-5, ahead=9, max_tokens=24)


@RUNS
@pytest.mark.parametrize("name", WAYS)
def test_forced_tokens_come_in_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overlap: bool, together: bool
) -> None:
    options, asked, happened = WAYS[name]
    if together:
        asked_together(monkeypatch)
    with chain_llm(tmp_path, **{"overlap": overlap, **options}) as llm:
        plain = tokens_of(llm.generate(asked, JUMPS.replace(ahead=0), use_tqdm=False))
        steps = llm.stats().steps
        llm.reset_prefix_cache()
        found = tokens_of(llm.generate(asked, JUMPS, use_tqdm=False))
        stats = llm.stats()
    assert found == plain == [chained(prompt, 24, -5) for prompt in asked]
    assert happened(stats) or name == "batch 1", stats
    assert stats.free_blocks == stats.num_blocks
    if name in ("plain", "no overlap", "batch 1"):
        assert stats.steps - steps < (0.8 if name == "batch 1" and not overlap else 1) * steps


@pytest.mark.parametrize("most", [0, 2, 4])
def test_forced_rows_are_no_longer_than_those_of_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A step of longer ones would run eagerly. Too few to be worth it: none."""
    monkeypatch.setattr(build_engine, "_most_forced", lambda plan: most)
    asked, longest = prompts(4, seed=3), list[int]()
    book = Draft.book

    def seen(self: Draft, request: Request, num_new: int, drafts: Sequence[int] = ()) -> None:
        longest.append(len(drafts))
        book(self, request, num_new, drafts)

    monkeypatch.setattr(Draft, "book", seen)
    with chain_llm(tmp_path) as llm:
        assert tokens_of(llm.generate(asked, JUMPS, use_tqdm=False)) == [chained(p, 24, -5) for p in asked]
    assert max(longest) == (4 if most == 4 else 0)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"device": "cpu", "enforce_eager": False}, MAX_DRAFTS),
        ({"device": "cuda", "enforce_eager": True}, MAX_DRAFTS),
        ({"device": "cuda:1", "enforce_eager": False}, 0),
        ({"device": "cuda", "enforce_eager": False, "tokens": 5}, 5),
    ],
)
def test_how_long_forced_rows_may_be(options: dict[str, Any], most: int) -> None:
    tokens = options.pop("tokens", None)
    speculation = None if tokens is None else SimpleNamespace(tokens=tokens)
    plan: Any = SimpleNamespace(options=SimpleNamespace(**options), speculation=speculation)
    assert build_engine._most_forced(plan) == most


@pytest.mark.parametrize("n", [1, 2])
def test_forced_tokens_that_are_not_change_nothing(tmp_path: Path, n: int) -> None:
    """A state that is wrong about them is asked for columns behind its guesses, and these are refused."""
    asked = prompts(4, seed=3)
    params = JUMPS.replace(temperature=1.0, seed=4, n=n)
    found = []
    with chain_llm(tmp_path) as llm:
        for each in (params.replace(ahead=0), params, params.replace(wrong="lies"), params.replace(wrong="lies")):
            outputs = llm.generate(asked, each, use_tqdm=False)
            found.append([[sample.token_ids for sample in output.outputs] for output in outputs])
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize("ahead", [0, 6])
@pytest.mark.parametrize("accuracy", [0.0, 0.7, 1.0])
def test_states_see_no_draft_that_is_refused(tmp_path: Path, accuracy: float, ahead: int) -> None:
    asked = prompts(6, seed=4)
    params = JUMPS.replace(ahead=ahead)
    want = [chained(prompt, 24, -5) for prompt in asked]
    with chain_llm(tmp_path) as llm:
        oracle = with_drafts(llm, asked, want, tokens=4, accuracy=accuracy)
        found = tokens_of(llm.generate(asked, params, use_tqdm=False))
    assert found == want
    assert oracle.drafted > 0
    assert (oracle.accepted > 0) is (accuracy > 0), "forced tokens are no drafter's"


@pytest.mark.parametrize("accuracy", [0.0, 0.5])
def test_what_is_forced_behind_a_refused_draft_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: float
) -> None:
    """A drafter was wrong where the state forces many tokens: the row behind has these, from the right one on."""
    asked, params = prompts(5), JUMPS.replace(chain=-2, ahead=40, max_tokens=60)
    jumped, commit = list[tuple[int, int]](), Scheduler.commit

    def committing(self: Scheduler, step: Any, result: Any) -> Any:
        for (request, _), drafts, count in zip(step.rows, step.plan.drafts, result.counts, strict=False):
            if request.jumps and drafts:
                jumped.append((1 + drafts, count))
        return commit(self, step, result)

    monkeypatch.setattr(Scheduler, "commit", committing)
    want = [chained(prompt, 60, -2) for prompt in asked]
    with chain_llm(tmp_path) as llm:
        oracle = with_drafts(llm, asked, want, tokens=4, accuracy=accuracy)
        assert tokens_of(llm.generate(asked, params, use_tqdm=False)) == want
    assert oracle.accepted < oracle.drafted
    assert len(jumped) > 3
    assert all(most == count for most, count in jumped), jumped


# What goes wrong in a state


WRONG = {
    "start": "start() of logits processor 'chain' raised ValueError: wrong in start",
    "state": "start() of logits processor 'chain' raised TypeError: returned str, not a HostState",
    "feed": "feed() of logits processor 'chain' raised ValueError: wrong in feed",
    "columns": "columns() of logits processor 'chain' raised ValueError: wrong in columns",
    "shape": "column 'mask': array(",
    "more": "is not of shape (1, 4)",
    "flat": "is not of shape (1, 4)",
    "dtype": "does not fit in int32",
    "large": "does not fit in int32",
    "column": "no column 'msak': did you mean 'mask'",
    "mapping": "raised AttributeError",
    "forced": "forced() of logits processor 'chain' raised ValueError: wrong in forced",
    "outside": "forced() of logits processor 'chain' raised ValueError: returned [97, ",
}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("wrong_at", [0, 4])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_goes_wrong_in_a_state_ends_its_request_alone(
    tmp_path: Path, wrong: str, wrong_at: int, overlap: bool
) -> None:
    asked = prompts(3, seed=2)
    bad = CHAIN.replace(wrong=wrong, wrong_at=wrong_at, chain=1, ahead=3)
    with chain_llm(tmp_path, overlap=overlap) as llm:
        one, two, three = llm.generate(asked, [CHAIN, bad, SamplingParams(temperature=0, max_tokens=9)], use_tqdm=False)
        several = llm.generate([asked[1]], bad.replace(n=2, temperature=1.0), use_tqdm=False)[0]
        assert tokens_of(llm.generate(asked, CHAIN, use_tqdm=False)) == [chained(prompt) for prompt in asked]
        assert llm.stats().free_blocks == llm.stats().num_blocks
        assert llm.stats().steps_broken == 0
    assert tokens_of([one, three]) == [chained(asked[0]), greedy(asked[2], 9)]
    for failed in (two, several):
        assert failed.error is not None
        assert failed.error.code == "processor_failed"
        assert WRONG[wrong] in str(failed.error)
        assert str(PLUGIN) in str(failed.error)
        assert failed.outputs == []


def test_a_mask_that_allows_nothing_fails_its_row_alone(tmp_path: Path) -> None:
    with chain_llm(tmp_path) as llm:
        bad = CHAIN.replace(wrong="nothing", wrong_at=3)
        one, two = llm.generate([[1], [1]], [CHAIN, bad], use_tqdm=False)
    assert tokens_of([one]) == [chained([1])]
    assert two.error is not None
    assert two.error.code == "nothing_left"


# Steps that break, and interrupts


class Breaks:
    """Raises at some calls of a function."""

    def __init__(self, original: Callable[..., Any], error: BaseException, at: Sequence[int]) -> None:
        self.original, self.error, self.at, self.calls = original, error, at, 0

    def __get__(self, owner: Any, _: Any = None) -> Callable[..., Any]:
        return lambda *args: self(owner, *args)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls - 1 in self.at:
            raise self.error
        return self.original(*args)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("a kernel blew up")], ids=["memory", "broken"])
@pytest.mark.parametrize("half", ["forward", "sample"])
def test_steps_that_break_are_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str, error: BaseException, overlap: bool
) -> None:
    asked = prompts(4, seed=5)
    with chain_llm(tmp_path, overlap=overlap) as llm:
        monkeypatch.setattr(ModelRunner, half, Breaks(getattr(ModelRunner, half), error, (3, 16)))
        found = tokens_of(llm.generate(asked, CHAIN.replace(max_tokens=24), use_tqdm=False))
        stats = llm.stats()
        check_scheduler(llm.engine.scheduler)
    assert found == [chained(prompt, 24) for prompt in asked]
    assert (stats.steps_withdrawn if isinstance(error, MemoryError) else stats.steps_broken) >= 2
    assert stats.free_blocks == stats.num_blocks


def run(llm: LLM, ended: dict[str, RequestOutput]) -> None:
    while llm.text_engine.has_unfinished_requests():
        ended.update({output.request_id: output for output in llm.text_engine.step()})


@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("place", ["before", "feed", "supply"])
def test_an_interrupt_between_launch_and_supply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, at: int
) -> None:
    """Before the update it costs nothing; in the middle of it, it ends the requests so far and nothing else."""
    where: tuple[Any, str] = {
        "before": (Engine, "_supply_oldest"),
        "feed": (chain_plugin.Chain, "columns"),
        "supply": (InProcessExecutor, "_finish"),
    }[place]
    ended: dict[str, RequestOutput] = {}
    with mock_llm(tmp_path, plugins=[chain_plugin]) as llm:
        monkeypatch.setattr(*where, Breaks(getattr(*where), KeyboardInterrupt(), (at,)))
        llm.text_engine.add_request("a", [1, 2], CHAIN)
        llm.text_engine.add_request("b", [3], SamplingParams(temperature=0, max_tokens=COUNT))
        with pytest.raises(KeyboardInterrupt):
            run(llm, ended)
        run(llm, ended)
        if place == "before":
            assert tokens_of([ended["a"], ended["b"]]) == [chained([1, 2]), greedy([3], COUNT)]
        else:
            assert [ended[name].error and ended[name].error.code for name in "ab"] == ["interrupted"] * 2
        assert tokens_of(llm.generate([[5, 6]], CHAIN, use_tqdm=False)) == [chained([5, 6])]
        check_scheduler(llm.engine.scheduler)
        assert llm.stats().free_blocks == llm.stats().num_blocks


def test_the_cache_can_be_reset_behind_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of a request that has ended waits for columns that no request needs."""
    prompt = [9, 8]
    stop = chained(prompt)[5]
    with mock_llm(tmp_path, plugins=[chain_plugin]) as llm:
        original = Engine._supply_oldest

        def interrupted(self: Engine) -> None:
            if not self._requests.known and self._in_flight and self._in_flight[0].handle.late:
                monkeypatch.setattr(Engine, "_supply_oldest", original)
                raise KeyboardInterrupt
            original(self)

        monkeypatch.setattr(Engine, "_supply_oldest", interrupted)
        llm.text_engine.add_request("a", prompt, CHAIN.replace(stop_token_ids=[stop]))
        with pytest.raises(KeyboardInterrupt):
            run(llm, {})
        assert llm.engine._in_flight
        assert llm.engine._in_flight[0].handle.late
        llm.reset_prefix_cache()
        assert not llm.engine._in_flight


def asked_together(patch: pytest.MonkeyPatch) -> list[int]:
    """Chains are asked together from here on. Returns how many, each time."""
    seen = list[int]()

    def together(states: Sequence[Any], token_ids: Any, out: Any) -> Any:
        seen.append(len(states))
        return chain_plugin.one_by_one(states, token_ids, out)

    patch.setattr(chain_plugin.Chain, "columns_together", together)
    return seen


@pytest.mark.parametrize("wrong", ["feed", "columns", "shape"])
def test_a_state_that_fails_among_others_fails_its_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    asked = prompts(4, seed=3)
    params = [CHAIN, CHAIN.replace(wrong=wrong, wrong_at=4), CHAIN, SamplingParams(temperature=0, max_tokens=COUNT)]
    seen = asked_together(monkeypatch)
    with chain_llm(tmp_path) as llm:
        found = llm.generate(asked, params, use_tqdm=False)
        check_scheduler(llm.engine.scheduler)
    assert max(seen) == 3
    assert found[1].error is not None
    assert found[1].error.code == "processor_failed"
    assert "columns_together() of logits processor" in str(found[1].error)
    assert tokens_of([found[0], found[2], found[3]]) == [chained(asked[0]), chained(asked[2]), greedy(asked[3], COUNT)]


def test_a_class_that_fails_fails_all_its_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of other classes, and rows without, go on."""
    asked = prompts(4, seed=3)
    plain = SamplingParams(temperature=0, max_tokens=COUNT)
    params = [CHAIN, CHAIN, plain.replace(pair=(3, 4), pair_walks=True), plain]
    seen = asked_together(monkeypatch)
    together = chain_plugin.Chain.columns_together

    def failing(*args: Any) -> Any:
        if len(seen) == 4:
            raise ValueError("no threads")
        return together(*args)

    with chain_llm(tmp_path) as llm:
        want = llm.generate(asked, params, use_tqdm=False)
        seen.clear()
        monkeypatch.setattr(chain_plugin.Chain, "columns_together", failing)
        found = llm.generate(asked, params, use_tqdm=False)
        assert seen == [2] * 4
        for output in found[:2]:
            assert output.error is not None
            assert output.error.code == "processor_failed"
            assert "columns_together() of logits processor" in str(output.error)
        assert tokens_of(found[2:]) == tokens_of(want[2:])
        check_scheduler(llm.engine.scheduler)


# Mutants: each must change the tokens


def columns_of_the_draw_before(patch: pytest.MonkeyPatch) -> None:
    feed = BoundState.feed
    patch.setattr(BoundState, "feed", lambda self, output: feed(self, output[:-1]))


def fed_twice(patch: pytest.MonkeyPatch) -> None:
    feed = BoundState.feed

    def broken(self: BoundState, output: Sequence[int]) -> None:
        self.fed = max(0, self.fed - 1)
        feed(self, output)

    patch.setattr(BoundState, "feed", broken)


def rows_of_others(patch: pytest.MonkeyPatch) -> None:
    def together(states: Sequence[Any], token_ids: Any, out: Any) -> Any:
        failed = chain_plugin.one_by_one(states, token_ids, out)
        out["mask"][:] = out["mask"][::-1].copy()
        return failed

    patch.setattr(chain_plugin.Chain, "columns_together", together)


def shared_by_samples(patch: pytest.MonkeyPatch) -> None:
    made, original = dict[tuple[int, ...], Any](), engine.start_states

    def broken(params: Any, prompt_token_ids: Any, ctx: Any) -> Any:
        key = tuple(prompt_token_ids)
        if key not in made:
            made[key] = original(params, prompt_token_ids, ctx)
        return made[key]

    patch.setattr(engine, "start_states", broken)


def supplied_to_another_row(patch: pytest.MonkeyPatch) -> None:
    forward = ModelRunner._supply

    def broken(self: ModelRunner, step: Any, columns: Any) -> Any:
        for column in columns:
            column.draws[:] = column.draws[::-1].copy()
        return forward(self, step, columns)

    patch.setattr(ModelRunner, "_supply", broken)


@pytest.mark.parametrize(
    "mutant", [columns_of_the_draw_before, fed_twice, rows_of_others, shared_by_samples, supplied_to_another_row]
)
def test_mutants_change_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    asked = prompts(3, seed=8)
    params = CHAIN.replace(temperature=1.0, n=2, seed=1)

    def right(llm: LLM) -> bool:
        outputs = llm.generate(asked, params, use_tqdm=False)
        return all(follows(out.prompt_token_ids, sample.token_ids) for out in outputs for sample in out.outputs)

    with chain_llm(tmp_path) as llm:
        assert right(llm)
        mutant(monkeypatch)
        assert not right(llm)


def test_a_step_behind_a_late_one_is_launched_only_when_that_is_supplied(tmp_path: Path) -> None:
    """As the executor sees it: calls in their order on one thread."""
    with chain_llm(tmp_path) as llm:
        executor, order = llm._built.executor, list[str]()
        assert isinstance(executor, InProcessExecutor)
        submit = executor._thread.submit

        def submitting(function: Callable[[], Any]) -> Call:
            order.append("tail" if "_finish" in getattr(function, "__qualname__", "") else "launch")
            return submit(function)

        executor._thread.submit = submitting  # type: ignore[method-assign]
        llm.generate([[1, 2]], CHAIN.replace(max_tokens=5), use_tqdm=False)
    assert order == ["launch", "tail"] * 5
