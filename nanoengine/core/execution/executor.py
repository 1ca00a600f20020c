"""Where the runner lives. One device: in this process, where a CPU's stream is a worker thread of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, Protocol

from nanoengine.api.errors import EngineClosed
from nanoengine.api.parallel import SingleRank
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.core.execution.step_thread import Call, StepThread
from nanoengine.core.step import StepPlan, StepResult
from nanoengine.setup.plugins.targets import EnginePlan, TargetLoader
from nanoengine.setup.start.memory import MemoryReport


class StepHandle(Protocol):
    """A launched step."""

    def wait(self) -> StepResult:
        """Its result, once it has arrived. Raises what the step raised."""
        ...


class Executor(ABC):
    """Runs step plans, in the order they were launched."""

    @abstractmethod
    def start(self, plan: EnginePlan, loader: TargetLoader) -> MemoryReport:
        """Build the model and its memory."""

    @abstractmethod
    def launch(self, plan: StepPlan) -> StepHandle:
        """Hand over a step; returns before it has run. Legal while one step is in flight."""

    @abstractmethod
    def call(self, name: str, *args: Any) -> list[Any]:
        """Call a runner's method by name, after the launched steps; one answer a rank. For rare control, not steps."""

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

    def __init__(self) -> None:
        self._thread: StepThread | None = StepThread("nanoengine-step")
        self.runner: ModelRunner | None = None

    def start(self, plan: EnginePlan, loader: TargetLoader) -> MemoryReport:
        self.runner = ModelRunner(plan, loader, SingleRank())
        report: MemoryReport = self._submit(self.runner.start).result()
        return report

    def launch(self, plan: StepPlan) -> StepHandle:
        assert self.runner is not None
        if self.runner.device.type != "cpu":
            return self.runner.launch(plan)
        return _CallHandle(self._submit(self.runner.launch, plan))

    def call(self, name: str, *args: Any) -> list[Any]:
        return [self._submit(getattr(self.running(), name), *args).result()]

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
