"""A client that may leave: the application is called with a `receive` and `send` of ours."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from nanoengine.server.auth import Keys
from nanoengine.server.config import ServerConfig
from nanoengine.server.gate import App, Gate
from nanoengine.server.record import Observer
from nanoengine.service.client import EngineClient
from server.support import Server


def gated(app: App, client: EngineClient, config: ServerConfig | None = None, keys: Keys | None = None) -> Gate:
    """The application behind what every request passes."""
    return Gate(app, config or ServerConfig(), keys or Keys({}), Observer(client))


class Connection:
    """One request. `send` waits while `reading` is not set, as a server's does whose buffer is full.

    Attributes:
        messages: what the application sent. task: the application.
    """

    def __init__(self, server: Server, path: str, body: Any) -> None:
        self._scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
            "raw_path": path.encode(), "query_string": b"", "headers": [], "scheme": "http", "root_path": "",
            "client": ("127.0.0.1", 1), "server": ("server", 80),
        }  # fmt: skip
        self._body = json.dumps(body).encode()
        self._sent, self._gone = False, asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.messages: list[dict[str, Any]] = []
        self.task = asyncio.ensure_future(server.app(self._scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        self.messages.append(message)

    def leave(self) -> None:
        """Close the connection."""
        self._gone.set()
        self.reading.set()

    @property
    def status(self) -> int | None:
        return next((m["status"] for m in self.messages if m["type"] == "http.response.start"), None)

    @property
    def chunks(self) -> list[bytes]:
        return [m["body"] for m in self.messages if m["type"] == "http.response.body" and m.get("body")]

    @property
    def text(self) -> str:
        return b"".join(self.chunks).decode()


async def until(holds: Any) -> None:
    """Lets the event loop turn until `holds()`; at most so often that a test ends."""
    for _ in range(100_000):
        if holds():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen")
