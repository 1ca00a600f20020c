"""The application of an HTTP process through its life: without an engine yet, serving, draining."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

import msgspec

from nanoengine.server.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
PROBES = frozenset({"/live", "/ready", "/health", "/metrics", "/load"})
"""Paths that are answered while the server drains, and do not keep it from ending."""
DRAINING = "nanoengine.draining"
"""Key of the scope of a probe: True if this process takes no new requests."""
SHUTTING_DOWN = "the server is shutting down"
_RETRY_SECONDS = {"starting": "5", "draining": "1"}


class Lifecycle:
    """An ASGI application around the one that `install` gives it; the `Gate` before it answers what it raises.

    Attributes:
        phase: what the engine does until there is an application, for people.
    """

    def __init__(self, wait: float) -> None:
        """`wait`: seconds that a request waits for the application once the engine is ready (`expect`)."""
        self.phase, self._wait = "process", wait
        self._app: App | None = None
        self._there = asyncio.Event()
        self._expected = self._ready = self._draining = False
        self._open = 0
        self._idle: Callable[[], None] | None = None

    @property
    def has_app(self) -> bool:
        return self._app is not None

    def expect(self) -> None:
        """The engine is ready: the application comes in a moment, and requests wait for it."""
        self._expected = True

    def install(self, app: App) -> None:
        self._app = app
        self._there.set()

    def ready(self) -> None:
        """All HTTP processes have their application: /ready is its answer from now on."""
        self._ready = True

    def drain(self, idle: Callable[[], None]) -> None:
        """Takes no new requests. `idle` is called when none is open any more, at once if there is none."""
        self._draining, self._idle = True, idle
        self._report_idle()

    async def wait_idle(self, seconds: float) -> None:
        """Until no request is open, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._open:
                    await asyncio.sleep(0.01)

    def _report_idle(self) -> None:
        if self._draining and not self._open and self._idle is not None:
            idle, self._idle = self._idle, None
            idle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["type"] != "http":
            raise RuntimeError(f"no protocol but HTTP is known, not {scope['type']}")
        if path == "/live" and scope["method"] == "GET":
            await _json(send, 200, {"status": "alive"})
        elif path in PROBES:
            await self._probe(scope, receive, send)
        elif self._draining:
            raise _refusal("draining", SHUTTING_DOWN)
        else:
            self._open += 1
            try:
                if self._app is None and self._expected:
                    await self._wait_for_app()
                if self._app is None:
                    raise _refusal("starting", f"the server is starting: {self.phase}")
                await self._app(scope, receive, send)
            finally:
                self._open -= 1
                self._report_idle()

    async def _wait_for_app(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._there.wait(), self._wait)

    async def _probe(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/ready" and self._draining:
            await _json(send, 503, {"status": "draining"})
        elif self._app is None or (path == "/ready" and not self._ready):
            status = {"status": "starting", "phase": self.phase}
            await _json(send, 503, status, {"retry-after": _RETRY_SECONDS["starting"]})
        else:
            await self._app({**scope, DRAINING: self._draining}, receive, send)


def _refusal(why: str, message: str) -> ApiError:
    headers = {"retry-after": _RETRY_SECONDS[why], "connection": "close"}
    return ApiError(503, message, "unavailable", headers=headers)


async def _json(send: Send, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    body = msgspec.json.encode(content)
    given = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        **(headers or {}),
    }
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
