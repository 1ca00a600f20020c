"""Where the runner lives. One device: in this process, where one worker thread takes the place of a CPU's stream."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from nanoengine.api.errors import EngineClosed, is_failure
from nanoengine.api.plugin_calls import no_interrupt
from nanoengine.core.execution.results import LateStep, StepHandle
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.core.step import StepPlan, StepResult, SuppliedColumn

T = TypeVar("T")


class Executor(ABC):
    """Runs step plans, in the order they were launched. thread: that makes the steps, if it is in this process."""

    thread: threading.Thread | None = None

    @abstractmethod
    def launch(self, plan: StepPlan) -> StepHandle:
        """Hand over a step; returns before it has run. Legal while one step is in flight, which must not be late."""

    @abstractmethod
    def call(self, target: str, *args: Any) -> list[Any]:
        """Call "package.module:function" with each rank's runner, behind the launched steps; one answer a rank."""

    @abstractmethod
    def shutdown(self) -> None:
        """Wait for what runs, then give all memory back. Idempotent."""


class InProcessExecutor(Executor):
    """One device. A GPU has a stream of its own: launching is enqueuing. On a CPU steps run in order on one worker
    thread, while the host prepares the next one."""

    def __init__(self) -> None:
        self._thread = StepThread("nanoengine-step")
        self.thread = self._thread.thread
        self._newest: Call | None = None  # the step launched last
        self.runner: ModelRunner | None = None

    def start(self, make: Callable[[], tuple[ModelRunner, T]]) -> T:
        """Make the runner, on the worker thread; returns what `make` gives with it."""
        made: tuple[ModelRunner, T] = self._thread.submit(make).wait()
        self.runner, report = made
        return report

    def launch(self, plan: StepPlan) -> StepHandle:
        runner = self.runner
        assert runner is not None
        if runner.device.type != "cpu":
            return runner.launch(plan)
        before = self._newest
        if before is None or before.awaited or not plan.step:  # step 0 is a fresh scheduler's, which has dropped others
            before = None

        def run() -> StepHandle | StepResult:
            if before is not None and before.failed:
                raise RuntimeError("not run, as the step before it raised")  # its slots may be an earlier request's
            handle = runner.launch(plan)
            return handle if plan.late else handle.wait()

        self._newest = self._thread.submit(run)
        return LateStep(partial(self._finish, self._newest)) if plan.late else self._newest

    def _finish(self, forward: Call, columns: Sequence[SuppliedColumn]) -> StepHandle:
        def run() -> StepResult:
            handle: StepHandle = forward.wait()  # it has run
            return handle.supply(columns).wait()

        self._newest = self._thread.submit(run)
        return self._newest

    def call(self, target: str, *args: Any) -> list[Any]:
        return [self._thread.submit(partial(self.running().call, target, *args)).wait()]

    def running(self) -> ModelRunner:
        """The runner. Raises `EngineClosed` before the start and after the shutdown."""
        if self.runner is None:
            raise EngineClosed
        return self.runner

    def shutdown(self) -> None:
        self._thread.close()
        if self.runner is not None:
            self.runner.release()
            self.runner = None


_LOOK_SECONDS = 0.1  # an interrupted wait may have taken the gate with it


class Call(StepHandle):
    """A call that a `StepThread` makes. awaited: `wait` has given its outcome. failed: it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.awaited = self.failed = False
        self._function: Callable[[], Any] | None = function
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def wait(self) -> Any:
        """What it returned, once it has; raises what it raised, or `EngineClosed` if it was dropped.

        An interrupt is raised on the thread that it is for: what looks like one on another thread is a `PluginError`.
        """
        while self._outcome is None:
            self._gate.acquire(timeout=_LOOK_SECONDS)
        self.awaited = True
        value, error = self._outcome
        if error is None:
            return value
        try:
            raise error
        finally:
            del self, error  # the traceback holds this frame

    def run(self) -> None:
        """Make the call. What it raises is raised by `wait`."""
        function, self._function = self._function, None
        assert function is not None
        try:
            self._outcome = (function(), None)
        except BaseException as error:  # noqa: BLE001 - raised where the outcome is waited for
            self.failed = True
            self._outcome = (None, error if is_failure(error) else no_interrupt(error))
        finally:
            self._gate.release()
            del self, function  # as in `wait`

    def drop(self) -> None:
        """The call is not made."""
        self._function, self._outcome = None, (None, EngineClosed("the engine was closed before this was run"))
        self._gate.release()


class StepThread:
    """Makes calls in their order: a CPU's stream. Ends with `close`, when it is collected, or with the interpreter,
    whichever comes first.

    Not `concurrent.futures`, whose locks are taken by Python code: an interrupt (Ctrl-C) between a lock's taking and
    the block that gives it back leaves it held for good. Here all that the caller waits for is a call in C.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self.thread = threading.Thread(target=_serve, args=(self._calls,), name=name, daemon=True)
        self.thread.start()
        self._close = weakref.finalize(self, _end, self._calls, self.thread)

    def submit(self, function: Callable[[], Any]) -> Call:
        """Hand a call over, without waiting for it."""
        assert self._close.alive, "submitted after close"
        call = Call(function)
        self._calls.put(call)
        return call

    def close(self) -> None:
        """Waits for the call that runs, and drops those behind it. Idempotent."""
        self._close()


def _serve(calls: SimpleQueue[Call | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()
        del call  # what it returned is not kept until the next one


def _end(calls: SimpleQueue[Call | None], thread: threading.Thread) -> None:
    while True:
        try:
            call = calls.get_nowait()
        except Empty:
            break
        if call is not None:
            call.drop()
    calls.put(None)
    if thread is not threading.current_thread():
        thread.join()
