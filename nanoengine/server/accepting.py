"""Connections of a socket on which several processes listen, taken one by one."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

_log = logging.getLogger(__name__)
_PAUSE_SECONDS = 1.0  # after an error that is likely to come again at once: no file descriptors are left, say


class Acceptor:
    """Takes one connection each time the event loop finds the socket readable.

    The servers of asyncio and uvloop take all that wait: of a thousand connections that come at once, one process
    got most and the others few. With one at a time, a process that is busy leaves the next one to the others.

    Args:
        listener: the listening socket. It is made non-blocking; to close it is the caller's.
        make_protocol: for each connection, as `loop.create_server` takes it.
    """

    def __init__(self, listener: socket.socket, make_protocol: Callable[[], asyncio.BaseProtocol]) -> None:
        self._listener, self._make = listener, make_protocol
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[object]] = set()  # the loop alone would not keep them
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Takes no more connections; those that are open stay."""
        self._loop.remove_reader(self._listener)
        if self._pause is not None:
            self._pause.cancel()

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another process was quicker, or the client has left
        except OSError as error:
            _log.error("no connection is accepted for %.0f s: %s", _PAUSE_SECONDS, error)
            self._loop.remove_reader(self._listener)
            self._pause = self._loop.call_later(_PAUSE_SECONDS, self._resume)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, connection)
        except OSError as error:  # the client has left in between
            _log.debug("a connection ended before it was open: %s", error)
            connection.close()
