"""Steps between launch and commit, and what is told of one that breaks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nanoengine.api.errors import RequestError, described, is_failure
from nanoengine.core.execution.executor import StepHandle
from nanoengine.core.execution.results import LaunchedStep
from nanoengine.core.scheduling.messages import ScheduledStep
from nanoengine.setup.start.shortage import forget_locals, is_out_of_memory


@dataclass(frozen=True, slots=True)
class InFlight:
    step: ScheduledStep
    handle: StepHandle

    def has_arrived(self) -> bool:
        """Whether `wait` would not wait. Only a device's own handles can tell; on a CPU, batches depend on no clock."""
        try:
            return isinstance(self.handle, LaunchedStep) and self.handle.has_arrived()
        except BaseException as error:
            if not is_failure(error):
                raise
            return True  # a device that is lost raises again in `wait`, where it is answered for


def wait_out(in_flight: deque[InFlight]) -> list[ScheduledStep]:
    """Empties it once its steps have ended: the oldest one broke, and those behind it read its missing tokens."""
    dropped = list(in_flight)
    in_flight.clear()
    for each in dropped[1:]:
        try:
            each.handle.wait()
        except BaseException as late:  # it broke on what the first one left undone; that is reported
            if not is_failure(late):
                raise
            forget_locals(late)
    return [each.step for each in dropped]


def step_failure(error: BaseException) -> RequestError:
    """What to tell whose request raised `error` when it ran alone."""
    text = f"running this request raised {described(error)}"
    if is_out_of_memory(error):
        mend = "no part of its step was small enough; leave more room: lower engine.gpu_memory_utilization"
        cause = RequestError("out_of_memory", f"{text}; {mend}, kv_cache_memory or max_num_seqs")
    else:
        cause = RequestError("step_failed", text)
    cause.__cause__ = error
    forget_locals(error)
    return cause
