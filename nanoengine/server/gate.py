"""What every request passes first, before any route: its id, CORS, the API key, and the limit of its body."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from nanoengine.server.auth import Caller, Keys
from nanoengine.server.config import ServerConfig
from nanoengine.server.errors import ApiError, body_of, shortened
from nanoengine.server.record import RECORD, Observer, Record

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

WITHOUT_KEY = frozenset({"/live", "/ready"})
"""Paths for probes. Every other one needs a key, also one that does not exist."""
PAGES = frozenset({"/docs", "/redoc", "/openapi.json"})
"""What people open in a browser, which asks them for a key."""
REQUEST_ID = re.compile("[\x21-\x7e]{1,200}")


class Gate:
    """ASGI middleware. It leaves in the scope: `nanoengine.request_id`, `nanoengine.caller`, and `nanoengine.send`,
    the server's own `send`, by which a stream writes its chunks without the layers between.

    Args:
        app: what is behind it. observer: sees each request that has ended.
    """

    def __init__(
        self,
        app: App,
        config: ServerConfig,
        keys: Keys,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer
        self._app, self._keys, self._limit = app, keys, config.max_body_bytes
        self._origins = frozenset(origin.encode() for origin in config.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._app(scope, receive, send)
            return
        path = scope.get("raw_path") or scope["path"].encode()
        record = Record(method=scope["method"], path=path.decode("latin-1"), headers=dict(scope["headers"]))
        if scope["method"] == "HEAD":  # as GET; the server leaves the body out, by the scope that it has itself
            scope = {**scope, "method": "GET"}
        scope[RECORD] = record
        try:
            await self._request(record, scope, receive, send)
        finally:
            record.request_id, record.client = scope["nanoengine.request_id"], scope["nanoengine.caller"].name
            record.route = getattr(scope.get("route"), "path", record.route)
            if record.usage is not None:
                record.status = record.usage.status
            if self._observer is not None:
                await self._observer.ended(record)

    async def _request(self, record: Record, scope: Scope, receive: Receive, send: Send) -> None:
        headers = record.headers
        given = headers.get(b"x-request-id")
        request_id = uuid.uuid4().hex if given is None else given.decode("latin-1")
        valid = REQUEST_ID.fullmatch(request_id) is not None
        request_id = request_id if valid else uuid.uuid4().hex
        added = self._cors(headers)

        async def start(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = (b"x-request-id", scope["nanoengine.request_id"].encode())  # a field of the body may set it
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), own, *added]
            await send(message)

        scope["nanoengine.request_id"], scope["nanoengine.send"] = request_id, send
        scope["nanoengine.caller"] = Caller()
        try:
            if not valid:
                raise ApiError(400, "X-Request-Id must have 1 to 200 visible ASCII characters", "invalid_value")
            if self._is_preflight(scope, headers):
                await self._answer(start, 204, b"", self._preflight(headers))
                return
            self._refuse_other_origins(scope, headers)
            if scope["path"] not in WITHOUT_KEY:
                page = scope["path"] in PAGES and scope["method"] == "GET"
                scope["nanoengine.caller"] = self._keys.caller(headers, page=page)
            await self._app(scope, self._bounded(headers, receive), start)
        except ApiError as error:
            await self.refuse(scope, start, error)

    async def refuse(self, scope: Scope, send: Send, error: ApiError) -> None:
        headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
        await self._answer(send, error.status, body_of(scope["path"], error), headers)

    async def _answer(self, send: Send, status: int, body: bytes, headers: Headers) -> None:
        if body:
            headers = [*headers, (b"content-type", b"application/json")]
        headers = [*headers, (b"content-length", str(len(body)).encode())] if status != 204 else headers
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _bounded(self, headers: Mapping[bytes, bytes], receive: Receive) -> Receive:
        """A `receive` that raises `ApiError` 413 before more than the limit is kept. Raises it for Content-Length."""
        size = headers.get(b"content-length", b"0")
        if not size.isdigit() or len(size) > 18 or int(size) > self._limit:
            raise self._too_large()
        count = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal count
            message = await receive()
            if message["type"] == "http.request":
                count += len(message.get("body", b""))
                if count > self._limit:
                    raise self._too_large({"connection": "close"})  # how much more would come is not known
            return message

        return bounded

    def _too_large(self, headers: dict[str, str] | None = None) -> ApiError:
        words = f"the body has more than {self._limit} bytes (server.max_body_bytes)"
        return ApiError(413, words, "body_too_large", headers=headers or {})

    def _is_preflight(self, scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
        asked = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        return asked and (b"*" in self._origins or headers.get(b"origin") in self._origins)

    def _refuse_other_origins(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Raises `ApiError` 403 for what a page of an origin that is not listed posts. A browser sends text without a
        preflight, so keeping the answer from the page would not keep it from a drain."""
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if scope["method"] in ("GET", "OPTIONS") or b"*" in self._origins or origin in self._origins:
            return
        if site is not None:
            own = site in (b"same-origin", b"none")
        else:  # no browser, an old one, or a page without TLS
            own = origin is None or origin.partition(b"://")[2] == headers.get(b"host")
        if not own:
            name = shortened((origin or b"another origin").decode("latin-1"), 200)
            words = f"pages of {name} may not send requests here; server.cors_origins lists those that may"
            raise ApiError(403, words, "origin_not_allowed")

    def _cors(self, headers: Mapping[bytes, bytes]) -> Headers:
        """Headers for a page of a listed origin; on every answer, so that errors and streams can be read too."""
        origin = headers.get(b"origin")
        if not self._origins or origin is None:
            return []
        if b"*" not in self._origins and origin not in self._origins:
            return [(b"vary", b"Origin")]
        allowed = b"*" if b"*" in self._origins else origin
        return [
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
            (b"vary", b"Origin"),
        ]

    def _preflight(self, headers: Mapping[bytes, bytes]) -> Headers:
        asked = headers.get(b"access-control-request-headers", b"")
        return [
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", asked or b"authorization, content-type"),
            (b"access-control-max-age", b"600"),
        ]
