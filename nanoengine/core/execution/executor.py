"""Where the runner lives. One device: in this process, where a CPU's stream is a worker thread of one."""

from __future__ import annotations

import threading
import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from nanoengine.api.errors import EngineClosed, PluginError, described, is_failure, own_value
from nanoengine.core.engine_plan import EnginePlan
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.core.execution.start_report import MemoryReport
from nanoengine.core.step import StepPlan, StepResult


class StepHandle(Protocol):
    """A launched step."""

    def wait(self) -> StepResult:
        """Its result, once it has arrived. Raises what the step raised."""
        ...


class Executor(ABC):
    """Runs step plans, in the order they were launched."""

    @abstractmethod
    def start(self, plan: EnginePlan) -> MemoryReport:
        """Build the model and its memory."""

    @abstractmethod
    def launch(self, plan: StepPlan) -> StepHandle:
        """Hand over a step; returns before it has run. Legal while one step is in flight."""

    @abstractmethod
    def call(self, target: str, *args: Any) -> list[Any]:
        """Call "package.module:function" with each rank's runner, behind the launched steps; one answer a rank."""

    @abstractmethod
    def shutdown(self) -> None:
        """Wait for what runs, then give all memory back. Idempotent."""


class _CallHandle:
    def __init__(self, call: Call) -> None:
        self._call = call

    def wait(self) -> StepResult:
        handle: StepHandle = self._call.result()
        return handle.wait()


class InProcessExecutor(Executor):
    """One device. A GPU has a stream of its own: launching is enqueuing. On a CPU steps run in order on one worker
    thread, so that the host may prepare the next beside it."""

    def __init__(self, start_runner: Callable[[EnginePlan], tuple[ModelRunner, MemoryReport]]) -> None:
        self._start_runner = start_runner
        self._thread: StepThread | None = StepThread("nanoengine-step")
        self.runner: ModelRunner | None = None

    def start(self, plan: EnginePlan) -> MemoryReport:
        made: tuple[ModelRunner, MemoryReport] = self._submit(self._start_runner, plan).result()
        self.runner, report = made
        return report

    def launch(self, plan: StepPlan) -> StepHandle:
        assert self.runner is not None
        if self.runner.device.type != "cpu":
            return self.runner.launch(plan)
        return _CallHandle(self._submit(self.runner.launch, plan))

    def call(self, target: str, *args: Any) -> list[Any]:
        return [self._submit(self.running().call, target, *args).result()]

    def running(self) -> ModelRunner:
        """Raises `EngineClosed`."""
        if self.runner is None:
            raise EngineClosed
        return self.runner

    def shutdown(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.close()
        if self.runner is not None:
            self.runner.release()
            self.runner = None

    def _submit(self, function: Any, *args: Any) -> Call:
        assert self._thread is not None, "executor used after shutdown"
        return self._thread.submit(partial(function, *args))


_LOOK_SECONDS = 0.1  # an interrupted wait may have taken the gate with it


class Call:
    """A call that was handed over."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function: Callable[[], Any] | None = function
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def result(self) -> Any:
        """What it returned, once it has; raises what it raised, or `EngineClosed` if it was dropped.

        No interrupt of the caller's is raised on another thread: what looks like one comes as a `PluginError`.
        """
        while self._outcome is None:
            self._gate.acquire(timeout=_LOOK_SECONDS)
        value, error = self._outcome
        if error is None:
            return value
        try:
            raise error
        finally:
            del self, error  # the traceback holds this frame

    def _run(self) -> None:
        function, self._function = self._function, None
        assert function is not None
        try:
            self._end(function(), None)
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._end(None, error if is_failure(error) else _no_interrupt(error))
        finally:
            del self, function  # as in `result`

    def _end(self, value: Any, error: BaseException | None) -> None:
        self._outcome = (value, error)
        self._gate.release()

    def _drop(self) -> None:
        self._function = None
        self._end(None, EngineClosed("the engine was closed before this was run"))


def _no_interrupt(error: BaseException) -> PluginError:
    frame = traceback.extract_tb(own_value(error, "__traceback__"))[-1]
    found = PluginError(f"{frame.filename}, line {frame.lineno} raised {described(error)} where nobody interrupted")
    found.__cause__ = error
    return found


class StepThread:
    """Ends with `close`, when it is collected, or with the interpreter, whichever comes first.

    It makes calls in their order: a CPU's stream. Not `concurrent.futures`, whose locks are taken by Python code: an
    interrupt (Ctrl-C) between a lock's taking and the block that gives it back leaves it held for good. Here all that
    the caller waits for is a call in C.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._calls,), name=name, daemon=True)
        self._thread.start()
        self._unattended = weakref.finalize(self, _end, self._calls, self._thread)

    def submit(self, function: Callable[[], Any]) -> Call:
        """Does not wait."""
        call = Call(function)
        self._calls.put(call)
        return call

    def close(self) -> None:
        """Waits for the call that runs, and drops those behind it. Idempotent."""
        self._unattended()


def _serve(calls: SimpleQueue[Call | None]) -> None:
    while (call := calls.get()) is not None:
        call._run()
        del call  # what it returned is not kept until the next one


def _end(calls: SimpleQueue[Call | None], thread: threading.Thread) -> None:
    while True:
        try:
            call = calls.get_nowait()
        except Empty:
            break
        if call is not None:
            call._drop()
    calls.put(None)
    if thread is not threading.current_thread():
        thread.join()
