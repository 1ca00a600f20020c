"""What all routes of one application share."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from nanoengine.api.errors import TokenizerMissing
from nanoengine.server.auth import Caller
from nanoengine.server.config import ServerConfig
from nanoengine.server.errors import ApiError, invalid, shortened
from nanoengine.server.field_names import FIELD_NAMES, names_of
from nanoengine.server.garbage import Collections
from nanoengine.server.gate import REQUEST_ID
from nanoengine.server.parsing import Parsers
from nanoengine.server.protocol.base import Model, parsed
from nanoengine.service.client import EngineClient
from nanoengine.text import Tokenizer

Result = TypeVar("Result")
_INLINE = 1 << 15  # bytes of a body that are parsed at once
_LONG = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """
    Attributes:
        client: the engine. tokenizer: None: only token ids work. parsers: of tools and reasoning.
        pool, long_pool: threads for what would stop the event loop: tokenizing, templates, long answers. Few of them
            do long work, because in parts of it they keep the event loop from running.
        collections: those of Python's garbage, which stop all threads.
        started: seconds since the epoch.
    """

    client: EngineClient
    config: ServerConfig
    tokenizer: Tokenizer | None
    parsers: Parsers
    pool: ThreadPoolExecutor
    long_pool: ThreadPoolExecutor
    collections: Collections = field(default_factory=Collections)
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model; answers say the first."""
        return self.config.served_model_name or (self.client.info.model,)

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` 404."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404, f"there is no model {name!r} here; this server has: {known}", "model_not_found", "model"
            )

    def need_tokenizer(self) -> Tokenizer:
        """Raises `TokenizerMissing`."""
        if self.tokenizer is None:
            raise TokenizerMissing("this model has no tokenizer here: give prompts as token ids")
        return self.tokenizer

    async def in_thread(self, function: Callable[[], Result], size: int = 0) -> Result:
        """`size`: characters of what it works on. Long ones wait for each other, and short ones not for them."""
        pool = self.pool if size < _LONG else self.long_pool
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    async def read(self, request: Request, model: type[Model]) -> Model:
        """The body as a model. Raises `ApiError`."""
        coding = request.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            words = f"a body with Content-Encoding {shortened(coding, 50)!r} is not read: send it as it is"
            raise ApiError(415, words, "unsupported_encoding")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
        except ClientDisconnect:
            raise ApiError(499, "the client closed the connection", "disconnected") from None
        if len(body) < _INLINE:
            found = parsed(model, bytes(body))
        else:
            with self.collections.paused():
                found = await self.in_thread(lambda: parsed(model, bytes(body)), len(body))
        request.scope[FIELD_NAMES] = names_of(found)
        return found


def caller_of(request: Request) -> Caller:
    found: Caller = request.scope["nanoengine.caller"]
    return found


def request_id_of(request: Request, given: str | None = None) -> str:
    """The id that the client knows: its header, else its field, else one of ours."""
    if given is not None and "x-request-id" not in request.headers:
        if REQUEST_ID.fullmatch(given) is None:
            raise invalid("request_id must have 1 to 200 visible ASCII characters", "request_id")
        request.scope["nanoengine.request_id"] = given
    own: str = request.scope["nanoengine.request_id"]
    return own


def engine_id(request_id: str) -> str:
    """A new id for the engine, of what the client calls `request_id`; `EngineClient.abort` finds it by that."""
    return f"{request_id} {uuid.uuid4().hex[:12]}"


def context_of(request: Request) -> Context:
    found: Any = request.app.state.context
    assert isinstance(found, Context)
    return found
