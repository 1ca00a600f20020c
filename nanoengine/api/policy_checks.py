"""Scheduling policies as the core calls them: keys are checked, and errors name the plugin. Imports no torch."""

from __future__ import annotations

import logging
from typing import Any

from nanoengine.api.errors import RequestError, shown
from nanoengine.api.plugin_calls import failing_request
from nanoengine.api.policies import Key, Policy, QueuedRequest

_log = logging.getLogger(__name__)
Types = tuple[type[Any], ...]


class CheckedPolicy:
    """A policy whose methods raise `RequestError("policy_failed")` if it raises, or returns what is no key.

    Attributes:
        by_arrival: as in `Policy`. picks: it has a `next_key` of its own. counts: it has `served`. hears: it
            has any of the events, which need not be called else.
    """

    def __init__(self, policy: Policy, where: str) -> None:
        """where: the policy's name and origin, for messages."""
        self._policy, self._where = policy, where
        kind = type(policy)
        self.by_arrival = kind.by_arrival
        self.picks, self.counts = kind.next_key is not Policy.next_key, kind.served is not Policy.served
        self.hears = self.counts or kind.queued is not Policy.queued or kind.left is not Policy.left
        self._waiting_types: Types | None = None  # of the items of the first key
        self._running_types: Types | None = None
        self._warned = False

    def waiting_key(self, request: QueuedRequest) -> Key:
        try:
            key = self._policy.waiting_key(request)
            types = _types_of(key)
            if types != self._waiting_types:
                self._waiting_types = _alike(key, types, self._waiting_types)
            return key
        except BaseException as error:
            raise self._failure("waiting_key", error) from error

    def running_key(self, request: QueuedRequest) -> Key:
        try:
            key = self._policy.running_key(request)
            types = _types_of(key)
            if types != self._running_types:
                self._running_types = _alike(key, types, self._running_types)
            if not key:
                raise ValueError("it returned (), which has no first item")
            return key
        except BaseException as error:
            raise self._failure("running_key", error) from error

    def next_key(self) -> Key:
        """It may be the beginning of a key."""
        try:
            key = self._policy.next_key()
            types = _types_of(key)
            if self._waiting_types is not None:
                _alike(key, types, self._waiting_types[: len(types)])
            return key
        except BaseException as error:
            raise self._failure("next_key", error) from error

    def queued(self, request: QueuedRequest, returned: bool) -> None:
        try:
            self._policy.queued(request, returned)
        except BaseException as error:
            raise self._failure("queued", error) from error

    def left(self, request: QueuedRequest) -> None:
        try:
            self._policy.left(request)
        except BaseException as error:
            raise self._failure("left", error) from error

    def served(self, request: QueuedRequest, prompt: int, generated: int) -> None:
        try:
            self._policy.served(request, prompt, generated)
        except BaseException as error:
            raise self._failure("served", error) from error

    def _failure(self, method: str, error: BaseException) -> RequestError:
        """Raises `error` itself, if it is a signal to the whole program."""
        try:
            with failing_request("policy_failed", f"{method}() of {self._where}", type(self._policy)):
                raise error
        except RequestError as failure:
            if not self._warned:  # a request that has ended shows no error
                _log.warning("%s", failure)
            self._warned = True
            return failure


def _types_of(key: object) -> Types:
    if type(key) is not tuple:
        raise TypeError(f"it returned {shown(key)}, not a tuple of integers and strings")
    return tuple(map(type, key))


def _alike(key: Key, types: Types, known: Types | None) -> Types:
    """The types, if a key with them can be compared with those before it. Raises `TypeError`."""
    if not all(kind in (int, str) for kind in types):
        raise TypeError(f"it returned {shown(key)}, not a tuple of integers and strings")
    if known is not None and types != known:
        names = ", ".join(each.__name__ for each in known)
        raise TypeError(f"it returned {shown(key)}; its first key was of the types ({names}), and all must be alike")
    return types
