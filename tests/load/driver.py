"""A client of many streams in one event loop: raw HTTP/1.1, so that it costs less than the server that it loads."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Streamed:
    """What came of a stream."""

    status: int = 0
    chunks: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: Mapping[str, Any] | None = None
    done: bool = False
    error: Any = None

    def add(self, event: Mapping[str, Any]) -> None:
        self.chunks += 1
        self.error = event.get("error", self.error)
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            self.texts[choice["index"]] = self.texts.get(choice["index"], "") + text
            if choice["finish_reason"]:
                assert choice["index"] not in self.reasons, "a second finish_reason"
                self.reasons[choice["index"]] = choice["finish_reason"]


class Connection:
    """Requests one after the other over a connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, path: str, body: Any = None) -> tuple[int, dict[str, str]]:
        """Sends a request; the status and the headers of its answer, whose body is to be read."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        kind = f"host: test\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        self._writer.write(f"{method} {path} HTTP/1.1\r\n{kind}\r\n\r\n".encode() + data)
        await self._writer.drain()
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
        return int(lines[0].split()[1]), headers

    async def body(self, headers: Mapping[str, str]) -> bytes:
        if "content-length" in headers:
            return await self._reader.readexactly(int(headers["content-length"]))
        return b"".join([part async for part in self.parts()])

    async def ask(self, path: str, body: Any = None) -> tuple[int, bytes]:
        status, headers = await self.send(path, body)
        return status, await self.body(headers)

    async def parts(self) -> AsyncIterator[bytes]:
        """Of a chunked body, as the server sent them."""
        while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readuntil(b"\r\n")


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


async def stream(port: int, path: str, body: Mapping[str, Any], *, leave_after: int = 0) -> Streamed:
    """One stream. `leave_after`: the connection is closed after so many chunks; 0: it is read to its end."""
    found, rest = Streamed(), b""
    async with connected(port) as connection:
        found.status, headers = await connection.send(path, {**body, "stream": True})
        if found.status != 200:
            found.error = await connection.body(headers)
            return found
        async for part in connection.parts():
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: "):
                    assert event.startswith(b":"), event  # a ping
                    continue
                assert not found.done, "an event behind [DONE]"
                found.done = event == b"data: [DONE]"
                if not found.done:
                    found.add(json.loads(event[6:]))
                if leave_after and found.chunks >= leave_after:
                    return found
    assert not rest
    return found


def run(work: Any) -> Any:
    """Runs a coroutine on uvloop."""
    import uvloop

    return uvloop.run(work)


def rss(pid: int) -> int:
    """Bytes of a process's memory that no other process has, too."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Private_"))


def cpu_seconds(pid: int) -> float:
    """Of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
