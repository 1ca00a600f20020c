"""A bad request harms no other request, whatever it makes the model or a logits processor do."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from nanoengine import EngineClosed, SamplingParams
from nanoengine.api.errors import PluginError, draw_failure
from nanoengine.core import engine
from nanoengine.core.execution.executor import Call
from nanoengine.core.execution.results import NotLaunched
from nanoengine.core.outputs import RequestState
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.testing.invariants import check_scheduler
from nanoengine.testing.mock_model import MockModel

from .support import greedy, mock_llm, prompts, tokens_of

POISON = 96
GREEDY = SamplingParams(temperature=0, max_tokens=10)


def clean(count: int) -> list[list[int]]:
    """Prompts whose greedy continuation never holds the poisonous token."""
    found = []
    for prompt in prompts(400, seed=3, longest=14):
        whole = [*prompt, *greedy(prompt, 12)]
        if POISON not in whole:
            found.append(prompt)
        if len(found) == count:
            return found
    raise AssertionError("too few clean prompts")


def poisoned_forward(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    original = MockModel.forward

    def forward(self: MockModel, input_ids: Any, positions: Any, batch: Any) -> Any:
        calls.append(len(input_ids))
        if (input_ids == POISON).any():
            raise RuntimeError("a kernel blew up")
        return original(self, input_ids, positions, batch)

    monkeypatch.setattr(MockModel, "forward", forward)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_request_that_breaks_the_forward_pass_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, overlap: bool
) -> None:
    asked = clean(7)
    asked.insert(3, [1, POISON, 2])
    calls: list[int] = []
    poisoned_forward(monkeypatch, calls)
    with mock_llm(tmp_path, overlap=overlap) as llm:
        outputs = llm.generate(asked, GREEDY, use_tqdm=False)
        broken = outputs.pop(3)
        assert tokens_of(outputs) == [greedy(p, 10) for i, p in enumerate(asked) if i != 3]
        assert broken.outputs == []
        assert broken.error is not None
        assert broken.error.code == "step_failed"
        assert "a kernel blew up" in str(broken.error)
        assert isinstance(broken.error.__cause__, RuntimeError)
        stats = llm.stats()
        assert stats.free_blocks == stats.num_blocks
        assert "1 of 8 prompts failed; prompt 3: step_failed: " in caplog.messages[-1]
        assert tokens_of(llm.generate(asked[:3], GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in asked[:3]]
        assert llm.stats().steps_broken == stats.steps_broken == 1
    assert max(calls) > 1
    assert sum("prompts failed" in message for message in caplog.messages) == 1


def test_what_broke_a_step_is_said_where_no_request_breaks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = MockModel.compute_logits

    def compute_logits(self: MockModel, hidden: Any) -> Any:
        if len(hidden) > 1:
            raise RuntimeError("a kernel for one row")
        return original(self, hidden)

    monkeypatch.setattr(MockModel, "compute_logits", compute_logits)
    with mock_llm(tmp_path) as llm:
        found = llm.generate(clean(3), GREEDY, use_tqdm=False)
        assert llm.stats().steps_broken > 3
    assert tokens_of(found) == [greedy(prompt, 10) for prompt in clean(3)]
    assert [record.message for record in caplog.records if "one by one" in record.message] == [
        "a step raised RuntimeError: a kernel for one row; its requests run again one by one"
    ]


@pytest.mark.parametrize("overlap", [True, False])
def test_bad_logits_fail_their_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    original = MockModel.compute_logits
    bad_history = [4, 4, 4]
    from nanoengine.testing.mock_model import reference_logits

    target = reference_logits(bad_history, 97)

    def compute_logits(self: MockModel, hidden: Any) -> Any:
        logits = original(self, hidden)
        logits[(logits == target).all(1)] = float("nan")
        return logits

    monkeypatch.setattr(MockModel, "compute_logits", compute_logits)
    with mock_llm(tmp_path, overlap=overlap) as llm:
        one, two, three = llm.generate([[1, 2], bad_history, [5]], GREEDY, use_tqdm=False)
    assert tokens_of([one, three]) == [greedy([1, 2], 10), greedy([5], 10)]
    assert two.error is not None
    assert two.error.code == "bad_logits"


def test_processors_that_leave_nothing_fail_their_row_alone(tmp_path: Path) -> None:
    nothing = SamplingParams(
        temperature=0, allowed_token_ids=[3], logit_bias={3: float("-inf")}, min_tokens=2, max_tokens=5
    )
    with mock_llm(tmp_path) as llm:
        one, two = llm.generate([[1, 2], [1, 2]], [GREEDY, nothing], use_tqdm=False)
    assert tokens_of([one]) == [greedy([1, 2], 10)]
    assert two.error is not None
    assert two.error.code == "nothing_left"
    assert "has: allowed_token_ids, logit_bias, min_tokens" in str(two.error)
    assert "a logits processor of another one changed a row" in str(draw_failure((), finite=True))


def test_one_bad_sample_of_several_fails_its_request_and_frees_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned_forward(monkeypatch, [])
    params = SamplingParams(n=3, temperature=0, logit_bias={POISON: 100.0}, max_tokens=6)
    with mock_llm(tmp_path) as llm:
        one, two = llm.generate([[1, 2], clean(1)[0]], [params, GREEDY], use_tqdm=False)
        assert llm.stats().free_blocks == llm.stats().num_blocks
    assert one.error is not None
    assert one.outputs == []
    assert tokens_of([two]) == [greedy(clean(1)[0], 10)]


def test_a_processor_that_raises_fails_only_who_asked_for_it(tmp_path: Path) -> None:
    plugin = Path(__file__).parent / "processors_plugin.py"
    with mock_llm(tmp_path, plugins=[plugin]) as llm:
        asked = [GREEDY, SamplingParams(temperature=0, max_tokens=10, explode=True), GREEDY]
        one, two, three = llm.generate([[1], [2], [3]], asked, use_tqdm=False)
    assert tokens_of([one, three]) == [greedy([1], 10), greedy([3], 10)]
    assert two.error is not None
    assert "explode processor" in str(two.error)


def test_a_processor_with_a_host_state_sees_every_token(tmp_path: Path) -> None:
    """A Python processor that forbids the last two tokens: it needs token N before N + 1 is drawn."""
    plugin = Path(__file__).parent / "processors_plugin.py"
    params = SamplingParams(temperature=0, max_tokens=12, forbid_last=2)
    asked = prompts(4, longest=9)
    with mock_llm(tmp_path, plugins=[plugin]) as llm:
        outputs = llm.generate([*asked, [7, 7]], [params] * 4 + [GREEDY], use_tqdm=False)
    from nanoengine.testing.mock_model import reference_logits

    for prompt, output in zip(asked, outputs[:4], strict=True):
        tokens = list(prompt)
        for token in output.outputs[0].token_ids:
            logits = reference_logits(tokens, 97)
            logits[torch.tensor(tokens[-2:])] = float("-inf")
            assert token == int(logits.argmax())
            tokens.append(token)
        assert len(output.outputs[0].token_ids) == 12
    assert outputs[4].outputs[0].token_ids == greedy([7, 7], 10)


def test_a_host_processor_that_raises_fails_its_request_alone(tmp_path: Path) -> None:
    plugin = Path(__file__).parent / "processors_plugin.py"
    params = SamplingParams(temperature=0, max_tokens=12, forbid_last=-1)
    with mock_llm(tmp_path, plugins=[plugin]) as llm:
        one, two = llm.generate([[1], [2]], [GREEDY, params], use_tqdm=False)
        assert llm.stats().free_blocks == llm.stats().num_blocks
    assert tokens_of([one]) == [greedy([1], 10)]
    assert two.error is not None
    assert two.error.code == "processor_failed"
    assert "cannot forbid -1" in str(two.error)


def test_a_host_processor_that_raises_for_one_of_several_samples_fails_their_request(tmp_path: Path) -> None:
    plugin = Path(__file__).parent / "processors_plugin.py"
    prompt = [2, 3, 4, 5, 6]
    params = SamplingParams(n=3, temperature=1.5, max_tokens=12, seed=1, forbid_last=1, explode_at=7)
    with mock_llm(tmp_path, plugins=[plugin]) as llm:
        one, two = llm.generate([[1], prompt], [GREEDY, params], use_tqdm=False)
        assert llm.stats().free_blocks == llm.stats().num_blocks
    assert tokens_of([one]) == [greedy([1], 10)]
    assert two.error is not None
    assert two.error.code == "processor_failed"


def test_an_interrupt_leaves_the_engine_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mock_llm(tmp_path) as llm:
        advance, count = llm.engine.advance, 0

        def interrupted() -> None:
            nonlocal count
            count += 1
            if count == 4:
                raise KeyboardInterrupt
            advance()

        monkeypatch.setattr(llm.engine, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts(4), GREEDY, use_tqdm=False)
        assert tokens_of(llm.generate([[5, 6]], GREEDY, use_tqdm=False)) == [greedy([5, 6], 10)]
        assert not llm.text_engine.has_unfinished_requests()
        assert llm.stats().free_blocks == llm.stats().num_blocks


def once(original: Any, error: BaseException) -> Any:
    """Raises once, before it is called."""
    raised: list[int] = []

    def raising(*args: Any) -> Any:
        if not raised:
            raised.append(1)
            raise error
        return original(*args)

    return raising


@pytest.mark.parametrize("place", ["wait_out", "fail", "launch"])
def test_an_interrupt_while_a_broken_step_is_dealt_with_leaves_the_engine_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    poisoned_forward(monkeypatch, [])
    interrupt, behind = KeyboardInterrupt(), list[Any]()
    with mock_llm(tmp_path) as llm:
        if place == "wait_out":
            monkeypatch.setattr(engine, "wait_out", once(engine.wait_out, interrupt))
        elif place == "fail":
            monkeypatch.setattr(Scheduler, "fail", once(Scheduler.fail, interrupt))
        else:  # the launch raises, and the interrupt comes while the step before it is waited for
            executor = llm._built.executor
            launch, interrupted = executor.launch, once(Call.wait, interrupt)

            def launching(plan: Any) -> Any:
                behind.extend(each for each in llm.engine._in_flight if isinstance(each.handle, NotLaunched))
                if (plan.new.token_ids == POISON).any():
                    monkeypatch.setattr(Call, "wait", lambda handle: interrupted(handle))
                    raise RuntimeError("no launch")
                return launch(plan)

            monkeypatch.setattr(executor, "launch", launching)
        llm.text_engine.add_request("a", [1, 2], GREEDY)
        llm.text_engine.step()
        llm.text_engine.add_request("bad", [1, POISON], GREEDY)
        ended: dict[str, Any] = {}

        def run() -> None:
            while llm.text_engine.has_unfinished_requests():
                ended.update({out.request_id: out for out in llm.text_engine.step()})

        with pytest.raises(KeyboardInterrupt):
            run()
        run()
        assert ended["bad"].error is not None
        assert not behind, "a step was launched behind one that was not"
        if place == "fail":  # in the middle of an update
            assert ended["a"].error.code == "interrupted"
        else:
            assert tokens_of([ended["a"]]) == [greedy([1, 2], 10)]
        assert tokens_of(llm.generate([[5, 6]], GREEDY, use_tqdm=False)) == [greedy([5, 6], 10)]
        check_scheduler(llm.engine.scheduler)
        assert llm.stats().free_blocks == llm.stats().num_blocks


def test_a_second_interrupt_while_starting_over_loses_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mock_llm(tmp_path) as llm:
        for name in "abc":
            llm.text_engine.add_request(name, [1, 2], GREEDY)
        monkeypatch.setattr(Scheduler, "commit", once(Scheduler.commit, KeyboardInterrupt()))
        monkeypatch.setattr(RequestState, "last_deltas", once(RequestState.last_deltas, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            llm.text_engine.step()
        outputs = llm.text_engine.step()
        assert [out.error and out.error.code for out in outputs] == ["interrupted"] * 3
        assert not llm.text_engine.has_unfinished_requests()
        assert tokens_of(llm.generate([[5, 6]], GREEDY, use_tqdm=False)) == [greedy([5, 6], 10)]


def test_outputs_that_an_interrupt_left_undelivered_count_as_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a loop over `has_unfinished_requests` goes on until each sink has had its last output."""
    with mock_llm(tmp_path) as llm:
        ended: list[str] = []
        llm.text_engine.add_request("a", [1, 2], GREEDY, sink=lambda output: ended.append(output.error.code))
        monkeypatch.setattr(Scheduler, "commit", once(Scheduler.commit, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            llm.engine.advance()
        while llm.text_engine.has_unfinished_requests():
            llm.engine.advance()
        assert ended == ["interrupted"]


BAD = """
from dataclasses import dataclass
from nanoengine.api import ColumnSpec, Phase, SamplerSpec, LogitsProcessor, ProcessorParams, hookimpl


@dataclass(frozen=True)
class Params(ProcessorParams):
    columns = {"bad": ColumnSpec(dtype="bool", default=False)}
    bad: bool = False


class Bad(LogitsProcessor):
    phase = Phase.MASK

    def __init__(self, ctx):
        INIT

    def apply(self, logits, rows):
        raise SystemExit(0)


@hookimpl
def register_samplers():
    return [SamplerSpec(name="bad", params=Params, target=f"{__name__}:Bad", api=1)]
"""


def test_a_processor_that_exits_fails_only_who_asked_for_it_and_is_named(tmp_path: Path) -> None:
    plugin = tmp_path / "bad.py"
    plugin.write_text(BAD.replace("INIT", "pass"))
    with mock_llm(tmp_path, plugins=[plugin]) as llm:
        one, two = llm.generate([[1], [2]], [GREEDY, SamplingParams(bad=True)], use_tqdm=False)
    assert tokens_of([one]) == [greedy([1], 10)]
    assert two.error is not None
    assert f"logits processor 'bad' (Bad of plugin file {plugin}) called sys.exit(0)" in str(two.error)


@pytest.mark.parametrize("init", ["raise ValueError('no table')", "raise SystemExit('no table')"])
def test_a_processor_that_cannot_be_made_is_named_to_who_asks_for_it(tmp_path: Path, init: str) -> None:
    plugin = tmp_path / "bad.py"
    plugin.write_text(BAD.replace("INIT", init))
    with mock_llm(tmp_path, plugins=[plugin]) as llm:
        assert tokens_of(llm.generate([[1]], GREEDY, use_tqdm=False)) == [greedy([1], 10)]
        with pytest.raises(PluginError) as caught:
            llm.generate([[1], [2]], [GREEDY, SamplingParams(bad=True)], use_tqdm=False)
    assert f"logits processor 'bad' (Bad of plugin file {plugin}) failed in __init__: " in str(caught.value)
    assert "no table" in str(caught.value)


@pytest.mark.parametrize("where", ["schedule", "commit", "add"])
def test_an_interrupt_in_the_middle_of_an_update_costs_what_runs_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original, count = getattr(Scheduler, where), 0

    def interrupted(self: Scheduler, *args: Any) -> Any:
        nonlocal count
        count += 1
        found = original(self, *args)
        if count == 5:
            raise KeyboardInterrupt
        return found

    with mock_llm(tmp_path) as llm:
        llm.text_engine.add_request("beside", [1, 2, 3], SamplingParams(temperature=0, max_tokens=50))
        monkeypatch.setattr(Scheduler, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts(4), GREEDY, use_tqdm=False)
        assert count >= 5
        *_, beside = llm.text_engine.step()
        assert beside.request_id == "beside"
        assert beside.error is not None
        assert beside.error.code == "interrupted"
        assert tokens_of(llm.generate([[5, 6]], GREEDY, use_tqdm=False)) == [greedy([5, 6], 10)]
        assert not llm.text_engine.has_unfinished_requests()
        assert llm.stats().free_blocks == llm.stats().num_blocks
        assert llm.stats().running == llm.stats().waiting == 0


def test_an_interrupt_while_the_prefix_cache_is_reset_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Scheduler, *args: Any) -> Any:
        monkeypatch.undo()
        raise KeyboardInterrupt

    with mock_llm(tmp_path) as llm:
        with llm.stream([1, 2, 3], GREEDY) as stream:
            next(stream)  # the engine runs ahead: a row of an ended request is left
        monkeypatch.setattr(Scheduler, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.reset_prefix_cache()
        assert tokens_of(llm.generate([[5, 6]], GREEDY, use_tqdm=False)) == [greedy([5, 6], 10)]
        llm.reset_prefix_cache()


def test_who_enters_while_the_engine_starts_over_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Scheduler, *args: Any) -> Any:
        monkeypatch.undo()
        raise KeyboardInterrupt

    late: list[Any] = []
    with mock_llm(tmp_path) as llm:
        engine, text_engine = llm.engine, llm.text_engine
        engine.add_request("early", [1, 2, 3], GREEDY, sink=lambda _: None)
        make = engine._make_scheduler

        def make_scheduler() -> Scheduler:  # in the middle of starting over
            adding = Thread(target=text_engine.add_request, args=("late", [5, 6], GREEDY), kwargs={"sink": late.append})
            adding.start()
            adding.join()
            return make()

        engine._make_scheduler = make_scheduler
        monkeypatch.setattr(Scheduler, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.advance()
        while engine.has_unfinished_requests():
            engine.advance()
        assert tokens_of(late[-1:]) == [greedy([5, 6], 10)]
        assert llm.stats().running == llm.stats().waiting == 0


def test_an_interrupted_close_is_finished_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = mock_llm(tmp_path)
    executor = llm._built.executor
    monkeypatch.setattr(type(executor), "shutdown", once(type(executor).shutdown, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        llm.close()
    with pytest.raises(EngineClosed):
        llm.generate([[1, 2]], GREEDY, use_tqdm=False)
    assert executor.runner is not None
    llm.close()
    assert executor.runner is None


def test_who_enters_while_the_engine_is_closed_does_not_keep_it_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mock_llm(tmp_path) as llm:
        engine, abort = llm.engine, Scheduler.abort
        for name in "ab":
            engine.add_request(name, [1, 2, 3], GREEDY)
        engine.step()

        def entering(self: Scheduler, request: Any) -> None:
            monkeypatch.setattr(engine, "check_open", lambda: None)  # it asked before
            engine.add_request(f"beside {request.id}", [1], GREEDY)
            monkeypatch.undo()
            abort(self, request)

        monkeypatch.setattr(Scheduler, "abort", entering)
        llm.close()
        with pytest.raises(EngineClosed):
            _ = llm.model


def test_a_sink_that_raises_ends_its_own_request_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    called: list[Any] = []

    def bad(output: Any) -> None:
        called.append(output)
        raise ValueError("a client's own mistake")

    with mock_llm(tmp_path) as llm:
        llm.text_engine.add_request("bad", [1, 2], GREEDY, sink=bad)
        llm.text_engine.add_request("good", [1, 2], GREEDY, final_only=True)
        assert tokens_of(llm.generate([[3, 4]], GREEDY, use_tqdm=False)) == [greedy([3, 4], 10)]
        found: list[Any] = []
        while llm.text_engine.has_unfinished_requests():
            found += llm.text_engine.step()
        assert [o.outputs[0].token_ids for o in found] == [greedy([1, 2], 10)]
        assert llm.stats().running == llm.stats().waiting == 0
    assert len(called) == 1
    (message,) = caplog.messages
    assert message == "the sink of request 'bad' raised ValueError: a client's own mistake; the request is aborted"


def test_clients_do_not_take_each_others_outputs(tmp_path: Path) -> None:
    with mock_llm(tmp_path) as llm:
        llm.text_engine.add_request("a", [1, 2], GREEDY, final_only=True)
        assert tokens_of(llm.generate([[3, 4]], GREEDY, use_tqdm=False)) == [greedy([3, 4], 10)]
        with llm.stream([5, 6], GREEDY) as stream:
            assert list(stream)[-1].outputs[0].token_ids == greedy([5, 6], 10)
        found: list[Any] = []
        while llm.text_engine.has_unfinished_requests():
            found += llm.text_engine.step()
        assert [o.outputs[0].token_ids for o in found] == [greedy([1, 2], 10)]


def test_an_old_abort_does_not_end_a_new_request_of_the_same_id(tmp_path: Path) -> None:
    with mock_llm(tmp_path) as llm:
        llm.text_engine.add_request("x", [1], SamplingParams(temperature=0, max_tokens=1))
        outputs: list[Any] = []
        real = llm.engine._drain_inbox

        def late() -> None:  # the abort arrives, the request ends, and its id is used again, before the inbox is read
            return None

        llm.engine._drain_inbox = late  # type: ignore[method-assign]
        real()
        while not outputs:
            llm.engine.abort_request("x")
            outputs = [o for o in llm.text_engine.step() if o.finished]
        llm.text_engine.add_request("x", [1, 2], GREEDY)
        llm.engine._drain_inbox = real  # type: ignore[method-assign]
        while not (last := llm.text_engine.step()) or not last[-1].finished:
            pass
        assert last[-1].outputs[0].token_ids == greedy([1, 2], 10)
        assert not llm.text_engine.has_unfinished_requests()
        assert llm.stats().running == 0
