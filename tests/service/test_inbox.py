"""`Inbox`: one thread waits, the others wake it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from nanoengine.service.inbox import Inbox

LONG = 600.0  # seconds that a test never waits


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    made = Inbox()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def woken(inbox: Inbox, wake: Callable[[], object]) -> None:
    """`wake` while a thread waits in `read`, or is about to: it must return."""
    thread = threading.Thread(target=inbox.read, args=(LONG,))
    thread.start()
    wake()
    thread.join(60)
    assert not thread.is_alive()


def test_it_rings_before_and_during_a_wait(inbox: Inbox) -> None:
    inbox.ring()
    inbox.read(LONG)
    for _ in range(200):
        woken(inbox, inbox.ring)
    for _ in range(100_000):  # more than the pair of sockets holds
        inbox._waits = True
        inbox.ring()
    inbox.read(LONG)


def test_it_reads_what_came_and_where_an_end_is_closed(inbox: Inbox, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    found = list[bytes]()
    inbox.add(ours.fileno(), lambda: found.append(ours.recv(100)))
    inbox.read(LONG)  # it rang
    woken(inbox, lambda: theirs.send(b"a"))
    inbox.read(0.0)
    theirs.close()
    inbox.read(LONG)
    assert found == [b"a", b""]


def test_what_is_added_during_a_wait_is_read_and_what_is_removed_is_not(
    inbox: Inbox, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    found = list[bytes]()
    theirs.send(b"a")
    woken(inbox, lambda: inbox.add(ours.fileno(), lambda: found.append(ours.recv(100))))
    inbox.read(0.0)
    assert found == [b"a"]
    theirs.send(b"b")
    inbox.remove(ours.fileno())
    inbox.remove(ours.fileno())
    inbox.read(0.0)
    assert found == [b"a"]


def test_a_file_that_is_closed_and_not_removed_yet_is_left_alone(inbox: Inbox) -> None:
    ours, theirs = socket.socketpair()
    calls = list[int]()
    inbox.add(ours.fileno(), lambda: calls.append(1))
    ours.close()
    theirs.close()
    inbox.read(0.0)
    inbox.read(0.0)
    assert len(calls) <= 2  # its reader finds it closed


def test_it_rings_after_its_end() -> None:
    inbox = Inbox()
    inbox.close()
    inbox._waits = True
    inbox.ring()
