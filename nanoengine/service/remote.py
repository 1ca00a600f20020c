"""`RemoteClient`: the engine runs in another process, at the other end of a socket, and can be replaced."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

from nanoengine.api.errors import EngineUnavailable, NanoEngineError, RequestError
from nanoengine.service.client import ClientRequest, EngineInfo, Health, RequestStream, ServiceStats, Usage
from nanoengine.service.delta_frames import read_deltas
from nanoengine.service.frames import (
    FrameReader,
    Kind,
    ProtocolError,
    add_frame,
    error_from_json,
    info_from_json,
    json_frame,
    read_json,
    sent,
    stats_from_json,
    usage_frame,
)
from nanoengine.service.local import HEALTH_DEADLINE, health_of
from nanoengine.service.resume import OpenStream
from nanoengine.service.trials import Trials

RESUME_SECONDS = 300.0
_MOST_UNSENT = 256 << 20
_log = logging.getLogger(__name__)


class RemoteClient:
    """An `EngineClient` for the event loop that runs when it is made. Until `connect` it has no engine.

    When its engine ends, its open streams wait for `connect` with a socket of another engine of the same model: each
    request is added again behind the tokens that it has, and its stream goes on.
    """

    def __init__(self, *, health_deadline: float = HEALTH_DEADLINE, resume_seconds: float = RESUME_SECONDS) -> None:
        """`health_deadline`: seconds without a sign of the engine after which it counts as hanging. `resume_seconds`:
        after which streams fail whose engine has ended and that no other has taken over; 0: at once."""
        self._deadline, self._resume_seconds = health_deadline, resume_seconds
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._socket: socket.socket | None = None
        self._reader = FrameReader()
        self._unsent = bytearray()
        self._info: EngineInfo | None = None
        self._ready = asyncio.Event()  # there is an engine, and its info
        self._ready_or_never = asyncio.Event()
        self._heard = time.monotonic()
        self._draining = self._closed = False
        self._why = "the engine has not started yet"
        self._open: dict[int, OpenStream] = {}
        self._ids: dict[int, str] = {}  # the same, the request's id
        self._keys, self._numbers = itertools.count(), itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._giving_up: asyncio.TimerHandle | None = None
        self._trials = Trials(self._go_on, self._settled)

    # The connection

    def connect(self, sock: socket.socket) -> None:
        """Use the engine at the other end, which this client owns from now on. Open streams go on there."""
        self._leave("another engine takes its place")
        self._stop_giving_up()
        if self._closed:
            sock.close()
            return
        sock.setblocking(False)
        self._socket, self._reader, self._heard = sock, FrameReader(), time.monotonic()
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, on which an engine may answer."""
        return self._socket is not None

    async def ready(self) -> EngineInfo:
        """Waits until an engine is there. Raises `EngineUnavailable` where none will come."""
        await self._ready_or_never.wait()
        if not self._ready.is_set():
            raise self._unavailable()
        return self.info

    def fail(self, why: str) -> None:
        """There will be no other engine: all open streams fail, and so does what is asked for from now on."""
        self._leave(why)
        self._give_up()
        self._ready_or_never.set()

    @property
    def info(self) -> EngineInfo:
        """Raises `EngineUnavailable` before the first engine is ready."""
        if self._info is None:
            raise self._unavailable()
        return self._info

    @property
    def health(self) -> Health:
        age = time.monotonic() - self._heard
        if not self._ready.is_set():
            return Health(alive=False, ready=False, draining=self._draining, since_progress=age, reason=self._why)
        if age > self._deadline and self._has_data():  # this event loop was held up, not the engine
            age = 0.0
        return health_of(age, self._deadline, draining=self._draining)

    def _has_data(self) -> bool:
        """Whether the engine has sent something that is not read yet."""
        assert self._socket is not None
        with suppress(OSError):
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        return False

    def _unavailable(self) -> EngineUnavailable:
        return EngineUnavailable(self._why, retry_after=None if self._closed else 2.0)

    def _leave(self, why: str) -> None:
        """The connection is over."""
        self._why = why
        self._trials.stop()
        self._ready.clear()
        self._ready_or_never.clear()
        if self._socket is None:
            return
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self._unsent.clear()
        asked, self._asked = self._asked, {}
        for future in asked.values():
            if not future.done():
                future.set_exception(self._unavailable())

    def _lost(self, why: str) -> None:
        """The engine is gone. Streams wait for another one, for a while."""
        self._leave(why)
        if self._resume_seconds:
            self._stop_giving_up()
            self._giving_up = self._loop.call_later(self._resume_seconds, self._give_up)
        else:
            self._give_up()
            self._ready_or_never.set()

    def _stop_giving_up(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def _give_up(self) -> None:
        self._stop_giving_up()
        for key in list(self._open):
            self._fail(key, self._unavailable())

    def _fail(self, key: int, error: NanoEngineError) -> None:
        entry = self._forget(key)
        if entry is not None:
            entry.fail(error)

    def _forget(self, key: int) -> OpenStream | None:
        self._ids.pop(key, None)
        return self._open.pop(key, None)

    # Requests

    async def add(self, request: ClientRequest) -> RequestStream:
        if not self._ready.is_set():
            raise self._unavailable()
        key, entry = next(self._keys), OpenStream(request, self._loop.create_future())
        self._send(add_frame(key, request))
        self._open[key], self._ids[key] = entry, request.request_id
        try:
            await entry.taken
        except BaseException:
            self._abort(key, None)
            raise
        return RequestStream(request.request_id, entry.box, partial(self._abort, key))

    def _abort(self, key: int, sample: int | None) -> None:
        if self._loop.is_closed():
            if self._socket is not None:
                self._socket.close()  # by which the engine sees that all of this client's readers are gone
            return
        if threading.get_ident() != self._thread:  # a stream that was dropped may be collected by any thread
            with suppress(RuntimeError):  # it was closed just now
                self._loop.call_soon_threadsafe(self._abort, key, sample)
            return
        entry = self._open.get(key)
        if entry is None:
            return
        if sample is None:
            self._forget(key)
        else:
            entry.ended.add(sample)
        if self._socket is not None:
            self._send(json_frame(Kind.ABORT, key=key, sample=sample))

    def _resume(self) -> None:
        """Add the open requests to the engine that has just come."""
        doubtful = {key for key, entry in self._open.items() if entry.is_doubtful}
        for key in [key for key in self._open if key not in doubtful]:
            self._go_on(key)
        self._trials.begin(doubtful)

    def _go_on(self, key: int) -> None:
        """Add an open request to another engine than it was in."""
        entry = self._open[key]
        try:
            request = entry.resumed(time.monotonic())
            if request is None:
                self._forget(key)
                return
            self._send(add_frame(key, request, resumed=True))
        except RequestError as error:
            self._fail(key, error)
            return
        for sample in sorted(entry.ended):
            self._send(json_frame(Kind.ABORT, key=key, sample=sample))

    def _settled(self, key: int) -> bool:
        return key not in self._open or not self._open[key].is_doubtful

    # What is asked for

    async def abort(self, request_id: str) -> int:
        return int(await self._ask("abort", request_id))

    async def stats(self) -> ServiceStats:
        return stats_from_json(await self._ask("stats"))

    async def metrics(self) -> bytes:
        return str(await self._ask("metrics")).encode()

    async def trace(self, seconds: float) -> bytes:
        return str(await self._ask("trace", seconds, wait=seconds)).encode()

    async def drain(self, seconds: float) -> bool:
        self._draining |= self._ready.is_set()
        return bool(await self._ask("drain", seconds, wait=seconds))

    async def count(self, usage: Usage) -> None:
        if self._socket is not None:
            self._send(usage_frame(usage))

    async def _ask(self, what: str, of: Any = None, *, wait: float = 0.0) -> Any:
        """The answer. `wait`: seconds that it takes. Raises `EngineUnavailable` where it does not come in time."""
        if not self._ready.is_set():
            raise self._unavailable()
        number = next(self._numbers)
        future = self._asked[number] = self._loop.create_future()
        try:
            self._send(json_frame(Kind.ASK, id=number, what=what, of=of))
            return await asyncio.wait_for(future, wait + self._deadline)
        except TimeoutError:
            raise EngineUnavailable(f"the engine did not answer within {self._deadline:g} seconds", 5.0) from None
        finally:
            self._asked.pop(number, None)

    async def close(self, why: str = "the client was closed") -> None:
        """Leave the engine, which aborts this client's requests. `why`: what they end with."""
        self._closed = True
        self.fail(why)

    # Frames

    def _send(self, data: bytes) -> None:
        """Raises `EngineUnavailable` where the engine has not read much of what it was sent."""
        if self._socket is None:
            return  # its streams are added to the next engine
        if len(self._unsent) > _MOST_UNSENT:
            raise EngineUnavailable("the engine does not read what it is sent", retry_after=5.0)
        if not self._unsent:
            try:
                data = data[sent(self._socket, data) :]
            except OSError as error:
                self._loop.call_soon(self._check_end, self._socket, str(error))
                return
        if data:
            self._unsent += data
            self._loop.add_writer(self._socket.fileno(), self._writable)

    def _check_end(self, sock: socket.socket, why: str) -> None:
        if self._socket is sock:
            self._lost(f"the connection to the engine broke: {why}")

    def _writable(self) -> None:
        assert self._socket is not None
        try:
            del self._unsent[: sent(self._socket, self._unsent)]
        except OSError as error:
            self._lost(f"the connection to the engine broke: {error}")
            return
        if not self._unsent:
            self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        sock = self._socket
        assert sock is not None
        try:
            data = self._reader.receive(sock)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._lost("the engine's process has ended" if self._ready.is_set() else self._why)
            return
        self._heard = time.monotonic()
        try:
            for kind, content in self._reader.feed(data):
                self._take(kind, content)
                if self._socket is not sock:
                    return
            self._trials.check()
        except ProtocolError as error:
            self._lost(f"the engine sent {error}")

    def _take(self, kind: Kind, content: bytes) -> None:
        if kind is Kind.DELTAS:
            opened = self._open
            for key, delta in read_deltas(content, self._ids):
                entry = opened[key]
                if entry.take(delta):
                    self._forget(key)
            return
        found = read_json(content)
        if kind is Kind.BEAT:
            self._draining |= found["draining"]
        elif kind is Kind.TAKEN:
            self._taken(found)
        elif kind is Kind.ANSWER:
            self._answered(found)
        elif kind is Kind.HELLO:
            self._info = info_from_json(found)
            self._ready.set()
            self._ready_or_never.set()
            if self._draining:  # what was asked of the engine before holds for this one
                self._send(json_frame(Kind.ASK, id=next(self._numbers), what="drain", of=0.0))
            self._resume()
        elif kind is Kind.ENDED:
            self._lost(found["cause"])

    def _taken(self, found: dict[str, Any]) -> None:
        entry = self._open.get(found["key"])
        if entry is None:
            return
        error = error_from_json(found["error"])
        if error is not None:
            self._fail(found["key"], error)
        elif not entry.taken.done():
            entry.taken.set_result(None)

    def _answered(self, found: dict[str, Any]) -> None:
        future = self._asked.pop(found["id"], None)
        if future is None or future.done():
            return
        error = error_from_json(found["error"])
        if error is None:
            future.set_result(found["value"])
        else:
            future.set_exception(error)
