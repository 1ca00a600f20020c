"""How an engine and one of its ranks speak: tiny frames over a Unix socket pair, and memory without a name.

A frame is a doorbell or a control word. What is larger goes as a *parcel*: anonymous memory whose descriptor travels
with the frame, so that nobody ever waits for the other end to make room. The end of the file is the death of the other.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

_FRAME = struct.Struct("=iiq")


class Kind(IntEnum):
    """Of a frame. `number` means a step's number, or what is said here."""

    START = 1  # parcel: a pickled `StartMessage`
    PORT = 2  # number: the port of rank 0's rendezvous
    READY = 3  # parcel: a pickled `MemoryReport`
    PLAN = 4  # plans up to this number are in the ring; a parcel, where this one did not fit in
    RESULT = 5  # likewise, of results
    CALL = 6  # parcel: pickled (name, args)
    ANSWER = 7  # parcel: the pickled answer
    FAILED = 8  # parcel: a pickled `Report`
    STOP = 9


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    number: int
    parcel: bytearray | None


class Parcel:
    """Bytes in memory that has no name and ends with its last descriptor."""

    def __init__(self, data: bytes) -> None:
        self.fd = anonymous_memory("nanoengine-parcel", len(data))
        view = memoryview(data)
        while view:
            view = view[os.pwrite(self.fd, view, len(data) - len(view)) :]

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Parcel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def anonymous_memory(label: str, size: int) -> int:
    """A descriptor of `size` zero bytes that no name leads to. `label` shows in /proc only."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(label)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def read_all(fd: int) -> bytearray:
    """All that the file holds, from its beginning, wherever its offset stands."""
    data = bytearray(os.fstat(fd).st_size)
    view, done = memoryview(data), 0
    while done < len(data):
        count = os.preadv(fd, [view[done:]], done)
        if not count:
            raise OSError("a parcel became shorter while it was read")
        done += count
    return data


class Channel:
    """One end. Sending from several threads at once needs a lock of theirs."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """The engine's end, and the socket of the other one, to be inherited."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(here), there

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: Kind, number: int = 0, parcel: Parcel | None = None) -> None:
        """Raises `OSError` (a `BrokenPipeError`, mostly) if the other end is gone."""
        frame = _FRAME.pack(kind, parcel is not None, number)
        fds = [] if parcel is None else [parcel.fd]
        sent = socket.send_fds(self._socket, [frame], fds) if fds else self._socket.send(frame)
        if sent < len(frame):
            self._socket.sendall(frame[sent:])

    def receive(self) -> Frame | None:
        """The next frame, waited for; None: the other end is gone."""
        data, fds = b"", list[int]()
        while len(data) < _FRAME.size:
            try:
                more, found, _, _ = socket.recv_fds(self._socket, _FRAME.size - len(data), 1)
            except ConnectionResetError:
                more, found = b"", []
            fds += found
            data += more
            if not more:
                _close(fds)
                return None
        kind, has_parcel, number = _FRAME.unpack(data)
        try:
            return Frame(Kind(kind), number, read_all(fds[0]) if has_parcel else None)
        finally:
            _close(fds)

    def close(self) -> None:
        self._socket.close()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
