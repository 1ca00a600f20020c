"""How much may wait: a request that would make the queue too long is refused, with the time to ask again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from nanoengine.api.errors import RequestError
from nanoengine.service.client import ClientRequest
from nanoengine.service.contracts import Queued
from nanoengine.service.options import LimitOptions

_WINDOW = 60.0  # seconds over which the speed of the queue is measured
_STEP = 0.25  # seconds between two measurements
_LEAST_WAIT, _MOST_WAIT = 1.0, 300.0


class _Measured(NamedTuple):
    """How much had left the queue at some time."""

    at: float
    requests: int
    tokens: int


class QueueLimits:
    """Refuses what would make the queue too long. Its caller guards it with a lock."""

    def __init__(self, options: LimitOptions, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds."""
        self._options, self._clock = options, clock
        self._measured: deque[_Measured] = deque()

    def check(self, request: ClientRequest, queue: Queued) -> None:
        """Raises `RequestError("overloaded")` with `retry_after`, where the queue is full. `queue`: without it."""
        self._measure(queue)
        count, tokens = request.params.n, request.params.n * len(request.prompt_token_ids)
        theirs, options = queue.queued_by_client.get(request.client, 0), self._options
        over = {
            "requests": _excess(queue.queued_requests, count, options.max_queued_requests),
            "tokens of prompts": _excess(queue.queued_tokens, tokens, options.max_queued_tokens),
            "requests of this client": _excess(theirs, count, options.max_queued_per_client),
        }
        if not any(over.values()):
            return
        seconds = max(
            self._seconds(over["requests"], "requests"),
            self._seconds(over["tokens of prompts"], "tokens"),
            self._seconds(over["requests of this client"] * queue.queued_requests / max(1, theirs), "requests"),
        )
        full = ", ".join(f"{excess:,} {what}" for what, excess in over.items() if excess)
        raise RequestError(
            "overloaded",
            f"too much is waiting: with this request of {count:,} x {len(request.prompt_token_ids):,} tokens the queue "
            f"would be over its limit by {full}; try again in {seconds:.0f} seconds",
            retry_after=seconds,
        )

    def _measure(self, queue: Queued) -> None:
        now, measured = self._clock(), self._measured
        if not measured or now - measured[-1].at >= _STEP:
            measured.append(_Measured(now, queue.started_requests, queue.started_tokens))
        while now - measured[0].at > _WINDOW:
            measured.popleft()

    def _seconds(self, excess: float, what: str) -> float:
        """Until so much more has left the queue, if it goes on as in the last minute."""
        if not excess:
            return 0.0
        first, last = self._measured[0], self._measured[-1]
        passed, left = last.at - first.at, getattr(last, what) - getattr(first, what)
        seconds = excess * passed / left if left > 0 else passed  # nothing left it: at least as long again
        return min(max(seconds, _LEAST_WAIT), _MOST_WAIT)


def _excess(queued: int, more: int, most: int | None) -> int:
    """By how much the queue would be too long. An empty queue takes anything."""
    return max(0, queued + more - most) if most is not None and queued else 0
