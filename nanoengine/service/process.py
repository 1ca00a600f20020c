"""The engine's process: `python -m nanoengine.service.process CONTROL [untied]`, with the number of its control socket.

What it and its starter send each other (`service/control.py`):

| to the process | fields | |
|---|---|---|
| `start` | `source`: `EngineSource.to_json()`; `log_level`, `log_format`: of `observe/logs.py` | the first message |
| `client` | a descriptor | a socket of a client, which is connected as soon as the engine is ready |

| from the process | fields | |
|---|---|---|
| `phase` | `phase`: what it does | until it is ready |
| `ready` | `info`: of `EngineInfo`, as JSON | requests can be added |
| `failed` | `error`: the class's name, `message`, `traceback` | it could not start; it ends with status 1 |
| `ended` | `cause` | the engine has ended: open requests can go on in another one; the process ends with status 3 |

The process ends with status 0 when its control socket closes; its open requests are dropped. SIGINT and SIGTERM are
ignored: they are its starter's to handle. Unless it is "untied", it is killed when its starter's thread ends.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import socket
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from nanoengine.api.errors import NanoEngineError, described
from nanoengine.observe.logs import configure_logs
from nanoengine.service.control import Control, Message, inherit
from nanoengine.service.source import EngineSource

if TYPE_CHECKING:
    from nanoengine.service.connection import Connection
    from nanoengine.service.contracts import Batch
    from nanoengine.service.loop import EngineService

FAILED, ENDED = 1, 3
_CLOSE_SECONDS = 5.0
_log = logging.getLogger("nanoengine.service")


class EngineHost:
    """The engine, its service and its clients, in this process. All methods run in one event loop."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._service: EngineService | None = None
        self._waiting: list[socket.socket] = []  # of clients, until the engine is ready
        self._connections: set[Connection] = set()
        self._tasks = set[asyncio.Task[None]]()
        self._status: asyncio.Future[int] = self._loop.create_future()

    async def run(self) -> int:
        """The exit status of the process."""
        first = await self._control.receive()
        if first is None:
            return 0
        configure_logs(first.fields.get("log_format", "text"), first.fields.get("log_level", "info"), "engine")
        self._spawn(self._read())
        self._spawn(self._start(EngineSource.from_json(first.fields["source"])))
        return await self._status

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("the engine's process ends: %s", described(task.exception()), exc_info=task.exception())  # type: ignore[arg-type]
            self._end(FAILED)

    def _end(self, status: int) -> None:
        if not self._status.done():
            self._status.set_result(status)

    async def _start(self, source: EngineSource) -> None:
        from nanoengine.service.options import ServiceOptions
        from nanoengine.service.parts import parts_of, service_of

        try:
            parts = parts_of(ServiceOptions.from_json(source.service))
            llm = await asyncio.to_thread(source.build, self._phase)
        except BaseException as error:
            text = str(error) if isinstance(error, NanoEngineError) else described(error)
            trace = "".join(traceback.format_exception(error))
            self._say("failed", error=type(error).__name__, message=text, traceback=trace)
            self._end(FAILED)
            if not isinstance(error, Exception):
                raise
            return
        service = self._service = service_of(llm, **parts)
        service.start()
        service.join(_End(self))
        from nanoengine.service.frames import info_to_json

        self._say("ready", info=info_to_json(service.info))
        waiting, self._waiting = self._waiting, []
        for sock in waiting:
            self._connect(sock)

    def _phase(self, phase: str) -> None:
        """Of the start. Any thread may call it."""
        self._loop.call_soon_threadsafe(partial(self._say, "phase", phase=phase))

    async def _read(self) -> None:
        while (message := await self._control.receive()) is not None:
            self._take(message)
        self._end(0)

    def _take(self, message: Message) -> None:
        if message.kind == "client":
            assert message.fd is not None
            self._connect(socket.socket(fileno=message.fd))
        else:
            _log.error("a message %r, which the engine's process does not know", message.kind)

    def _connect(self, sock: socket.socket) -> None:
        if self._service is None:
            self._waiting.append(sock)
            return
        from nanoengine.service.connection import Connection

        self._connections.add(Connection(self._service, sock, self._connections.discard))

    def _say(self, kind: str, **fields: Any) -> None:
        with suppress(OSError):  # its starter is gone: `_read` ends the process
            self._control.send(kind, **fields)

    def ended(self, cause: BaseException | None) -> None:
        """The service has ended by itself."""
        assert self._service is not None
        if cause is not None:
            self._say("ended", cause=str(self._service.unavailable()))
            self._loop.call_later(0.1, self._end, ENDED)  # what was sent to clients is on its way

    def close(self) -> None:
        """Give the device's memory back. A step that hangs is not waited for long."""
        if self._service is not None:
            closing = threading.Thread(target=self._service.close, daemon=True)
            closing.start()
            closing.join(_CLOSE_SECONDS)


class _End:
    """Reports the end of the service to its host."""

    def __init__(self, host: EngineHost) -> None:
        self._host, self._loop = host, asyncio.get_running_loop()

    def deliver(self, batch: Batch) -> None:
        """It has no requests."""

    def beat(self) -> None:
        """It sends nothing."""

    def ended(self, cause: BaseException | None, batch: Batch) -> None:
        with suppress(RuntimeError):  # the event loop has ended, and so has the process
            self._loop.call_soon_threadsafe(self._host.ended, cause)


async def _run(number: int, *, tied: bool) -> None:
    host = EngineHost(inherit(number, tied=tied))
    status = await host.run()
    host.close()
    logging.shutdown()
    os._exit(status)  # a thread that hangs in a step, or that still loads a model, must not keep the process


def main() -> None:
    faulthandler.enable()
    asyncio.run(_run(int(sys.argv[1]), tied="untied" not in sys.argv[2:]))


if __name__ == "__main__":
    main()
