"""Communication between the engine and one rank: small frames over a Unix socket pair, and anonymous memory.

A frame only wakes the other end up, or has a number. Larger data is sent as a *parcel*: anonymous memory whose
descriptor is sent with the frame, so that no side waits for the other to make room. An end of file means that the other
end is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

STACK_SIGNAL = signal.SIGURG
"""Makes a rank write its stacks. Not SIGUSR1, which LLVM takes when Triton compiles its first kernel, and which ends a
rank whose Python does not listen yet."""
_FRAME = struct.Struct("=iiq")


class Kind(IntEnum):
    """The kind of a frame. `number` is the number of a step, except where a comment says something else."""

    START = 1  # parcel: a pickled `StartMessage`
    PORT = 2  # number: the port of rank 0's rendezvous
    READY = 3  # parcel: a pickled `MemoryReport`
    PLAN = 4  # plans up to this number are in the ring; parcel: this plan, if it is too large for the ring
    RESULT = 5  # the result of this step is in the ring; parcel: the result, if it is too large for the ring
    CALL = 6  # parcel: pickled (name, args)
    ANSWER = 7  # parcel: the pickled return value
    FAILED = 8  # parcel: a pickled `Report`
    STOP = 9
    SHORT = 10  # a rank ran out of memory in this step; parcel: the error as UTF-8
    COLUMNS = (
        11  # the columns of this late plan are in the ring; parcel: the columns, if they are too large for the ring
    )


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    number: int
    parcel: bytearray | None


class Parcel:
    """Bytes in memory without a name, which is freed when its last descriptor is closed."""

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
    """A descriptor of `size` zero bytes of memory without a name. `label` is visible only in /proc."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(label)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def read_all(fd: int) -> bytearray:
    """The whole content of the file. Its current offset is not used and not changed."""
    data = bytearray(os.fstat(fd).st_size)
    view, done = memoryview(data), 0
    while done < len(data):
        count = os.preadv(fd, [view[done:]], done)
        if not count:
            raise OSError("a parcel became shorter while it was read")
        done += count
    return data


class Channel:
    """One end of the socket pair. Threads that send at the same time need a lock."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """The engine's end, and the socket of the other end, which the rank inherits."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(here), there

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: Kind, number: int = 0, parcel: Parcel | None = None) -> None:
        """Sends a frame. Raises `OSError` (usually `BrokenPipeError`) if the other end is gone."""
        frame = _FRAME.pack(kind, parcel is not None, number)
        fds = [] if parcel is None else [parcel.fd]
        sent = socket.send_fds(self._socket, [frame], fds) if fds else self._socket.send(frame)
        if sent < len(frame):
            self._socket.sendall(frame[sent:])

    def receive(self) -> Frame | None:
        """Waits for the next frame. None: the other end is gone."""
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
