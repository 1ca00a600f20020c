"""A client of many streams in several processes, and a server that does nothing but send them, to show what it reads.

    python benchmarks/stream_client.py --streams 1000 --rate 120 --clients 4 --servers 4

Each client process has connections that it keeps; on each, one request follows the other. It reads raw HTTP/1.1 and
counts events without parsing them, so that it costs less than the server that it measures. Imports no nanoengine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

_TAIL = 2048  # bytes at the end of an answer that its usage is looked for in
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


@dataclass(slots=True)
class Stream:
    """One request and its answer. Times are of `time.perf_counter`, which all processes of a machine share.

    gap: the longest time between two reads. text: what was received, if it is kept.
    """

    sent: float = 0.0
    first: float = 0.0
    end: float = 0.0
    gap: float = 0.0
    status: int = 0
    events: int = 0
    tokens: int = 0
    done: bool = False
    text: str = ""


class _Connection(asyncio.Protocol):
    def __init__(self, port: int, bodies: Iterator[bytes], *, keep: bool) -> None:
        self._head = b"POST /v1/completions HTTP/1.1\r\nHost: a:%d\r\nContent-Type: application/json\r\n" % port
        self._bodies, self._keep = bodies, keep
        self.streams: list[Stream] = []
        self.idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self) -> None:
        """Send the next request. There is none: the connection has done its work."""
        body = next(self._bodies, None)
        if body is None:
            self.idle.set_result(None)
            return
        self._now, self._tail, self._kept = Stream(sent=time.perf_counter()), b"", [b""]
        self._last = self._now.sent
        self.streams.append(self._now)
        self._transport.write(self._head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def data_received(self, data: bytes) -> None:
        now, stream = time.perf_counter(), self._now
        stream.gap, self._last = max(stream.gap, now - self._last), now
        if not stream.status:
            stream.status = int(data[9:12])
        count = data.count(b"\n\n")
        stream.events += count
        if count and not stream.first:
            stream.first = now
        self._tail = (self._tail + data)[-_TAIL:]
        if self._keep:
            self._kept.append(data)
        if stream.status != 200:
            stream.text = data.decode(errors="replace")
            self._transport.close()  # what this connection had to ask for is not asked
        elif self._tail.endswith(b"\r\n0\r\n\r\n"):
            self._ended(now)

    def _ended(self, now: float) -> None:
        stream = self._now
        stream.end, stream.done = now, b"data: [DONE]\n\n" in self._tail
        found = _TOKENS.findall(self._tail)
        stream.tokens = int(found[-1]) if found else 0
        stream.text = b"".join(self._kept).decode(errors="replace")
        self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.idle.done():
            self.idle.set_result(None)  # the stream that runs stays without `done`

    def close(self) -> None:
        self._transport.abort()


async def _read(spec: Mapping[str, Any], say: Callable[[str], None]) -> list[Stream]:
    loop, bodies = asyncio.get_running_loop(), iter([body.encode() for body in spec["bodies"]])
    made = []
    for _ in range(min(spec["at_once"], len(spec["bodies"]))):
        connection = _Connection(spec["port"], bodies, keep=spec["keep"])
        await loop.create_connection(lambda made=connection: made, "127.0.0.1", spec["port"])  # type: ignore[misc]
        made.append(connection)
    say("ready")
    await loop.run_in_executor(None, sys.stdin.readline)
    for connection in made:
        connection.ask()
    await asyncio.gather(*(connection.idle for connection in made))
    for connection in made:
        connection.close()
    return [stream for connection in made for stream in connection.streams]


def read() -> None:
    """A client process: a specification in the first line of stdin, a line to begin, the streams as JSON on stdout."""
    found = uvloop.run(_read(json.loads(sys.stdin.readline()), lambda text: print(text, flush=True)))
    with open(1, "w", closefd=False) as out:  # unlike print, it writes all where PYTHONUNBUFFERED is set
        json.dump([asdict(stream) for stream in found], out)


class Clients:
    """Client processes that are connected and wait for `begin`."""

    def __init__(
        self, port: int, bodies: Sequence[Mapping[str, Any]], at_once: int, processes: int, *, keep: bool = False
    ) -> None:
        """`at_once`: connections of all processes together."""
        count, texts = min(processes, at_once), [json.dumps(body) for body in bodies]
        self._children = []
        for number in range(count):
            own = {"port": port, "bodies": texts[number::count], "at_once": len(range(number, at_once, count))}
            command = [sys.executable, __file__, "--read"]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._children.append(child)
            print(json.dumps({**own, "keep": keep}), file=child.stdin, flush=True)
        for child in self._children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n", "a client process failed"

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children]

    def begin(self) -> None:
        for child in self._children:
            print(file=child.stdin, flush=True)

    def streams(self) -> list[Stream]:
        """Waits for all of them."""
        texts = [child.communicate()[0] for child in self._children]
        return [Stream(**found) for text in texts for found in json.loads(text)]


CHUNK = (
    b'data: {"id":"cmpl-%s","object":"text_completion","created":1790000000,"model":"stub","choices":[{"index":0,'
    b'"text":" word","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n' % (b"0" * 32)
)
LAST = b'data: {"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n'


async def _send(port: int, tokens: int, rate: float) -> None:
    left: dict[Any, int] = {}

    class Sender(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self._transport = transport

        def data_received(self, data: bytes) -> None:
            self._transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            left[self._transport] = tokens

        def connection_lost(self, error: Exception | None) -> None:
            left.pop(self._transport, None)

    loop, chunk = asyncio.get_running_loop(), b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK)
    last = LAST % tokens
    end = b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last)
    await loop.create_server(Sender, "127.0.0.1", port, reuse_port=True, backlog=4096)
    print("ready", flush=True)
    due = loop.time()
    while True:
        due = max(due + 1 / rate, loop.time() - 1 / rate)
        await asyncio.sleep(max(0.0, due - loop.time()))
        for number, (transport, count) in enumerate(list(left.items())):
            transport.write(chunk)
            left[transport] = count - 1
            if count == 1:
                del left[transport]
                transport.write(end)
            if number % 64 == 63:
                await asyncio.sleep(0)


@contextmanager
def stub(processes: int, tokens: int, rate: float) -> Iterator[int]:
    """Servers that share a port, which this gives."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        command = [sys.executable, __file__, "--send", str(port), str(tokens), str(rate)]
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
        try:
            for child in children:
                assert child.stdout is not None
                assert child.stdout.readline() == "ready\n", "a stub failed"
            yield port
        finally:
            for child in children:
                child.kill()
                child.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What the clients read of the stub. rate: events/s between the first and the last. offered: the most possible."""

    streams: int
    events: int
    rate: float
    offered: float
    seconds: float


def read_stub(streams: int, tokens: int, rate: float, clients: int, servers: int) -> Read:
    """Reads `streams` streams at once, each of `tokens` events, `rate` a second. Every event must come."""
    with stub(servers, tokens, rate) as port:
        running = Clients(port, [{}] * streams, streams, clients)
        running.begin()
        found = running.streams()
    assert all(one.done and one.tokens == tokens for one in found), "a stream is not complete"
    seconds = max(one.end for one in found) - min(one.first for one in found)
    events = sum(one.events for one in found) - 2 * streams  # the usage, and the end
    return Read(streams=streams, events=events, rate=events / seconds, offered=streams * rate, seconds=seconds)


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        read()
        return
    if sys.argv[1:2] == ["--send"]:
        uvloop.run(_send(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=600, help="events of a stream")
    parser.add_argument("--rate", type=float, default=120.0, help="events of a stream a second")
    parser.add_argument("--clients", type=int, default=4, help="processes that read")
    parser.add_argument("--servers", type=int, default=4, help="processes that send")
    print(json.dumps(asdict(read_stub(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
