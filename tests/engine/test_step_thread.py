"""The thread that makes a CPU's calls: in order, with what they raise, and no lock that an interrupt may keep."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoengine import EngineClosed
from nanoengine.core.execution.executor import Call, InProcessExecutor, StepThread
from nanoengine.core.step import StepPlan

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def thread() -> Iterator[StepThread]:
    made = StepThread("test-step")
    yield made
    made.close()


def running() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name == "test-step"]


def test_calls_are_made_in_order_in_one_thread(thread: StepThread) -> None:
    calls = [thread.submit(lambda i=i: (i, threading.current_thread().name)) for i in range(50)]
    assert [call.wait() for call in calls] == [(i, "test-step") for i in range(50)]
    assert calls[3].wait()[0] == 3  # and again


def test_what_a_call_raises_is_raised_and_not_kept(thread: StepThread) -> None:
    class Large:
        pass

    large: list[Large] = [Large()]
    gone = weakref.ref(large[0])

    def broken(held: Large) -> None:
        raise ValueError(f"with {type(held).__name__}")

    calls = [thread.submit(lambda: broken(large.pop()))]

    def asked() -> str:
        try:
            return str(calls[0].wait())
        except ValueError as error:
            return f"raised: {error}"

    assert [asked(), asked()] == ["raised: with Large"] * 2
    assert thread.submit(lambda: 5).wait() == 5
    gc.disable()
    try:
        calls.clear()
        assert gone() is None, "the error, its traceback and the waiting frame hold each other"
    finally:
        gc.enable()


def test_an_interrupted_wait_that_took_the_gate_is_made_up_for(thread: StepThread) -> None:
    call = thread.submit(lambda: time.sleep(0.05) or 7)
    assert call._gate.acquire(timeout=60)  # and then Ctrl-C, before the outcome was looked at
    assert call.wait() == 7


def test_closing_waits_for_what_runs_and_drops_the_rest() -> None:
    thread, begun, dropped, done = StepThread("test-step"), threading.Event(), threading.Event(), list[str]()
    first = thread.submit(lambda: (begun.set(), dropped.wait(60), done.append("first")))
    second = thread.submit(lambda: done.append("second"))
    drop = second.drop
    second.drop = lambda: (drop(), dropped.set())  # type: ignore[method-assign]
    assert begun.wait(60)
    thread.close()
    thread.close()
    assert done == ["first"]
    first.wait()
    with pytest.raises(EngineClosed, match="before this was run"):
        second.wait()
    assert not running()


def test_it_ends_when_nobody_has_it_any_more() -> None:
    thread = StepThread("test-step")
    thread.submit(lambda: None).wait()
    assert running()
    del thread
    assert not running()


def test_a_program_that_closes_nothing_ends() -> None:
    code = """
import threading
from nanoengine.core.execution.executor import StepThread
thread, begun, dropped = StepThread("test-step"), threading.Event(), threading.Event()
thread.submit(lambda: (begun.set(), dropped.wait(), print("whole", flush=True)))
never = thread.submit(lambda: print("never"))
drop = never.drop
never.drop = lambda: (drop(), dropped.set())
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("whole\n", "")


class Steps:
    """A runner on a CPU whose step of that number raises, once the test lets it."""

    def __init__(self, raises: int) -> None:
        self.device, self.raises, self.ran, self.go = torch.device("cpu"), raises, list[int](), threading.Event()
        self.executor = InProcessExecutor()
        self.executor.start(lambda: (self, None))  # type: ignore[arg-type, return-value]

    def launch(self, plan: StepPlan) -> Any:
        if plan.step == self.raises:
            assert self.go.wait(60)
            raise ValueError(f"step {plan.step}")
        self.ran.append(plan.step)
        return SimpleNamespace(wait=lambda: plan.step)

    def release(self) -> None:
        pass


@pytest.fixture
def steps() -> Iterator[Steps]:
    made = Steps(raises=1)
    yield made
    made.executor.shutdown()


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_step_runs_behind_one_that_raised(steps: Steps, monkeypatch: pytest.MonkeyPatch, interrupted: bool) -> None:
    """Nor where Ctrl-C ended the wait for that one before it raised."""
    assert steps.executor.launch(StepPlan(step=0)).wait() == 0
    first = steps.executor.launch(StepPlan(step=1))
    if interrupted:
        assert isinstance(first, Call)

        def interrupt(*args: Any, **options: Any) -> bool:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(first, "_gate", SimpleNamespace(acquire=interrupt, release=first._gate.release))
            with pytest.raises(KeyboardInterrupt):
                first.wait()
    behind = steps.executor.launch(StepPlan(step=2))
    steps.go.set()
    with pytest.raises(RuntimeError, match="the step before it raised"):
        behind.wait()
    with pytest.raises(ValueError, match="step 1"):
        first.wait()
    assert steps.executor.launch(StepPlan(step=3)).wait() == 3
    assert steps.ran == [0, 3]


def test_the_first_step_of_a_fresh_scheduler_runs_behind_one_that_raised(steps: Steps) -> None:
    """After an interrupt in the middle of an update no result of earlier steps is waited for."""
    steps.executor.launch(StepPlan(step=1))
    first = steps.executor.launch(StepPlan(step=0))
    steps.go.set()
    assert first.wait() == 0
