"""An HTTP process: `python -m nanoengine.server.http_process CONTROL LISTENER`, numbers of inherited sockets.

What it and the supervisor send each other (`service/control.py`):

| to the process | fields | |
|---|---|---|
| `start` | `config`: of `ServerConfig`; `plugin_files`; `name`; `phase` | the first message |
| `phase` | `phase` | what the engine does; "ready": a descriptor follows |
| `engine` | a descriptor | a socket to the engine; a new one after each start of the engine |
| `open` | | all HTTP processes have the engine: /ready may say so |
| `drain` | | take no new requests; answered by `idle` when none is open any more |
| `stop` | `why`: the error that open requests end with | abort what is open, and end |

| from the process | fields | |
|---|---|---|
| `up` | | it accepts connections |
| `serving` | | it has the engine and its application |
| `failed` | `message` | it cannot serve with this configuration; it ends with status 1 |
| `idle` | | see `drain` |
| `beat` | `hanging`: whether its engine makes no progress; `connected`: whether it has one | once a second |

It ends when its control socket closes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, get_type_hints

import uvicorn

from nanoengine.api.errors import NanoEngineError, described
from nanoengine.observe.logs import configure_logs
from nanoengine.params.field_types import conform
from nanoengine.server.accepting import Acceptor
from nanoengine.server.config import ServerConfig
from nanoengine.server.http_connection import HttpConnection
from nanoengine.server.lifecycle import App, Lifecycle
from nanoengine.service.control import BEAT_SECONDS, Control, inherit

_log = logging.getLogger(__name__)
_CONNECT_SECONDS = 10.0  # that a request waits for the application once the engine is ready
_CLOSE_SECONDS = 1.0  # that answers have to be sent when the process is asked to end
_KEEP_ALIVE_SECONDS = 75  # longer than a proxy keeps its connections (60 s is usual): so the proxy closes them
_FILES = 1 << 16


class Served(Protocol):
    """The engine as the process serves it. It is made in the process's event loop."""

    @property
    def hanging(self) -> bool:
        """Whether the engine makes no progress."""
        ...

    @property
    def connected(self) -> bool:
        """Whether there is a connection to an engine."""
        ...

    def prepare(self) -> None:
        """What can be done before there is an engine; runs in a thread."""
        ...

    def connect(self, sock: socket.socket) -> None:
        """Use the engine at the other end. What is running is continued there."""
        ...

    async def app(self) -> App:
        """The application; waits for the first engine. Raises `NanoEngineError` for a wrong configuration."""
        ...

    def gate(self, inside: App) -> App:
        """What every request passes before `inside`, from the start of the process to its end."""
        ...

    async def close(self, why: str) -> None:
        """Abort what is running, which ends with the error `why`."""
        ...


MakeServed = Callable[[ServerConfig, Sequence[str]], Served]
"""From the configuration and the plugin files. Raises `NanoEngineError` for what is wrong in them."""


