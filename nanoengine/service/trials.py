"""In which order requests go on in another engine, so that one which ends engines ends no other request."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable

_APART_SECONDS = 1.0


class Trials:
    """Requests of one client that were in two engines which ended, without a new token: one of them may be the cause.

    They are added one by one: the next one when the last one has got a token, or has ended. The first one waits for a
    random time, because other clients of the same engine have such requests too. One that was not added yet when the
    engine ends was not its cause, and is not counted.
    """

    def __init__(self, add: Callable[[int], None], settled: Callable[[int], bool]) -> None:
        """`add`: adds the request of this key. `settled`: whether it has got a token, or has ended."""
        self._add, self._settled = add, settled
        self._waiting = deque[int]()
        self._tried: int | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, keys: Iterable[int]) -> None:
        """A new engine is there."""
        self.stop()
        waiting = list(keys)
        random.shuffle(waiting)
        self._waiting.extend(waiting)
        if waiting:
            delay = random.uniform(0, _APART_SECONDS)
            self._timer = asyncio.get_running_loop().call_later(delay, self._next)

    def stop(self) -> None:
        """The engine is gone."""
        self._waiting.clear()
        self._tried = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def check(self) -> None:
        """Deltas have come, or requests have ended."""
        if self._tried is not None and self._settled(self._tried):
            self._next()

    def _next(self) -> None:
        self._tried = None
        while self._waiting:
            key = self._waiting.popleft()
            if self._settled(key):
                continue
            self._add(key)
            if not self._settled(key):
                self._tried = key
                return
