"""Work before a request can start runs on threads of its own: no step waits, no other request either."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.api import (
    GrammarError,
    LogitsProcessor,
    ParamsContext,
    ParamsError,
    Phase,
    ProcessorParams,
    SamplerSpec,
    hookimpl,
)
from nanoengine.params.preparation import Preparations

from .support import greedy, mock_llm, tokens_of

SECONDS = 30.0  # no test waits so long unless it fails


class Work:
    """What the requests of a test prepare: `open` lets those of a name go on; `began` says which have begun."""

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.began: list[tuple[str, str]] = []  # name, thread

    def gate(self, name: str) -> threading.Event:
        return self.gates.setdefault(name, threading.Event())

    def job(self, name: str) -> Callable[[], None]:
        def run() -> None:
            self.began.append((name, threading.current_thread().name))
            if name.startswith("raises"):
                raise LookupError(name)
            if name.startswith("refuses"):
                raise GrammarError(f"{name} is not supported")
            assert self.gate(name).wait(SECONDS)

        return run


WORK = Work()


@dataclass(frozen=True)
class PreparedParams(ProcessorParams):
    prepared: str | None = None

    def prepare(self, ctx: ParamsContext) -> Callable[[], Any] | None:
        if self.prepared == "cannot":
            raise ParamsError("prepared must not be 'cannot'")
        return None if self.prepared == "at once" else WORK.job(str(self.prepared))


class Nothing(LogitsProcessor):
    phase = Phase.MASK
    argmax_invariant = True

    def apply(self, logits: Any, rows: Any) -> Any:
        return logits


class Plugin:
    @hookimpl
    def register_samplers(self) -> list[SamplerSpec]:
        return [SamplerSpec(name="prepared", params=PreparedParams, target=f"{__name__}:Nothing", api=1)]


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Work()
    monkeypatch.setattr(f"{__name__}.WORK", made)
    yield made
    for gate in made.gates.values():
        gate.set()


def made(tmp_path: Path, **options: Any) -> LLM:
    return mock_llm(tmp_path, plugins=[Plugin()], **options)


def params(name: str | None = None, **fields: Any) -> SamplingParams:
    given = {"temperature": 0, "max_tokens": 6, **fields}
    return SamplingParams(**given) if name is None else SamplingParams(prepared=name, **given)


def add(llm: LLM, name: str, **fields: Any) -> list[RequestOutput]:
    found: list[RequestOutput] = []
    llm.text_engine.add_request(name, [1, 2, 3], params(name, **fields), sink=found.append, final_only=True)
    return found


def until(llm: LLM, holds: Callable[[], Any]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        llm.engine.advance()


@pytest.mark.parametrize("overlap", [True, False])
def test_others_run_while_one_is_prepared(tmp_path: Path, work: Work, overlap: bool) -> None:
    with made(tmp_path, overlap=overlap) as llm:
        slow = add(llm, "slow")
        assert llm.text_engine.has_unfinished_requests()
        assert tokens_of(llm.generate([[1, 2, 3], [5]], params())) == [greedy([1, 2, 3], 6), greedy([5], 6)]
        assert slow == []
        assert llm.stats().preparing == 1
        work.gate("slow").set()
        until(llm, lambda: slow)
        assert tokens_of(slow) == [greedy([1, 2, 3], 6)]
        assert work.began == [("slow", "nanoengine-prepare")]
        assert not llm.text_engine.has_unfinished_requests()
        assert llm.stats().preparing == 0


def test_generate_prepares_many_at_once_and_waits_without_a_step(tmp_path: Path, work: Work) -> None:
    """All of the first four are under way before one is done: nothing serialises them."""
    names = [f"p{i}" for i in range(6)]

    def open_all() -> None:
        end = time.monotonic() + SECONDS
        while len(work.began) < 4 and time.monotonic() < end:
            time.sleep(0.001)
        for name in names:
            work.gate(name).set()

    with made(tmp_path) as llm:
        opener = threading.Thread(target=open_all)
        opener.start()
        outputs = llm.generate([[i + 1] for i in range(6)], [params(name) for name in names])
        opener.join()
        assert tokens_of(outputs) == [greedy([i + 1], 6) for i in range(6)]
        assert sorted(name for name, _ in work.began) == names


def test_what_needs_no_work_starts_at_once(tmp_path: Path, work: Work) -> None:
    with made(tmp_path) as llm:
        assert tokens_of(llm.generate([1, 2, 3], params("at once"))) == [greedy([1, 2, 3], 6)]
        assert work.began == []


def test_a_failure_is_the_error_of_that_request_alone(tmp_path: Path) -> None:
    with made(tmp_path) as llm:
        raised, refused, fine = llm.generate([[1], [2], [5]], [params("raises x"), params("refuses y"), params()])
        assert raised.error is not None
        assert raised.error.code == "prepare_failed"
        assert "LookupError: raises x" in str(raised.error)
        assert isinstance(raised.error.__cause__, LookupError)
        assert isinstance(refused.error, GrammarError)
        assert (refused.error.code, str(refused.error)) == ("invalid_grammar", "refuses y is not supported")
        assert tokens_of([fine]) == [greedy([5], 6)]
        with pytest.raises(ParamsError, match="must not be 'cannot'"):
            llm.generate([[1]], params("cannot"))
        assert not llm.text_engine.has_unfinished_requests()


@pytest.mark.parametrize("n", [1, 3])
def test_abort_while_it_is_prepared(tmp_path: Path, work: Work, n: int) -> None:
    with made(tmp_path) as llm:
        slow = add(llm, "slow", n=n)
        llm.engine.abort_request("slow")
        until(llm, lambda: slow)
        assert [each.finish_reason for each in slow[0].outputs] == ["abort"] * n
        assert not llm.text_engine.has_unfinished_requests()
        again = add(llm, "slow")  # the id is free, though the first one's work still runs
        work.gate("slow").set()
        until(llm, lambda: again)
        assert tokens_of(again) == [greedy([1, 2, 3], 6)]
        assert len(slow) == 1
        assert (llm.stats().running, llm.stats().waiting) == (0, 0)


def test_close_while_one_is_prepared(tmp_path: Path, work: Work) -> None:
    llm = made(tmp_path)
    slow = add(llm, "slow")
    threading.Timer(0.05, work.gate("slow").set).start()
    llm.close()
    assert slow == []
    assert [each for each in threading.enumerate() if each.name == "nanoengine-prepare"] == []


def test_what_takes_too_long_is_given_up_and_its_thread_replaced(tmp_path: Path, work: Work) -> None:
    with made(tmp_path, structured_outputs={"workers": 1}) as llm:
        llm._built.preparations._seconds = 0.05
        stuck = add(llm, "stuck")
        until(llm, lambda: stuck)
        assert stuck[0].error is not None
        assert stuck[0].error.code == "prepare_timeout"
        assert "structured_outputs.timeout" in str(stuck[0].error)
        llm._built.preparations._seconds = SECONDS
        work.gate("next").set()
        following = add(llm, "next")  # the only thread is still stuck
        until(llm, lambda: following)
        assert tokens_of(following) == [greedy([1, 2, 3], 6)]
        work.gate("stuck").set()


def test_a_step_that_starts_over_ends_what_is_prepared(tmp_path: Path, work: Work) -> None:
    with made(tmp_path) as llm:
        slow = add(llm, "slow")
        llm.engine._mid_update = True  # as after Ctrl-C in the middle of an update
        until(llm, lambda: slow)
        assert slow[0].error is not None
        assert slow[0].error.code == "interrupted"
        work.gate("slow").set()
        assert tokens_of(llm.generate([5], params())) == [greedy([5], 6)]
        assert len(slow) == 1


def test_tasks_beyond_the_threads_wait_their_turn() -> None:
    """A bound of two threads: never more at once, and all tasks end."""
    made = Preparations(2, SECONDS)
    lock, running, most, done = threading.Lock(), [0], [0], threading.Semaphore(0)

    def job() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.001)
        with lock:
            running[0] -= 1

    for _ in range(40):
        made.submit([job, job], lambda error: done.release())
    assert all(done.acquire(timeout=SECONDS) for _ in range(40))
    assert most[0] <= 2
    made.close()
    assert made.tasks == set()


def test_a_cancelled_task_that_waits_is_never_begun() -> None:
    made, gate, began = Preparations(1, SECONDS), threading.Event(), []
    first = made.submit([lambda: gate.wait(SECONDS)], lambda error: began.append("first done"))
    made.submit([lambda: began.append("cancelled")], lambda error: began.append("reported")).cancel()
    made.submit([lambda: began.append("last")], lambda error: gate.set())
    first.cancel()
    gate.set()
    end = time.monotonic() + SECONDS
    while made.tasks and time.monotonic() < end:
        time.sleep(0.001)
    assert began == ["last"]
    made.close()


def test_a_thread_that_cannot_be_started_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    made, done, refused = Preparations(1, SECONDS), threading.Event(), list[str]()
    start = threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if not refused:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    with pytest.raises(RuntimeError, match="new thread"):
        made.submit([lambda: None], lambda error: None)
    made.submit([lambda: None], lambda error: done.set())
    assert done.wait(SECONDS)
    made.close()
    assert refused == ["nanoengine-prepare"]