class _Server(uvicorn.Server):
    """Leaves signals to the supervisor, takes connections one by one, and says when it does."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, accepts: Callable[[], None]) -> None:
        super().__init__(config)
        self._listener, self._accepts = listener, accepts

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._acceptor = Acceptor(self._listener, self._connection)
        self._accepts()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._acceptor.close()
        await super().shutdown([self._listener])

    def _connection(self) -> HttpConnection:
        return HttpConnection(config=self.config, server_state=self.server_state, app_state={})


class HttpProcess:
    """The life of the process: what the supervisor sends, and what follows from it."""

    def __init__(self, control: Control, listener: socket.socket, make: MakeServed) -> None:
        self._control, self._listener, self._make = control, listener, make
        self._lifecycle = Lifecycle(_CONNECT_SECONDS)
        self._end: asyncio.Future[tuple[int, str | None]] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """The exit status."""
        start = await self._control.receive()
        if start is None:
            return 0
        config = server_config_of(start.fields["config"])
        configure_logs(config.log_format, config.log_level, start.fields["name"])
        self._lifecycle.phase = start.fields["phase"]
        try:
            served = self._make(config, start.fields["plugin_files"])
        except NanoEngineError as error:
            self._send("failed", message=str(error))
            return 1
        server = _Server(self._options(served), self._listener, lambda: self._send("up"))
        work = [server.serve(), self._obey(served), self._install(served), self._beat(served)]
        tasks = [asyncio.create_task(each) for each in work]
        for task in tasks:
            task.add_done_callback(self._check)
        status, why = await self._end
        if why is not None:  # what is open gets its end
            self._lifecycle.drain(lambda: None)
            await served.close(why)
            await self._lifecycle.wait_idle(_CLOSE_SECONDS)
        server.should_exit, server.force_exit = True, why is None
        for task in tasks[1:]:
            task.cancel()
        await tasks[0]
        return status

    def _options(self, served: Served) -> uvicorn.Config:
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        return uvicorn.Config(
            served.gate(self._lifecycle),
            loop="none", http=HttpConnection, ws="none", lifespan="off", interface="asgi3",
            log_config=None, access_log=False, server_header=False, proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=1,
        )  # fmt: skip

    def _check(self, task: asyncio.Task[None]) -> None:
        """A task that fails ends the process."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if isinstance(error, NanoEngineError):
            self._send("failed", message=str(error))
        else:
            _log.error("the process ends: %s", described(error), exc_info=error)
        self._finish(1, why=str(error) if isinstance(error, NanoEngineError) else None)

    def _finish(self, status: int, *, why: str | None) -> None:
        """`why`: what open requests end with; None: their connections are closed."""
        if not self._end.done():
            self._end.set_result((status, why))

    async def _obey(self, served: Served) -> None:
        while (message := await self._control.receive()) is not None:
            match message.kind:
                case "phase":
                    self._lifecycle.phase = message.fields["phase"]
                    if self._lifecycle.phase == "ready":
                        self._lifecycle.expect()
                case "engine":
                    assert message.fd is not None
                    served.connect(socket.socket(fileno=message.fd))
                case "open":
                    self._lifecycle.ready()
                case "drain":
                    self._lifecycle.drain(lambda: self._send("idle"))
                case "stop":
                    self._finish(0, why=message.fields["why"])
                case other:
                    raise RuntimeError(f"the supervisor sent {other!r}")
        self._finish(0, why=None)

    async def _install(self, served: Served) -> None:
        await asyncio.to_thread(served.prepare)
        self._lifecycle.install(await served.app())
        gc.collect()
        gc.freeze()  # what is there now stays: collections need not look at it again
        self._send("serving")

    async def _beat(self, served: Served) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            self._send("beat", hanging=served.hanging, connected=served.connected)

    def _send(self, kind: str, **fields: Any) -> None:
        with suppress(OSError):  # the supervisor is gone: `_obey` ends
            self._control.send(kind, **fields)


def server_config_of(found: Mapping[str, Any]) -> ServerConfig:
    """From plain JSON, as `dataclasses.asdict` gives it."""
    types = get_type_hints(ServerConfig)
    return ServerConfig(**{name: conform(f"server.{name}", value, types[name]) for name, value in found.items()})


def raise_file_limit() -> None:
    """Every connection is a file: the usual limit of 1,024 is not enough for a thousand streams."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _run(make: MakeServed) -> int:
    control, listener = inherit(int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))
    os.set_inheritable(listener.fileno(), False)
    raise_file_limit()
    return await HttpProcess(control, listener, make).run()


def run_process(make: MakeServed) -> None:
    """Runs the process, on uvloop where it is installed, until it ends."""
    try:
        import uvloop
    except ImportError:
        run: Callable[[Coroutine[Any, Any, int]], int] = asyncio.run
    else:
        run = uvloop.run
    status = run(_run(make))
    logging.shutdown()
    os._exit(status)  # a thread that is still at a long prompt must not keep the process


def main() -> None:
    from nanoengine.server.served import ServedEngine

    run_process(ServedEngine)


if __name__ == "__main__":
    main()
