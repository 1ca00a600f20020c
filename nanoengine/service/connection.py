"""The engine's end of a client's socket: frames in, one frame of deltas a step out."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from nanoengine.api.errors import NanoEngineError, RequestError, described, is_failure
from nanoengine.service.contracts import Batch
from nanoengine.service.delta_frames import deltas_frame
from nanoengine.service.frames import (
    Asked,
    FrameReader,
    Kind,
    ProtocolError,
    error_to_json,
    info_to_json,
    json_frame,
    read_abort,
    read_add,
    read_ask,
    read_json,
    read_usage,
    sent,
)
from nanoengine.service.known_params import KnownParams
from nanoengine.service.local import drained, merged
from nanoengine.service.loop import EngineService
from nanoengine.service.tracing import traced

_MERGE_AT = 4096  # deltas that could not be sent
_MOST_UNSENT = 64 << 20  # bytes of answers that could not be sent
_LATE_SECONDS = 0.5  # that the step loop may take until the event loop's thread does its work
_log = logging.getLogger(__name__)


class Connection:
    """One client in another process. Made and closed in the event loop; the step loop's thread calls the `Output`
    methods, and never waits for the client: what its socket does not take is merged and sent later.

    The step loop's thread reads what comes, between two steps or while it waits for some: beside steps of much host
    work another thread gets the interpreter's lock late, each time that it has given it away, as for every answer. The
    event loop's thread reads where that one has not come to it for `_LATE_SECONDS`, or has ended.
    """

    def __init__(self, service: EngineService, sock: socket.socket, on_end: Callable[[Connection], None]) -> None:
        sock.setblocking(False)
        self._service, self._socket, self._number, self._on_end = service, sock, sock.fileno(), on_end
        self._loop = asyncio.get_running_loop()
        self._taking = threading.Lock()  # guards the next three
        self._reader, self._params = FrameReader(), KnownParams()
        self._taken: list[bytes] = []  # answers to what is being taken: one call sends them all
        self._lock = threading.Lock()  # guards what follows
        self._rest = memoryview(b"")  # of the frame that is being sent
        self._answers = deque[bytes]()
        self._unsent = 0  # bytes of the answers
        self._deltas: Batch = []
        self._closed = False
        self._tasks = set[asyncio.Task[None]]()
        self._send(json_frame(Kind.HELLO, **info_to_json(service.info)))
        self._member = service.join(self)
        service.inbox.add(sock.fileno(), self._receive)
        self._late = self._loop.call_later(_LATE_SECONDS, self._receive_late)

    # The step loop's thread

    def deliver(self, batch: Batch) -> None:
        with self._lock:
            if self._closed:
                return
            if self._rest or self._answers:
                self._deltas += batch
                if len(self._deltas) >= _MERGE_AT:
                    self._deltas = merged(self._deltas)
                return
            self._write(deltas_frame(batch))

    def beat(self) -> None:
        with self._lock:
            if not self._closed and not self._rest and not self._answers:
                self._write(json_frame(Kind.BEAT, draining=self._service.is_draining))

    def ended(self, cause: BaseException | None, batch: Batch) -> None:
        """Requests that a worker's failure ended are not reported: the client continues them in another engine."""
        news = [
            (key, d) for key, d in batch if not isinstance(d.error, RequestError) or d.error.code != "worker_failed"
        ]
        if news:
            self.deliver(news)
        self._send(json_frame(Kind.ENDED, cause=str(self._service.unavailable())))

    # Any thread

    def _send(self, data: bytes) -> None:
        with self._lock:
            if self._closed:
                return
            if not self._rest and not self._answers:
                self._write(data)
                return
            self._answers.append(data)
            self._unsent += len(data)
            if self._unsent > _MOST_UNSENT:
                self._loop.call_soon_threadsafe(self.close, f"it has not taken {self._unsent} bytes of answers")

    def _write(self, data: bytes | memoryview) -> None:
        """Send what the socket takes; the event loop sends the rest. With the lock held."""
        try:
            count = sent(self._socket, data)
        except OSError:  # the client is gone; what is left of the frame goes nowhere
            self._loop.call_soon_threadsafe(self.close, None)
            return
        self._rest = memoryview(data)[count:]
        if self._rest:
            self._loop.call_soon_threadsafe(self._wait_for_room)

    def _receive(self) -> None:
        """Take what has come. No effect while another thread does so, or where the connection is closed."""
        if not self._taking.acquire(blocking=False):
            return
        why = None
        try:
            data = self._received()
            for kind, content in self._reader.feed(data or b""):
                self._take(kind, content)
        except ProtocolError as error:
            why = f"it sent {error}"
        except BaseException as error:
            if not is_failure(error):
                raise
            _log.exception("reading a frame raised %s", described(error))
            why = f"its frame raised {described(error)}"
        finally:
            taken, self._taken = self._taken, []
            self._taking.release()
        if taken:
            self._send(b"".join(taken))
        if why is not None or data == b"":
            self._service.inbox.remove(self._number)
            self._loop.call_soon_threadsafe(self.close, why)

    def _received(self) -> bytes | None:
        """b"": the client is gone. None: nothing came."""
        try:
            return None if self._closed else self._reader.receive(self._socket)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""

    def _take(self, kind: Kind, content: bytes) -> None:
        if kind is Kind.ADD:
            self._add(content)
        elif kind is Kind.ABORT:
            key, sample = read_abort(read_json(content))
            with suppress(NanoEngineError):  # a sample that the request does not have
                self._member.abort(key, sample)
        elif kind is Kind.COUNT:
            self._service.count(read_usage(read_json(content)))
        elif kind is Kind.ASK:
            self._loop.call_soon_threadsafe(self._asked, read_ask(read_json(content)))
        else:
            raise ProtocolError(f"a frame of kind {kind.name}, which clients do not send")

    def _add(self, content: bytes) -> None:
        added = read_add(content, self._params.of)
        if added.key in self._member.open:
            raise ProtocolError(f"a request with the key {added.key} of another one")
        try:
            if added.wrong is not None or added.request is None:
                raise added.wrong or ProtocolError("a request without content")
            self._member.add(added.key, added.request, resumed=added.resumed)
        except BaseException as error:
            if not is_failure(error):
                raise
            if not isinstance(error, NanoEngineError):
                _log.exception("adding a request raised %s", described(error))
            self._taken.append(json_frame(Kind.TAKEN, key=added.key, error=error_to_json(error)))
        else:
            self._taken.append(json_frame(Kind.TAKEN, key=added.key, error=None))

    # The event loop

    def _receive_late(self) -> None:
        """The step loop's thread may hang in a step, or have ended."""
        if time.monotonic() - self._service.turned_at > _LATE_SECONDS or not self._service.is_alive:
            self._receive()
        self._late = self._loop.call_later(_LATE_SECONDS, self._receive_late)

    def _wait_for_room(self) -> None:
        if not self._closed:
            self._loop.add_writer(self._socket.fileno(), self._writable)

    def _writable(self) -> None:
        with self._lock:
            self._loop.remove_writer(self._socket.fileno())
            if self._rest:
                self._write(self._rest)
            while not self._rest and (self._answers or self._deltas):
                if self._answers:
                    data = self._answers.popleft()
                    self._unsent -= len(data)
                else:
                    batch, self._deltas = merged(self._deltas), []
                    data = deltas_frame(batch)
                self._write(data)

    def _asked(self, asked: Asked) -> None:
        task = self._loop.create_task(self._answer(asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, asked: Asked) -> None:
        value, error = None, None
        try:
            value = await self._value(asked)
        except BaseException as raised:
            if not is_failure(raised):
                raise
            if not isinstance(raised, NanoEngineError):
                _log.exception("answering a client raised %s", described(raised))
            error = raised
        self._send(json_frame(Kind.ANSWER, id=asked.number, value=value, error=error_to_json(error)))

    async def _value(self, asked: Asked) -> Any:
        """Raises what `EngineClient` raises."""
        if asked.what == "stats":
            return asdict(self._service.stats())
        if asked.what == "metrics":
            return (await asyncio.to_thread(self._service.metrics)).decode()
        if asked.what == "abort":
            return self._service.abort(asked.of)
        if asked.what == "trace":
            return (await asyncio.to_thread(traced, self._service, asked.of)).decode()
        return await drained(self._service, asked.of)

    def close(self, why: str | None) -> None:
        """The client is gone, or (`why`) is sent away: its requests are aborted. Idempotent."""
        with self._taking, self._lock:  # nothing may be added behind `leave`
            if self._closed:
                return
            self._closed = True
            self._answers.clear()
            self._deltas, self._rest = [], memoryview(b"")
        self._late.cancel()
        if why is not None:
            _log.warning("the connection to a client is closed: %s", why)
        self._service.inbox.remove(self._number)
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._member.leave()
        self._on_end(self)
