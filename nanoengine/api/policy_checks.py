"""Scheduling policies as the core calls them: keys are checked, and errors name the plugin. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nanoengine.api.errors import RequestError, shown
from nanoengine.api.plugin_calls import failing_request
from nanoengine.api.policies import Key, Policy, QueuedRequest

_log = logging.getLogger(__name__)


class CheckedPolicy:
    """A policy whose methods raise `RequestError("policy_failed")` if it raises, or returns what is no key.

    Attributes:
        by_arrival: as in `Policy`. picks: it has a `next_key` of its own. counts: it wants `served`.
    """

    def __init__(self, policy: Policy, where: str) -> None:
        """where: the policy's name and origin, for messages."""
        self._policy, self._where = policy, where
        kind = type(policy)
        self.by_arrival = kind.by_arrival
        self.picks, self.counts = kind.next_key is not Policy.next_key, kind.served is not Policy.served
        self._types: dict[str, list[type[Any]]] = {}  # of the items of the first key that a method returned
        self._warned = False

    def waiting_key(self, request: QueuedRequest) -> Key:
        with self._calling("waiting_key"):
            return self._checked("waiting_key", self._policy.waiting_key(request))

    def running_key(self, request: QueuedRequest) -> Key:
        with self._calling("running_key"):
            key = self._checked("running_key", self._policy.running_key(request))
            if not key:
                raise ValueError("it returned (), which has no first item")
            return key

    def next_key(self) -> Key:
        with self._calling("next_key"):
            return self._checked("waiting_key", self._policy.next_key(), part=True)

    def queued(self, request: QueuedRequest, returned: bool) -> None:
        with self._calling("queued"):
            self._policy.queued(request, returned)

    def left(self, request: QueuedRequest) -> None:
        with self._calling("left"):
            self._policy.left(request)

    def served(self, request: QueuedRequest, prompt: int, generated: int) -> None:
        with self._calling("served"):
            self._policy.served(request, prompt, generated)

    def _checked(self, kind: str, key: object, *, part: bool = False) -> Key:
        """The key, if it can be compared with those before it. part: it may be the beginning of one."""
        if not isinstance(key, tuple) or not all(type(item) in (int, str) for item in key):
            raise TypeError(f"it returned {shown(key)}, not a tuple of integers and strings")
        types = [type(item) for item in key]
        known = self._types.get(kind, types) if part else self._types.setdefault(kind, types)
        if types != (known[: len(types)] if part else known):
            names = ", ".join(each.__name__ for each in known)
            raise TypeError(f"it returned {shown(key)}; the first {kind} was ({names}), and all must be alike")
        return key

    @contextmanager
    def _calling(self, method: str) -> Iterator[None]:
        try:
            with failing_request("policy_failed", f"{method}() of {self._where}", type(self._policy)):
                yield
        except RequestError as error:
            if not self._warned:  # a request that has ended shows no error
                _log.warning("%s", error)
            self._warned = True
            raise
