"""Connections of a socket that several processes listen on: taken one by one, also after an error."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any, cast

import pytest

from nanoengine.server import accepting
from nanoengine.server.accepting import Acceptor
from nanoengine.server.listening import listen

Take = Callable[[socket.socket, Callable[[], asyncio.BaseProtocol]], Any]


class Counted(asyncio.Protocol):
    def __init__(self, taken: list[int], place: int) -> None:
        self.taken, self.place = taken, place

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.taken[self.place] += 1
        cast(asyncio.Transport, transport).write(b"x")


async def acceptors(listener: socket.socket, make: Callable[[], asyncio.BaseProtocol]) -> Acceptor:
    return Acceptor(listener, make)


async def servers(listener: socket.socket, make: Callable[[], asyncio.BaseProtocol]) -> asyncio.Server:
    return await asyncio.get_running_loop().create_server(make, sock=listener)


def shares(take: Take, connections: int = 40) -> list[int]:
    """How many each of two listeners of one socket took of the connections that waited."""

    async def run() -> list[int]:
        taken = [0, 0]
        with listen("127.0.0.1", 0) as first, first.dup() as second:
            clients = [socket.create_connection(first.getsockname()) for _ in range(connections)]
            made = [await take(first, lambda: Counted(taken, 0)), await take(second, lambda: Counted(taken, 1))]
            async with asyncio.timeout(20):
                for client in clients:
                    client.setblocking(False)
                    assert await asyncio.get_running_loop().sock_recv(client, 1) == b"x"
            for each in made:
                each.close()
            for client in clients:
                client.close()
        return taken

    return asyncio.run(run())


def test_connections_that_come_at_once_are_shared() -> None:
    taken = shares(acceptors)
    assert sum(taken) == 40
    assert min(taken) >= 15, taken


def test_a_server_of_asyncio_takes_all_that_wait() -> None:
    assert 0 in shares(servers)


class Scarce:
    """A listening socket that runs out of descriptors twice, and then loses a race."""

    def __init__(self, real: socket.socket) -> None:
        self.real = real
        self.errors: list[OSError] = [BlockingIOError(), *[OSError(errno.EMFILE, "Too many open files")] * 2]

    def accept(self) -> tuple[socket.socket, Any]:
        if self.errors:
            raise self.errors.pop()
        return self.real.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_an_error_pauses_and_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(accepting, "_PAUSE_SECONDS", 0.0)

    async def run() -> bytes:
        taken = [0]
        with listen("127.0.0.1", 0) as listener:
            acceptor = Acceptor(cast(socket.socket, Scarce(listener)), lambda: Counted(taken, 0))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            async with asyncio.timeout(20):
                found = await reader.read(1)
            acceptor.close()
            writer.close()
        return found

    with caplog.at_level(logging.ERROR):
        assert asyncio.run(run()) == b"x"
    assert [record.getMessage() for record in caplog.records] == [
        "no connection is accepted for 0 s: [Errno 24] Too many open files"
    ] * 2
