"""`LocalClient`: the engine runs in this process. One call into the event loop for each step."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from nanoengine.api.deltas import RequestDelta
from nanoengine.api.errors import RequestError
from nanoengine.service.client import (
    ClientRequest,
    DeltaBox,
    EngineInfo,
    Health,
    RequestStream,
    ServiceStats,
    Usage,
)
from nanoengine.service.contracts import Batch
from nanoengine.service.loop import EngineService
from nanoengine.service.merge import merge_all
from nanoengine.service.tracing import traced

HEALTH_DEADLINE = 10.0
_LONG_PROMPT = 4096  # tokens: hashing more would hold the event loop up
_MERGE_AT = 4096  # deltas that the event loop has not taken


class LocalClient:
    """An `EngineClient` for the event loop that runs when it is made."""

    def __init__(self, service: EngineService, *, health_deadline: float = HEALTH_DEADLINE) -> None:
        """`health_deadline`: seconds without progress of the step loop after which it counts as hanging."""
        self._service, self._deadline = service, health_deadline
        self._loop = asyncio.get_running_loop()
        self._boxes: dict[int, tuple[str, DeltaBox]] = {}
        self._keys = itertools.count()
        self._lock = threading.Lock()  # guards the next two
        self._pending: Batch = []
        self._scheduled = False
        self._closed = False
        self._member = service.join(self)

    @property
    def info(self) -> EngineInfo:
        return self._service.info

    @property
    def health(self) -> Health:
        service, age = self._service, time.monotonic() - self._service.progress_at
        if not service.is_alive:
            return Health(alive=False, ready=False, since_progress=age, reason=str(service.unavailable()))
        return health_of(age, self._deadline, draining=service.is_draining)

    async def add(self, request: ClientRequest) -> RequestStream:
        key, box = next(self._keys), DeltaBox()
        self._boxes[key] = request.request_id, box
        try:
            await self._give(key, request)
        except BaseException:
            self._boxes.pop(key, None)
            raise
        return RequestStream(request.request_id, box, partial(self._abort, key))

    async def _give(self, key: int, request: ClientRequest) -> None:
        if self._closed:
            raise self._service.unavailable()
        if len(request.prompt_token_ids) < _LONG_PROMPT:
            self._member.add(key, request)
            return
        adding = self._loop.run_in_executor(None, self._member.add, key, request)
        try:
            await asyncio.shield(adding)
        except asyncio.CancelledError:
            adding.add_done_callback(partial(self._too_late, key))
            raise

    def _too_late(self, key: int, adding: asyncio.Future[None]) -> None:
        if adding.exception() is None:
            self._member.abort(key)

    def _abort(self, key: int, sample: int | None) -> None:
        if sample is None:
            self._boxes.pop(key, None)
        self._member.abort(key, sample)

    async def abort(self, request_id: str) -> int:
        return self._service.abort(request_id)

    async def stats(self) -> ServiceStats:
        return self._service.stats()

    async def metrics(self) -> bytes:
        return await asyncio.to_thread(self._service.metrics)

    async def count(self, usage: Usage) -> None:
        self._service.count(usage)

    async def trace(self, seconds: float) -> bytes:
        return await asyncio.to_thread(traced, self._service, seconds)

    async def drain(self, seconds: float) -> bool:
        return await drained(self._service, seconds)

    async def close(self) -> None:
        """Abort this client's requests. The service goes on."""
        self._closed = True
        self._member.leave()
        self._fail_all(RequestError("unavailable", "the client was closed"))

    # The step loop's thread

    def deliver(self, batch: Batch) -> None:
        with self._lock:
            self._pending += batch
            if len(self._pending) >= _MERGE_AT:
                self._pending = merged(self._pending)
            if self._scheduled:
                return
            self._scheduled = True
        self._call(self._take)

    def beat(self) -> None:
        """Nothing to do: `health` reads the service's own time."""

    def ended(self, cause: BaseException | None, batch: Batch) -> None:
        self.deliver(batch)
        self._call(lambda: self._fail_all(self._service.unavailable()))

    def _call(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the event loop is closed: no one reads any more
            self._member.leave()

    # The event loop's thread

    def _take(self) -> None:
        with self._lock:
            batch, self._pending, self._scheduled = self._pending, [], False
        boxes = self._boxes
        for key, delta in batch:
            found = boxes.get(key)
            if found is not None:
                found[1].put(delta)
                if delta.finished or delta.error is not None:
                    del boxes[key]

    def _fail_all(self, error: RequestError) -> None:
        boxes, self._boxes = self._boxes, {}
        for request_id, box in boxes.values():
            box.put(RequestDelta(request_id, finished=True, error=error))


def health_of(age: float, deadline: float, *, draining: bool) -> Health:
    """The health of an engine whose last sign came `age` seconds ago."""
    if age > deadline:
        reason = f"the engine has made no progress for {age:.1f} seconds; the limit is {deadline:g}"
        return Health(alive=False, ready=False, draining=draining, since_progress=age, reason=reason)
    why = "the engine is draining" if draining else None
    return Health(alive=True, ready=not draining, draining=draining, since_progress=age, reason=why)


def merged(batch: Batch) -> Batch:
    """One delta for each key, in the order of their first ones."""
    parts = dict[int, list[RequestDelta]]()
    for key, delta in batch:
        parts.setdefault(key, []).append(delta)
    return [(key, merge_all(deltas)) for key, deltas in parts.items()]


async def drained(service: EngineService, seconds: float) -> bool:
    """Refuse new requests and wait for the open ones. True: all have ended; False: not in so many seconds."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def set_done() -> None:
        if not done.done():
            done.set_result(None)

    def then() -> None:
        with suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(set_done)

    service.drain(then)
    ended, _ = await asyncio.wait([done], timeout=seconds)
    return bool(ended)
