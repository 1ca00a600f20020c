"""Server-sent events, written as bytes straight to the server: no layer of a framework sees a chunk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from nanoengine.server.gate import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),  # and the next one: a proxy must neither keep nor collect it
    (b"x-accel-buffering", b"no"),
]


class Writer:
    """One stream of events. The head goes out with the first of them, so until then an error has its own status.

    `write` waits while the client reads too slowly: the server's buffer is then full. Meanwhile the engine's deltas
    merge, and the next event has all of them.

    Attributes:
        started: the head was sent.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._head: Send = send
        self._send: Send = scope.get("nanoengine.send", send)
        self.started = False
        self._count = 0  # of writes
        self._busy = 0  # writes that wait

    async def write(self, data: bytes) -> None:
        self._count += 1
        self._busy += 1
        if not self.started:
            self.started = True
            await self._head({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._busy -= 1

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def ping(self, seconds: float) -> None:
        """Writes a comment whenever nothing was written for so long, until it is cancelled."""
        seen = 0
        while True:
            await asyncio.sleep(seconds)
            if seen == self._count and not self._busy:
                await self.write(PING)
            seen = self._count


async def watch(receive: Receive, gone: Callable[[], Any]) -> None:
    """Calls `gone` when the client closes the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()
