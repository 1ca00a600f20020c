"""What uvicorn's connections leave open: heads without end, half requests, upgrades, HTTP/1.0, pipelines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from nanoengine.server.http_connection import MOST_HEAD, HttpConnection

Use = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]]
KEEP = 0.2  # seconds of timeout_keep_alive, in the tests that wait for it
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


def request(path: str, body: bytes = b"", more: bytes = b"", version: str = "1.1") -> bytes:
    head = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + more + b"\r\n" + body


def served(use: Use, *, keep: float = 60, protocol: type[HttpToolsProtocol] = HttpConnection) -> Any:
    """`use` with a connection to an application: /echo answers the body, /stream in two parts of unknown length, /wait
    when the client has gone."""
    gone = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"] == "/wait":
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            return
        parts = [body] if scope["path"] == "/echo" else [b"one ", b"two"]
        headers = [(b"content-length", str(len(body)).encode())] if scope["path"] == "/echo" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def run() -> Any:
        config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=1)
        config.timeout_keep_alive = keep  # type: ignore[assignment]
        config.load()
        state = ServerState()
        make = lambda: protocol(config, state, {}, asyncio.get_running_loop())  # noqa: E731
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            async with asyncio.timeout(60):
                answer = await use(reader, writer)
                if answer is None:  # it has left
                    await gone.wait()
                return answer
        finally:
            writer.close()
            server.close()

    return asyncio.run(run())


def sent(*parts: bytes) -> Use:
    """Sends the parts, and reads until the connection ends."""

    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        return await reader.read()

    return use


@pytest.mark.parametrize("split", [0, 20, 150, 165])
def test_a_request_that_asks_for_an_upgrade_keeps_its_body(split: int) -> None:
    """Clients of Java ask for h2c with their first request. What follows on the connection is read, too."""
    data = request("/echo", b'{"a": 1}', UPGRADE) + request("/echo", b"next", b"Connection: close\r\n")
    answer = served(sent(data[:split], data[split:]))
    assert b'{"a": 1}' in answer
    assert answer.endswith(b"next")
    assert answer.count(b"200 OK") == 2


def test_a_head_without_end_is_refused() -> None:
    answer = served(sent(b"GET / HTTP/1.1\r\n", *[b"X-Header: %s\r\n" % (b"a" * 8000)] * 9))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert str(MOST_HEAD) in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "head",
    [b"GET /echo HTTP/1.1\r\nA: %s\r\n\r\n", b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /echo HTTP/1.1\r\n%s\r\n"],
    ids=["header", "path", "many headers"],
)
@pytest.mark.parametrize("more", [True, False])
def test_a_complete_head_has_the_same_limit(head: bytes, more: bool) -> None:
    """Also where all of it comes at once, behind another request of the connection."""
    size = MOST_HEAD + 100 if more else MOST_HEAD - 200
    part = b"A: b\r\n" * (size // 6) if b"%s\r\n\r\n" not in head and b"/%s" not in head else b"a" * size

    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(request("/echo", b"first"))
        await reader.readuntil(b"first")
        writer.write(head % part)
        return (await reader.readuntil(b"\r\n")).strip()

    assert served(use) == (b"HTTP/1.1 431 Request Header Fields Too Large" if more else b"HTTP/1.1 200 OK")


def test_a_large_body_is_no_head() -> None:
    body = b"a" * (3 * MOST_HEAD)
    data = request("/echo", body) + request("/echo", body, b"Connection: close\r\n")
    assert served(sent(data)).count(b"200 OK") == 2


@pytest.mark.parametrize(
    "data", [b"", b"\r\n", b"POST /ec", request("/echo", b"whole")[:-2], request("/stream") + b"\r\n"]
)
def test_a_connection_on_which_nothing_comes_is_closed(data: bytes) -> None:
    assert b"whole" not in served(sent(data), keep=KEEP)


def test_an_answer_that_takes_long_is_no_silence() -> None:
    """Half a further request behind it does not close its connection, either."""

    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(request("/wait") + b"POST /ec")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 3 * KEEP)
        return True

    assert served(use, keep=KEEP)


def test_a_stream_over_http_1_0_ends_with_its_connection() -> None:
    head, _, body = served(sent(request("/stream", version="1.0"))).partition(b"\r\n\r\n")
    assert body == b"one two"
    assert b"transfer-encoding" not in head
    assert served(sent(request("/echo", b"abc", version="1.0"))).endswith(b"\r\n\r\nabc")


@pytest.mark.parametrize("more", [0, 1, 3])
def test_a_client_that_leaves_is_seen_also_behind_further_requests(more: int) -> None:
    async def use(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/wait") + request("/echo", b"x") * more)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()

    served(use)


def test_a_connection_of_uvicorn_loses_the_body_of_an_upgrade() -> None:
    """So the tests above see something: without the class here, it is so."""
    data = request("/echo", b'{"a": 1}', UPGRADE + b"Connection: close\r\n")
    assert b'{"a": 1}' not in served(sent(data), protocol=HttpToolsProtocol)
