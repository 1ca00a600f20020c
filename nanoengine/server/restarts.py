"""Whether, and how soon, a process that has ended is started again."""

from __future__ import annotations

from collections import deque

from nanoengine.server.config import RestartOptions

_LONGEST_BACKOFF = 60.0


class Restarts:
    """When a process may be started again."""

    def __init__(self, options: RestartOptions) -> None:
        self._options, self._times = options, deque[float]()

    def delay(self, status: int, now: float) -> float | None:
        """Seconds to wait before the next start of a process that ended with `status`; None: it is not started."""
        policy = self._options.policy
        if policy == "never" or (policy == "on-failure" and status == 0):
            return None
        while self._times and now - self._times[0] > self._options.window:
            self._times.popleft()
        if len(self._times) >= self._options.max_restarts:
            return None
        self._times.append(now)
        return min(_LONGEST_BACKOFF, self._options.backoff * 2.0 ** (len(self._times) - 1))


def rule_of(options: RestartOptions) -> str:
    """The options in words, for an error."""
    return f"server.restart: policy {options.policy}, at most {options.max_restarts} in {options.window:g} s"
