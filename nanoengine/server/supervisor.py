"""The supervisor: starts one engine and k HTTP processes, watches them, and ends them. No torch, no HTTP.

    supervisor ── control socket ──► engine process: see `service/process.py`
               ── control socket ──► HTTP process: see `server/http_process.py`
    HTTP process ── a socket of their own, whose ends the supervisor hands out ──► engine process

The supervisor has the listening socket, so no connection is refused while an HTTP process is started again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nanoengine.api.errors import NanoEngineError
from nanoengine.distributed.exits import exit_words
from nanoengine.observe.logs import fields
from nanoengine.server.children import Child
from nanoengine.server.config import RestartOptions, ServerConfig
from nanoengine.server.restarts import Restarts, rule_of
from nanoengine.service.control import BEAT_SECONDS, Message
from nanoengine.service.engine_process import MODULE, python, start_error
from nanoengine.setup.start.clock import PHASES

_log = logging.getLogger(__name__)
_STOP_SECONDS = 5.0  # that a process has to end when it is asked to; then it is killed
_HTTP_RESTARTS = RestartOptions(policy="always", max_restarts=8, window=60.0, backoff=0.05)
SILENCE = 60
READY = "ready"  # the phase of an engine that has started
OK, FAILED = 0, 1


class StartFailed(NanoEngineError):
    """The engine could not be started; the message says why."""


class ServerFailed(NanoEngineError):
    """A process ended, and is not started again; the message says why."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended. `status`: as in `subprocess`. `cause`: its own words, or those of the status."""

    status: int
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the supervisor starts.

    Attributes:
        listener: the bound socket. address, model: what is logged.
        engine, http: the fields of the message "start" to the process.
        engine_command, http_command: begin of the command lines.
    """

    listener: socket.socket
    address: str
    model: str
    engine: Mapping[str, Any]
    http: Mapping[str, Any]
    engine_command: Sequence[str] = field(default_factory=lambda: python(MODULE))
    http_command: Sequence[str] = field(default_factory=lambda: python("nanoengine.server.http_process"))


@dataclass
class Http:
    """An HTTP process.

    Attributes:
        up: it accepts connections. serving: it has the engine. idle: no request is open, while it is draining.
        silent: beats that it missed in a row. hanging: beats in a row by which its engine makes no progress.
        apart: beats in a row by which it has no connection to an engine.
        failure: why it is killed, or what it says itself.
    """

    child: Child
    up: bool = False
    serving: bool = False
    idle: bool = False
    silent: int = 0
    hanging: int = 0
    apart: int = 0
    failure: str = ""


class Supervisor:
    """Runs the server until it is asked to end, or cannot go on."""

    def __init__(self, options: ServerConfig, launch: Launch, *, silence: int = SILENCE) -> None:
        """`silence`: seconds without a beat after which an HTTP process hangs, and is killed."""
        self._silence = silence
        self._options, self._launch = options, launch
        self._began = time.monotonic()
        self._engine: Child | None = None  # while it is ready
        self._engine_failure = ""
        self._phase = "process"
        self._all_http = dict[int, Http]()
        self._children = set[Child]()
        self._signals = asyncio.Queue[signal.Signals]()
        self._open = self._draining = self._stopping = False
        self._changed = asyncio.Event()

    async def run(self) -> int:
        """The exit status: 0 after a first signal, 130 or 143 after a second one.

        Raises `StartFailed` or `ServerFailed`. No process is left, whatever ends it.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # a shell disables Ctrl-C for a command behind `&`
                loop.add_signal_handler(number, self._signals.put_nowait, number)
        _log.info("listening at %s", self._launch.address, extra=fields(workers=self._options.workers))
        _log.info("loading %s", self._launch.model)
        asked = loop.create_task(self._signals.get())
        keepers = [loop.create_task(self._keep_engine()), loop.create_task(self._watch())]
        keepers += [loop.create_task(self._keep_http(number)) for number in range(self._options.workers)]
        try:
            await asyncio.wait([asked, *keepers], return_when=asyncio.FIRST_COMPLETED)
            for keeper in keepers:
                if keeper.done():
                    keeper.result()  # raises: a keeper ends only by its error
            return await self._end(asked.result(), keepers)
        except ServerFailed as error:
            self._stopping = True
            await self._stop_http(str(error))
            raise
        finally:
            self._stopping = True
            for task in (asked, *keepers):
                task.cancel()
            await asyncio.gather(asked, *keepers, return_exceptions=True)
            for child in list(self._children):
                child.kill()
                await child.end(_STOP_SECONDS)

    async def _end(self, number: signal.Signals, keepers: Sequence[asyncio.Task[None]]) -> int:
        """Drains and stops; a second signal, or a keeper's error, ends it at once."""
        ending = asyncio.ensure_future(self._drain_and_stop(number))
        again = asyncio.ensure_future(self._signals.get())
        try:
            await asyncio.wait([ending, again, *keepers], return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                ending.result()
                return OK
            if again.done():
                _log.warning("%s again: ending at once", again.result().name)
                return 128 + again.result()
            for keeper in keepers:
                if keeper.done():
                    keeper.result()
            raise AssertionError("a keeper ends only by its error")
        finally:
            self._stopping = True
            for task in (ending, again):
                task.cancel()
            await asyncio.gather(ending, again, return_exceptions=True)

    async def _drain_and_stop(self, number: signal.Signals) -> None:
        self._draining = True
        seconds = self._options.drain_timeout
        _log.info("%s: requests have %g s to end; again to end at once", number.name, seconds)
        for http in self._http:
            http.child.send("drain")
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not all(http.idle for http in self._http):
                    self._changed.clear()
                    await self._changed.wait()
        left = sum(not http.idle for http in self._http)
        if left:
            _log.warning("requests still run after %g s (server.drain_timeout) and are aborted", seconds)
        self._stopping = True
        await self._stop_http("the server is shutting down")
        if self._engine is not None:
            await self._engine.end(_STOP_SECONDS)
        _log.info("ended")

    async def _stop_http(self, why: str) -> None:
        """HTTP processes end what is open with the error `why`, and then themselves."""
        children = [http.child for http in self._http]
        for child in children:
            child.send("stop", why=why)
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await asyncio.gather(*(child.process.wait() for child in children))
        await asyncio.gather(*(child.end(0.0) for child in children))

    # The engine

    async def _keep_engine(self) -> None:
        """Runs the engine, again and again. Raises `StartFailed` or `ServerFailed`; otherwise it never returns."""
        restarts, was_ready = Restarts(self._options.restart), False
        while True:
            ended = await self._run_engine()
            if self._stopping:
                await asyncio.Future()
            was_ready = was_ready or self._phase == READY
            if not was_ready:
                raise StartFailed(ended.cause)
            self._set_phase("restart")
            delay = restarts.delay(ended.status, time.monotonic())
            if delay is None:
                policy = self._options.restart
                raise ServerFailed(f"the engine has ended, and is not started again ({rule_of(policy)}): {ended.cause}")
            _log.error("the engine has ended: %s; starting it again in %g s", ended.cause, delay)
            await asyncio.sleep(delay)

    async def _run_engine(self) -> Ended:
        """One engine from its start to its end."""
        child = await self._start("engine", self._launch.engine_command, self._launch.engine)
        began, limit, self._engine_failure = time.monotonic(), self._options.startup_timeout, ""
        try:
            try:
                async with asyncio.timeout(limit) as deadline:
                    while (message := await child.receive()) is not None:
                        if message.kind == "phase":
                            phase = message.fields["phase"]
                            _log.log(logging.DEBUG if phase in PHASES else logging.INFO, "the engine: %s", phase)
                            self._set_phase(phase)
                        elif message.kind == "failed":
                            self._engine_failure = str(start_error(message))
                        elif message.kind == "ended":
                            self._engine_failure = message.fields["cause"]
                        elif message.kind == "ready":
                            deadline.reschedule(None)
                            self._connect_all(child, began)
            except TimeoutError:
                child.kill()
                slow = f"it was not ready after {limit:g} s (server.startup_timeout), in the phase {self._phase!r}"
                self._engine_failure = slow
            self._engine = None
            return await self._ended(child, self._engine_failure)
        finally:
            self._engine = None

    def _connect_all(self, child: Child, began: float) -> None:
        _log.info("the engine is ready after %.2f s", time.monotonic() - began, extra=fields(pid=child.pid))
        self._engine = child
        self._set_phase(READY)
        for http in self._http:
            http.hanging = 0
            self._connect(http)

    def _connect(self, http: Http) -> None:
        """Gives the engine and an HTTP process the ends of a new socket."""
        assert self._engine is not None
        http.apart = 0
        for_engine, for_http = socket.socketpair()
        with for_engine, for_http:
            self._engine.send("client", for_engine.fileno())
            http.child.send("engine", for_http.fileno())

    def _set_phase(self, phase: str) -> None:
        self._phase = phase
        for http in self._http:
            http.child.send("phase", phase=phase)

    # HTTP processes

    async def _keep_http(self, number: int) -> None:
        """Runs one HTTP process, again and again. Raises `ServerFailed`; otherwise it never returns."""
        restarts = Restarts(_HTTP_RESTARTS)
        while True:
            ended = await self._run_http(number)
            if self._stopping or self._draining:
                await asyncio.Future()
            delay = restarts.delay(ended.status, time.monotonic())
            if delay is None:
                raise ServerFailed(f"HTTP process {number} keeps ending: {ended.cause}")
            _log.error("HTTP process %d has ended: %s; starting it again", number, ended.cause)
            await asyncio.sleep(delay)

    async def _run_http(self, number: int) -> Ended:
        name, fd = f"http {number}", self._launch.listener.fileno()
        start = {**self._launch.http, "name": name, "phase": self._phase}
        child = await self._start(name, self._launch.http_command, start, arguments=[str(fd)], fds=[fd])
        http = Http(child)
        self._all_http[number] = http
        try:
            while (message := await child.receive()) is not None:
                self._take(http, message)
            ended = await self._ended(child, http.failure)
            if not self._open and (http.failure or not http.up):
                raise StartFailed(http.failure or f"an HTTP process could not start: {ended.cause}; its log says why")
            return ended
        finally:
            del self._all_http[number]
            self._changed.set()

    def _take(self, http: Http, message: Message) -> None:
        """A message of an HTTP process."""
        http.silent = 0
        match message.kind:
            case "up":
                http.up = True
                http.child.send("phase", phase=self._phase)
                if self._engine is not None:
                    self._connect(http)
                if self._draining:
                    http.child.send("drain")
            case "serving":
                http.serving = True
                self._open_all()
            case "idle":
                http.idle = True
                self._changed.set()
            case "failed":
                http.failure = message.fields["message"]
            case "beat":
                http.hanging = http.hanging + 1 if message.fields["hanging"] else 0
                http.apart = 0 if message.fields["connected"] else http.apart + 1
                if http.apart > 1 and self._engine is not None:  # one beat may have crossed a socket on its way
                    _log.error("%s has lost its connection to the engine, and gets another", http.child.name)
                    self._connect(http)

    async def _watch(self) -> None:
        """Kills what hangs, once a second. It counts beats, not time: all processes may have been frozen together."""
        limit = self._options.restart.hang_timeout
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            for http in self._all_http.values():
                http.silent += 1
                silence = self._silence if http.up else max(self._silence, SILENCE)
                if http.silent > silence:
                    http.failure = f"it did nothing for {silence} s"
                    http.child.kill()
            hanging = min((http.hanging for http in self._http), default=0)
            if self._engine is not None and limit is not None and hanging * BEAT_SECONDS > limit:
                self._engine_failure = f"it made no progress for {limit:g} s (server.restart.hang_timeout)"
                self._engine.kill()

    @property
    def _http(self) -> list[Http]:
        """The HTTP processes that are up."""
        return [http for http in self._all_http.values() if http.up]

    def _open_all(self) -> None:
        """Once all HTTP processes have the engine: any of them may get the request that follows a /ready."""
        if len(self._http) < self._options.workers or not all(http.serving for http in self._http):
            return
        for http in self._http:
            http.child.send("open")
        if not self._open:
            seconds = time.monotonic() - self._began
            _log.info(
                "%s is served at %s", self._launch.model, self._launch.address, extra=fields(seconds=round(seconds, 2))
            )
        self._open = True

    # Both

    async def _start(
        self,
        name: str,
        command: Sequence[str],
        start: Mapping[str, Any],
        *,
        arguments: Sequence[str] = (),
        fds: Sequence[int] = (),
    ) -> Child:
        try:
            child = await Child.start(name, command, arguments=arguments, fds=fds)
        except OSError as error:
            raise ServerFailed(f"cannot start the process {name!r}: {error}") from error
        self._children.add(child)
        child.send("start", **start)
        return child

    async def _ended(self, child: Child, failure: str) -> Ended:
        status = await child.status()
        self._children.discard(child)
        return Ended(status, failure or exit_words(status))
