"""A service over the mock model, and what it must answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from nanoengine import SamplingParams
from nanoengine.api.deltas import RequestDelta
from nanoengine.service.client import ClientRequest, EngineClient, RequestStream
from nanoengine.service.connection import Connection
from nanoengine.service.local import LocalClient
from nanoengine.service.loop import EngineService
from nanoengine.service.merge import merge_all
from nanoengine.service.remote import RemoteClient


def request(request_id: str, prompt: list[int], *, client: str = "", **fields: Any) -> ClientRequest:
    """`fields`: of `ClientRequest`, and the rest of `SamplingParams`."""
    own = {name: fields.pop(name) for name in ("timeout", "progress", "generated", "priority") if name in fields}
    params = SamplingParams(**{"temperature": 0, "ignore_eos": True, **fields})
    return ClientRequest(request_id=request_id, prompt_token_ids=tuple(prompt), params=params, client=client, **own)


async def whole(stream: RequestStream) -> RequestDelta:
    """All that is still to come, as one delta."""
    return merge_all([delta async for delta in stream])


async def tokens(client: EngineClient, asked: ClientRequest) -> tuple[int, ...]:
    """The tokens of a request's only sample."""
    found = await whole(await client.add(asked))
    assert found.error is None, found.error
    return found.samples[0].token_ids


async def until(condition: Callable[[], bool], what: str = "the condition") -> None:
    for _ in range(12_000):  # a minute
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{what} did not come")


def pass_deadlines(service: EngineService) -> None:
    """The time of all requests that wait until now is over."""
    with service._lock:
        service._queue._deadlines = [(0.0, number, entry) for _, number, entry in service._queue._deadlines]


@asynccontextmanager
async def connected(service: EngineService, kind: str) -> AsyncIterator[Any]:
    if kind == "local":
        client: Any = LocalClient(service)
    else:
        client = RemoteClient()
        client.connect(socket_of(service))
        await client.ready()
    try:
        yield client
    finally:
        await client.close()


def socket_of(service: EngineService) -> socket.socket:
    """The client's end of a socket, at whose other end the service is."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    Connection(service, theirs, lambda connection: None)
    return ours
