"""The thread that makes a CPU's calls: in order, with what they raise, and no lock that an interrupt may keep."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from nanoengine import EngineClosed
from nanoengine.core.execution.executor import StepThread


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
    assert call._gate.acquire(timeout=5)  # and then Ctrl-C, before the outcome was looked at
    assert call.wait() == 7


def test_closing_waits_for_what_runs_and_drops_the_rest() -> None:
    thread, begun, done = StepThread("test-step"), threading.Event(), list[str]()
    first = thread.submit(lambda: (begun.set(), time.sleep(0.1), done.append("first")))
    second = thread.submit(lambda: done.append("second"))
    assert begun.wait(5)
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
import time
from nanoengine.core.execution.executor import StepThread
thread = StepThread("test-step")
thread.submit(lambda: (time.sleep(0.2), print("whole", flush=True)))
never = thread.submit(lambda: print("never"))
time.sleep(0.05)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("whole\n", "")
