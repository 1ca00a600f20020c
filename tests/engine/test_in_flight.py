"""Steps in flight when the oldest one broke, and what is said of a step that did."""

from __future__ import annotations

import pytest

from nanoengine.api.errors import step_failure
from nanoengine.core.execution.results import StepHandle, wait_out
from nanoengine.core.step import StepResult


class Handle(StepHandle):
    """Ends when it is waited for, well or not."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.waits = error, 0

    def wait(self) -> StepResult:
        self.waits += 1
        if self.error is not None:
            raise self.error
        return StepResult()


def test_every_step_behind_a_broken_one_is_waited_for() -> None:
    handles = [Handle(), Handle(RuntimeError("late")), Handle()]
    wait_out(handles)
    assert [handle.waits for handle in handles] == [1, 1, 1]


def test_a_handle_that_does_not_know_has_not_arrived() -> None:
    assert not Handle().has_arrived()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("odd shape"), "step_failed", "running this request raised ValueError: odd shape (in layer 3)"),
        (MemoryError("no room"), "out_of_memory", "in a step of a single token"),
        (MemoryError("no room"), "out_of_memory", "on a GPU also gpu_memory_utilization"),
    ],
)
def test_a_failure_names_the_cause(error: Exception, code: str, said: str) -> None:
    error.add_note("in layer 3")
    failure = step_failure(error)
    assert failure.code == code
    assert said in str(failure)
    assert failure.__cause__ is error
