"""`Inbox`: what the step loop's thread reads by itself, between steps and while it has none to make."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress


class Inbox:
    """Sockets that one thread reads, and a bell that wakes it. Any thread adds, removes and rings."""

    def __init__(self) -> None:
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._lock = threading.Lock()  # guards the next two
        self._poll: select.poll | None = None  # None: it does not fit `_reads`
        self._reads: dict[int, Callable[[], None]] = {self._bell.fileno(): self._answer}
        self._rung = self._waits = False

    def add(self, fd: int, read: Callable[[], None]) -> None:
        """Have `read` called whenever `fd` has something, or its other end is closed."""
        with self._lock:
            self._reads[fd], self._poll = read, None
        self.ring()

    def remove(self, fd: int) -> None:
        """No effect where it is not there."""
        with self._lock:
            self._reads.pop(fd, None)
            self._poll = None

    def ring(self) -> None:
        """The next `read`, or the one that waits, returns at once."""
        self._rung = True
        if self._waits:
            with suppress(OSError):  # it is full, so it rings; or closed
                self._rope.send(b"\0")

    def read(self, seconds: float) -> None:
        """Read what has come; where nothing has, wait up to so long for something, or for the bell."""
        poll = self._poll or self._made()
        self._waits = seconds > 0
        found = poll.poll(0 if self._rung else 1000 * seconds)  # `ring` looks at `_waits` after it has set `_rung`
        self._waits = self._rung = False
        for fd, _ in found:
            read = self._reads.get(fd)
            if read is not None:
                read()

    def _made(self) -> select.poll:
        with self._lock:
            poll = self._poll = select.poll()
            for fd in self._reads:
                poll.register(fd, select.POLLIN)
            return poll

    def _answer(self) -> None:
        with suppress(OSError):
            self._bell.recv(4096)

    def close(self) -> None:
        self._bell.close()
        self._rope.close()
