"""Steps in flight when the oldest one broke, and what is said of a step that did."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from nanoengine.core.engine import InFlight, step_failure, wait_out


class Handle:
    """Ends when it is waited for, well or not."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.waits = error, 0

    def wait(self) -> Any:
        self.waits += 1
        if self.error is not None:
            raise self.error


def test_every_step_behind_a_broken_one_is_waited_for() -> None:
    handles: list[Any] = [Handle(), Handle(RuntimeError("late")), Handle()]
    in_flight = deque(InFlight(f"step {i}", handle) for i, handle in enumerate(handles))  # type: ignore[arg-type]
    wait_out(in_flight)
    assert len(in_flight) == 3  # an interrupt meanwhile loses none
    assert [handle.waits for handle in handles] == [0, 1, 1]  # the oldest one was waited for: so it was seen to break


def test_a_handle_that_cannot_tell_has_not_arrived() -> None:
    assert not InFlight("step", Handle()).has_arrived()  # type: ignore[arg-type]


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
