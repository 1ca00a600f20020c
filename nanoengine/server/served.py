"""The engine as an HTTP process serves it: the client, the tokenizer with its templates, the application."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanoengine.server.app import create_app
from nanoengine.server.auth import configured_keys
from nanoengine.server.config import ServerConfig, TraceOptions
from nanoengine.server.gate import Gate
from nanoengine.server.lifecycle import App
from nanoengine.server.parsing import load_parsers
from nanoengine.server.record import Observer
from nanoengine.service.remote import RemoteClient
from nanoengine.service.text import tokenizer_of
from nanoengine.setup.plugins.discover import discover

if TYPE_CHECKING:
    from nanoengine.server.traces import Traces

_SEND_SECONDS = 3.0  # that a collector of spans has to take the last ones


class ServedEngine:
    """See `http_process.Served`."""

    def __init__(self, config: ServerConfig, plugin_files: Sequence[str]) -> None:
        self._config = config
        self._keys = configured_keys(config)
        self._registry = discover(plugin_files)
        self._traces = _traces(config.traces)
        self._client = RemoteClient(health_deadline=config.health_deadline)

    @property
    def hanging(self) -> bool:
        return not self._client.health.alive

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    def prepare(self) -> None:
        import transformers  # noqa: F401 - takes a while, and the tokenizer needs it

        load_parsers(self._registry, self._config, None)  # a name that does not exist is an error at once

    def connect(self, sock: socket.socket) -> None:
        self._client.connect(sock)

    async def app(self) -> App:
        info = await self._client.ready()
        tokenizer = await asyncio.to_thread(tokenizer_of, info)
        parsers = load_parsers(self._registry, self._config, tokenizer)
        return create_app(self._client, self._config, tokenizer, parsers)

    def gate(self, inside: App) -> App:
        return Gate(inside, self._config, self._keys, Observer(self._client, self._traces))

    async def close(self, why: str) -> None:
        await self._client.close(why)
        if self._traces is not None:
            closing = threading.Thread(target=self._traces.close, daemon=True)
            closing.start()
            await asyncio.to_thread(closing.join, _SEND_SECONDS)


def _traces(options: TraceOptions) -> Traces | None:
    """What makes spans; None: they are not wanted."""
    if options.endpoint is None:
        return None
    from nanoengine.server.traces import Traces

    theirs = logging.getLogger("opentelemetry")  # what it says about a collector goes where our own lines go
    theirs.handlers, theirs.propagate = logging.getLogger("nanoengine").handlers, False
    return Traces(options)
