"""What the supervisor and one of its processes send each other: JSON objects, a line each, some with a descriptor.

The socket is there from the process's start. When the supervisor ends, in whatever way, the process reads an end of
file and ends too; when the process ends, the supervisor reads one.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_PR_SET_PDEATHSIG = 1
BEAT_SECONDS = 1.0
"""How often a process says that it lives, where it is asked to."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `fd`: the descriptor that came with it, which the reader owns."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    fd: int | None = None


class Control:
    """One end of the socket pair, for one event loop, in which all of it is called."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket, self._data, self._fds = sock, b"", list[int]()
        self._waiter: asyncio.Future[None] | None = None  # of `receive`
        self._unsent = deque[tuple[bytes, int | None]]()  # (rest of a line, its descriptor)

    @classmethod
    def pair(cls) -> tuple[Control, socket.socket]:
        """The supervisor's end, and the socket of the other end, which the process inherits."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(here), there

    def send(self, kind: str, /, fd: int | None = None, **fields: Any) -> None:
        """Sends a message, without waiting; `fd` may be closed then. Raises `OSError` if the other end is gone."""
        line = json.dumps({"kind": kind, "fd": fd is not None, "fields": fields}).encode() + b"\n"
        self._unsent.append((line, None if fd is None else os.dup(fd)))
        if len(self._unsent) == 1:
            try:
                self._flush()
            except OSError:
                self._drop_unsent()
                raise

    def _flush(self) -> None:
        """Raises `OSError` if the other end is gone."""
        while self._unsent:
            line, fd = self._unsent[0]
            try:
                sent = socket.send_fds(self._socket, [line], [] if fd is None else [fd])
            except BlockingIOError:
                asyncio.get_running_loop().add_writer(self._socket.fileno(), self._go_on)
                return
            if fd is not None:
                os.close(fd)
            self._unsent[0] = (line[sent:], None)
            if sent == len(line):
                self._unsent.popleft()

    def _go_on(self) -> None:
        asyncio.get_running_loop().remove_writer(self._socket.fileno())
        try:
            self._flush()
        except OSError:
            self._drop()  # `receive` says that the other end is gone

    def _drop(self) -> None:
        fds, self._fds = self._fds, []
        for each in fds:
            os.close(each)
        self._drop_unsent()

    def _drop_unsent(self) -> None:
        while self._unsent:
            fd = self._unsent.popleft()[1]
            if fd is not None:
                os.close(fd)

    async def receive(self) -> Message | None:
        """The next message. None: the other end is gone."""
        while b"\n" not in self._data:
            await self._readable()
            if self._socket.fileno() < 0:
                return None
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 16)
            except ConnectionResetError:
                data, fds = b"", []
            for each in fds:
                os.set_inheritable(each, False)
            self._fds += fds
            if not data:
                self.close()
                return None
            self._data += data
        line, _, self._data = self._data.partition(b"\n")
        found = json.loads(line)
        return Message(found["kind"], found["fields"], self._fds.pop(0) if found["fd"] else None)

    async def _readable(self) -> None:
        loop, number = asyncio.get_running_loop(), self._socket.fileno()
        if number < 0:
            raise ConnectionResetError("the control socket is closed")
        self._waiter = loop.create_future()
        loop.add_reader(number, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._socket.fileno() >= 0:
                loop.remove_reader(number)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Idempotent. The other end reads an end of file; a `receive` that waits returns None."""
        if self._socket.fileno() >= 0 and (self._unsent or self._waiter is not None):
            loop = asyncio.get_running_loop()
            loop.remove_writer(self._socket.fileno())
            loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._wake()
        self._drop()


def inherit(number: int, *, tied: bool = True) -> Control:
    """The process's end, from the descriptor that it was started with.

    The process is prepared to live under the supervisor: Ctrl-C and SIGTERM are the supervisor's to handle, also where
    they are sent to all processes of a terminal or of a service; and with `tied` the kernel kills the process when the
    thread that started it ends, even if the process is stopped.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.set_inheritable(number, False)
    if tied and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the line above
            os.kill(os.getpid(), signal.SIGKILL)
    return Control(socket.socket(fileno=number))
