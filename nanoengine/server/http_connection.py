"""One connection of a client, where uvicorn's own class leaves something open.

| | uvicorn | here |
|---|---|---|
| a head of more than 64 KB, also without end | is kept, whatever its size | 431 |
| nothing, or half a request, is sent | is kept for ever | closed `timeout_keep_alive` seconds after the last byte |
| `Upgrade`, such as to h2c, which Java's client asks for | the body is lost | it is a request as any other |
| HTTP/1.0 and a stream | chunks, which HTTP/1.0 does not know | the end is that of the connection |
| a client that sent a further request and left | the first one runs on | it is aborted |
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_HEAD = 1 << 16  # bytes of a request's first line and headers
_MOST_WAITING = 16  # further requests of a connection; then it is not read until one has ended


class _TooLong(Exception):
    """A head has more than `MOST_HEAD` bytes."""


class HttpConnection(HttpToolsProtocol):
    """See the table above."""

    _in_head = False  # one has begun and not ended
    _head = 0  # bytes since the head of a request began, or since a request ended

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._cycles: list[RequestResponseCycle] = []  # whose answers are not complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_data()

    def connection_lost(self, exc: Exception | None) -> None:
        for cycle in self._open_cycles():
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._head += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _TooLong):
                self._refuse_head()
            else:
                self._refuse("400 Bad Request", "this is no HTTP request")
            return
        if self.transport.is_closing():
            return
        if self._in_head and self._head > MOST_HEAD:
            self._refuse_head()
        else:
            self._expect_data()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # `data_received` goes on without that
            return
        size = len(self.url) + sum(
            len(name) + len(value) + 4 for name, value in self.headers
        )  # ": " and the line's end
        if size > MOST_HEAD:
            raise _TooLong
        super().on_headers_complete()
        self._in_head = False
        self._cycles = [*self._open_cycles(), self.cycle]
        if self.scope["http_version"] == "1.0":
            _without_chunks(self.cycle)
        if 0 < len(self.pipeline) <= _MOST_WAITING:
            self.flow.resume_reading()  # or the end of the connection would not be seen

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._head = 0
        super().on_message_complete()

    def _open_cycles(self) -> list[RequestResponseCycle]:
        return [cycle for cycle in self._cycles if not cycle.response_complete]

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self._expect_data()

    def _expect_data(self) -> None:
        """The connection is closed if nothing comes, unless an answer is on its way."""
        if not all(cycle.more_body for cycle in self._open_cycles()):
            return
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _go_on(self, rest: bytes) -> None:
        """Reads a request again without its `Upgrade`. rest: what is behind its head."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse("405 Method Not Allowed", "this is no proxy")
            return
        kept = [(name, value) for name, value in self.headers if name != b"upgrade"]
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (method, self.url, version), *(b"%s: %s" % each for each in kept), b"", rest]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(lines))

    def _refuse_head(self) -> None:
        self._refuse("431 Request Header Fields Too Large", f"the headers have more than {MOST_HEAD} bytes")

    def _refuse(self, status: str, message: str) -> None:
        """What does not come as far as the application; the connection ends."""
        body = f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null,"code":"bad_request"}}}}'
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
        self.transport.close()


def _without_chunks(cycle: RequestResponseCycle) -> None:
    """Where its length is not known before, the body of the answer ends with the connection."""
    send = cycle.send

    async def plain(message: Any) -> None:
        if message["type"] == "http.response.start":
            named = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = None if named else False
        elif cycle.chunked_encoding is False and cycle.expected_content_length == 0:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = plain  # type: ignore[method-assign]
