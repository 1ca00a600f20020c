"""`EngineService`: one thread makes the engine's steps; requests come from any thread, deltas go out in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from nanoengine.api.deltas import RequestDelta
from nanoengine.api.errors import (
    EngineClosed,
    EngineUnavailable,
    NanoEngineError,
    RequestError,
    WorkerError,
    described,
    is_failure,
)
from nanoengine.service.client import ClientRequest, EngineInfo, ServiceStats, Usage, of_id
from nanoengine.service.contracts import BEAT_SECONDS, Limits, Meter, Output
from nanoengine.service.inbox import Inbox
from nanoengine.service.member import Member
from nanoengine.service.queue import OpenRequest, Queue

if TYPE_CHECKING:
    from nanoengine.api.stats import EngineStats
    from nanoengine.core.engine import Engine
    from nanoengine.params.input_processor import CheckedRequest, InputProcessor

_QUIET_SECONDS = 0.1  # without a step: a client that sends its next request at once does not wait for other work
_MOST_FAILURES = 3  # that the step loop may have one after the other, before it ends
_log = logging.getLogger(__name__)


class EngineService:
    """Makes an engine's steps on a thread of its own, for any number of clients.

    All methods may be called by any thread. Nothing else may make the engine's steps meanwhile.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: InputProcessor,
        info: EngineInfo,
        stats: Callable[[], EngineStats],
        *,
        limits: Limits | None = None,
        meter: Meter | None = None,
        idle: Callable[[], bool] | None = None,
    ) -> None:
        """idle: does a piece of work for which no request may wait long; False: there is no more."""
        self.engine, self.info, self.meter, self._inputs = engine, info, meter, inputs
        self._engine_stats, self._limits, self._idle = stats, limits, idle
        self._lock = threading.RLock()  # guards what follows; the engine's own locks are taken inside of it
        self._open: dict[str, OpenRequest] = {}
        self._queue = Queue()  # of them, those that have not started
        self._members: list[Member] = []
        self._on_empty: list[Callable[[], None]] = []
        self._draining = self._closing = False
        self._cause: BaseException | None = None
        self._ended = False
        self.inbox = Inbox()  # what the loop's thread reads between steps
        self._calls: deque[Callable[[], None]] = deque()  # to be made by the loop's thread, between steps
        self._touched: list[Member] = []  # the loop's own: those with a batch
        self._fed: list[OpenRequest] = []  # likewise, where there is a meter: those that a step gave tokens
        self._queued: list[float] = []  # seconds that those waited which have tokens for the first time
        self._began = self.progress_at = self.turned_at = self._quiet_since = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="nanoengine-steps", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # Clients

    def join(self, output: Output) -> Member:
        """A new client, whose news `output` gets."""
        member = Member(self, output)
        with self._lock:
            if not self._ended:
                self._members.append(member)
                return member
        output.ended(self._cause, [])
        return member

    def check_takes(self, *, resumed: bool = False) -> None:
        """Raises `EngineUnavailable` where new requests are refused. resumed: the request is not new."""
        if self._ended:
            raise self.unavailable()
        if self._draining and not resumed:
            raise EngineUnavailable("the engine is draining and takes no new requests", retry_after=5.0)

    def unavailable(self) -> EngineUnavailable:
        """The error of what is asked of a service that has ended."""
        error = EngineUnavailable("the engine was closed" if self._cause is None else _why(self._cause))
        error.__cause__ = self._cause
        return error

    def stats(self) -> ServiceStats:
        """Counts now. While the engine makes a step, counts of samples may be those of another moment."""
        found = self._engine_stats()
        with self._lock:
            return ServiceStats(
                running=found.running,
                waiting=found.waiting,
                preparing=found.preparing,
                requests=len(self._open),
                queued_requests=self._queue.queued_requests,
                queued_tokens=self._queue.queued_tokens,
                queued_by_client=dict(self._queue.queued_by_client),
                started_requests=self._queue.started_requests,
                started_tokens=self._queue.started_tokens,
                num_blocks=found.num_blocks,
                free_blocks=found.free_blocks,
                steps=found.steps,
                preemptions=found.preemptions,
                prompt_tokens=found.prompt_tokens,
                prefix_hit_tokens=found.prefix_hit_tokens,
                drafted=found.drafted,
                accepted=found.accepted,
                draining=self._draining,
                uptime=time.monotonic() - self._began,
            )

    def count(self, usage: Usage) -> None:
        if self.meter is not None:
            self.meter.count(usage)

    def metrics(self) -> bytes:
        """What Prometheus reads; nothing where the service has no meter."""
        return b"" if self.meter is None else self.meter.render(self.stats())

    def abort(self, request_id: str) -> int:
        """End all requests `of_id`. Returns how many."""
        with self._lock:
            found = [each for name, each in self._open.items() if of_id(name, request_id)]
            for each in found:
                each.member.abort(each.key)
        return len(found)

    # The end

    @property
    def is_draining(self) -> bool:
        return self._draining

    @property
    def is_alive(self) -> bool:
        return not self._ended

    @property
    def cause(self) -> BaseException | None:
        """What ended the service; None: nothing did, or it was closed."""
        return self._cause

    def drain(self, then: Callable[[], None]) -> None:
        """Refuse new requests from now on. `then` is called once, by any thread, when no request is open."""
        with self._lock:
            self._draining = True
            if self._open and not self._ended:
                self._on_empty.append(then)
                return
        then()

    def stop(self) -> None:
        """End the step loop and abort what is open. The engine stays. Returns when the thread has ended. Idempotent."""
        self._closing = True
        self.inbox.ring()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def close(self) -> None:
        """`stop`, and close the engine."""
        self.stop()
        self.engine.close()

    def between_steps(self, call: Callable[[], None]) -> None:
        """Have the step loop's thread make a call soon. What it raises is logged."""
        self._calls.append(call)
        self.inbox.ring()

    # Requests

    def add(self, member: Member, key: int, request: ClientRequest, *, resumed: bool) -> None:
        """As `Member.add`."""
        given = self._inputs.process(
            request.request_id, request.prompt_token_ids, request.params, request.priority, request.generated,
            request.pooling, request.client,
        )  # fmt: skip
        if given.error is not None:
            raise given.error
        entry = OpenRequest(member, key, request)
        self._let_go(request.request_id)
        with self._lock:
            self.check_takes(resumed=resumed)
            if request.request_id in self._open:
                raise RequestError("duplicate_id", f"request {request.request_id!r} is still running; give another id")
            if self._limits is not None and not resumed:
                self._limits.check(request, self._queue)
            self._enter(entry)
        try:
            self._give(entry, given)
        except BaseException:
            self._leave(entry)
            raise
        self.inbox.ring()

    def _let_go(self, request_id: str) -> None:
        """Steps until the engine has ended a request that its client left: who comes back gives the same id."""
        if threading.current_thread() is self._thread:
            while (entry := self._open.get(request_id)) and entry.gone and self.engine.has_unfinished_requests():
                self.engine.advance()

    def _give(self, entry: OpenRequest, given: CheckedRequest) -> None:
        self.engine.add_checked(given, entry.request.every, entry.put)
        if entry.gone:  # its client left meanwhile
            self.engine.abort_request(given.request_id)

    def _enter(self, entry: OpenRequest) -> None:
        self._open[entry.request.request_id] = entry
        entry.member.open[entry.key] = entry
        self._queue.add(entry)

    def _leave(self, entry: OpenRequest) -> None:
        """The request is not open any more."""
        called: Sequence[Callable[[], None]] = ()
        with self._lock:
            if self._open.get(entry.request.request_id) is not entry:
                return
            self._queue.remove(entry)
            del self._open[entry.request.request_id]
            entry.member.open.pop(entry.key, None)
            if not self._open:
                called, self._on_empty = self._on_empty, []
        for then in called:
            then()

    def end(self, entry: OpenRequest, sample: int | None = None) -> None:
        """Abort an open request, or one of its samples."""
        self.engine.abort_request(entry.request.request_id, sample)
        self.inbox.ring()

    def quit(self, member: Member) -> None:
        """As `Member.leave`."""
        with self._lock:
            if member in self._members:
                self._members.remove(member)
            for entry in list(member.open.values()):
                entry.gone = True
                self.end(entry)

    def took(self, entry: OpenRequest, delta: RequestDelta) -> None:
        """A delta from the engine, on the step loop's thread."""
        last = delta.finished or delta.error is not None
        if self.meter is not None and delta.samples:
            self._fed.append(entry)
            if not entry.fed_at and delta.first_scheduled is not None:
                self._queued.append(delta.first_scheduled - entry.added)
        if last:
            if entry.failure is not None and delta.error is None:  # it was aborted, for this reason
                delta = delta._replace(samples=(), error=entry.failure)
            self._leave(entry)
        if entry.gone:
            return
        if not entry.member.batch:
            self._touched.append(entry.member)
        entry.member.batch.append((entry.key, delta))

    # The thread

    def _run(self) -> None:
        failures = 0
        while not self._closing:
            try:
                self._turn()
                failures = 0
            except BaseException as error:  # noqa: BLE001 - whatever it is, clients learn of it
                failures += 1
                if isinstance(error, WorkerError | EngineClosed) or failures == _MOST_FAILURES or not is_failure(error):
                    self._cause = error
                    break
                _log.exception("the step loop raised %s; it goes on", described(error))
        self._finish()
        self.inbox.close()

    def _turn(self) -> None:
        """One step, or a wait for something to do."""
        if steps := self.engine.has_unfinished_requests():
            began, busy = time.monotonic(), bool(self.engine.scheduler.running)
            self.engine.advance()
            stepped = time.monotonic()
            self._flush()  # before anything else: clients wait for it
            if self.meter is not None and (busy or self._fed):
                self._measure(self.meter, began, stepped)
            self._quiet_since = stepped
        elif self._idle is not None and time.monotonic() >= self._quiet_since + _QUIET_SECONDS and not self._idle():
            self._idle = None
        self.inbox.read(0.0 if steps else self._until_due())
        while self._calls:
            self._calls.popleft()()
        self.turned_at = now = time.monotonic()
        if self._queue.is_followed:
            self._follow(now)
        self._flush()
        if not self._until_beat():
            self._beat(now)

    def _measure(self, meter: Meter, began: float, now: float) -> None:
        gaps: dict[float, int] = {}
        for entry in self._fed:
            if entry.fed_at:  # most had their last tokens in the same turn
                gaps[entry.fed_at] = gaps.get(entry.fed_at, 0) + 1
            entry.fed_at = now
        meter.step(now - began, {now - before: count for before, count in gaps.items()}, self._queued)
        self._fed, self._queued = [], []

    def _until_due(self) -> float:
        """Seconds until something is to be done by itself."""
        idle = float("inf") if self._idle is None else self._quiet_since + _QUIET_SECONDS - time.monotonic()
        return max(0.0, min(self._until_beat(), idle))

    def _until_beat(self) -> float:
        return max(0.0, self.progress_at + BEAT_SECONDS - time.monotonic())

    def _beat(self, now: float) -> None:
        self.progress_at = now
        for member in list(self._members):
            self._call(member, member.output.beat)

    def _flush(self) -> None:
        touched, self._touched = self._touched, []
        for member in touched:
            batch, member.batch = member.batch, []
            self._call(member, partial(member.output.deliver, batch))

    def _call(self, member: Member, call: Callable[[], None]) -> None:
        """What a client's side raises ends that client alone."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other clients go on
            _log.exception("a client's output raised %s; its requests are aborted", described(error))
            self.quit(member)
            with suppress(Exception):  # it is broken, and was logged
                member.output.ended(error, [])

    def _follow(self, now: float) -> None:
        """What started, what is too late, and how far prompts are that someone asked about."""
        with self._lock:
            news = self._queue.follow(self.engine.scheduler.running)
            for entry in self._queue.late(now):
                self.end(entry)
        for entry, delta in news:
            self.took(entry, delta)

    def _finish(self) -> None:
        """The loop has ended: every client gets its last news."""
        with self._lock:
            self._ended = True
            members, self._members = self._members, []
            called, self._on_empty = self._on_empty, []
            for request_id in self._open:
                self.engine.abort_request(request_id)
            self._open.clear()
            self._queue = Queue()
        if self._cause is not None:
            _log.error("the engine has ended: %s", _why(self._cause))
        for member in members:
            self._call(member, partial(member.output.ended, self._cause, member.batch))
        for then in called:
            then()


def _why(cause: BaseException) -> str:
    if isinstance(cause, WorkerError):
        return f"the engine has ended: {cause.summary}"
    return f"the engine has ended: {cause if isinstance(cause, NanoEngineError) else described(cause)}"
