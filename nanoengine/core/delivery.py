"""Between the engine and its clients: requests that come in, deltas and step records that go out."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from nanoengine.api.deltas import RequestDelta
from nanoengine.api.errors import ParamsError, RequestError, described, is_failure
from nanoengine.core.outputs import ALL, News, RequestState
from nanoengine.core.request import Request
from nanoengine.core.scheduling.messages import ScheduledStep
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import StepResult
from nanoengine.params.preparation import Preparations

Delivery = tuple[Callable[[Any], None], Any]
"""A client's callable, and what it is to be called with."""
_log = logging.getLogger(__name__)
_IDLE_SECONDS = 0.05
START = -1


class OpenRequests:
    """The requests from `add` to their last delta. No client is called but by `deliver`: it may do anything.

    `add` and `abort` may be called by any thread; all else by the one that makes steps.

    Attributes:
        known: by id.
        inbox: requests with what the step loop is to do: START it, abort ALL of it, or its sample of this index.
        ready: deltas of requests without a sink. undelivered: deltas with their requests, and step records with None.
        entry_lock: while it is held, no other thread adds a request; `abort` does not wait for it.
    """

    def __init__(self, preparations: Preparations) -> None:
        """`preparations`: does what must be done before a request starts."""
        self.preparations = preparations
        self._arrived = threading.Event()  # set when a request was put into the inbox to start
        self.known: dict[str, RequestState] = {}
        self.inbox: deque[tuple[RequestState, int]] = deque()
        self.ready: list[RequestDelta] = []
        self.undelivered: deque[tuple[RequestState | None, Any]] = deque()
        self._interrupted: object = None  # the entry of `undelivered` whose client an interrupt came into
        self._num_added = 0
        # Re-entrant, and taken in this order. A stream may be collected, and so abort, while they are held.
        self.entry_lock = threading.RLock()
        self._lock = threading.RLock()  # guards `known` together with the order of the inbox

    def add(self, state: RequestState, jobs: Sequence[Callable[[], Any]] = ()) -> None:
        """`jobs`: what must be done before it starts. Raises `RequestError` where a request of its id has not ended."""
        request_id = state.given.request_id
        with self.entry_lock, self._lock:
            if request_id in self.known:
                raise RequestError("duplicate_id", f"request {request_id!r} is still running; give another id")
            try:
                self.known[request_id] = state
                state.ordinal, self._num_added = self._num_added, self._num_added + 1
                if jobs:
                    state.task = self.preparations.submit(jobs, partial(self._start, state))
                else:
                    self._start(state)
            except BaseException:  # an interrupt: no request may be known that never starts
                self.inbox.append((state, ALL))
                raise

    def abort(self, request_id: str, sample_index: int | None = None) -> None:
        """No effect where the id is unknown, or its request has ended."""
        with self._lock:
            state = self.known.get(request_id)
            if state is not None and sample_index is not None and not 0 <= sample_index < state.given.params.n:
                raise ParamsError(f"request {request_id!r} has no sample {sample_index!r}; n is {state.given.params.n}")
            if state is not None:
                self.inbox.append((state, ALL if sample_index is None else sample_index))

    def _start(self, state: RequestState, error: RequestError | None = None) -> None:
        """Any thread: the request can start, or (`error`) it never will."""
        state.given = state.given if error is None else replace(state.given, error=error)
        self.inbox.append((state, START))
        self._arrived.set()

    def wait(self) -> None:
        """Wait a moment for a request that is being prepared, or for another one. No effect where none is."""
        if self.preparations.tasks:
            self._arrived.wait(_IDLE_SECONDS)
            self._arrived.clear()

    def clear_inbox(self) -> list[RequestState]:
        """Returns the requests so far; one that is added from here on is both known and in the inbox."""
        with self._lock:
            self.inbox.clear()
            return list(self.known.values())

    def close(self) -> None:
        """Forget all requests."""
        self.known.clear()
        self.preparations.close()

    def publish(self, news: Sequence[News]) -> None:
        """Queue deltas for their clients. With its last delta a request ends, and its id is free."""
        for each in news:
            state, delta = each
            if state.sink is None:
                self.ready.append(delta)
            else:
                self.undelivered.append(each)
            if delta.finished:  # an interrupt before this costs a second last delta, not the only one
                with self._lock:
                    del self.known[delta.request_id]
                if state.task is not None:
                    state.task.cancel()

    def put_records(self, records: Sequence[Delivery]) -> None:
        self.undelivered += [(None, record) for record in records]

    def take_ready(self) -> list[RequestDelta]:
        ready, self.ready = self.ready, []
        return ready

    def deliver(self) -> None:
        """Call every client, in order. Afterwards raises the first exception of an observer.

        A client that Ctrl-C comes into is called with the same news the next time, once: it may not have taken them.
        If Ctrl-C comes again, these news are lost, and their request is aborted.
        """
        raised: list[BaseException] = []
        undelivered = self.undelivered
        while undelivered:
            entry = undelivered[0]
            state, news = entry
            client: Any
            client, news = news if state is None else (state.sink, news)
            try:
                undelivered.popleft()
                client(news)  # of a request: nothing, if it raised over a delta before this one
            except BaseException as error:
                if not is_failure(error):
                    if entry is not self._interrupted and entry is not next(iter(undelivered), None):
                        undelivered.appendleft(entry)
                    elif state is not None:
                        self._drop(state)
                    self._interrupted = entry
                    raise
                if state is not None:
                    self._sink_failed(state, error)
                else:
                    raised.append(error)
        if raised and isinstance(raised[0], StopIteration):  # a stream would end as if all its outputs had come
            raise RuntimeError("an observer raised StopIteration") from raised[0]
        if raised:
            raise raised[0]

    def _sink_failed(self, state: RequestState, error: BaseException) -> None:
        request_id = state.given.request_id
        _log.warning("the sink of request %r raised %s; the request is aborted", request_id, described(error))
        state.sink = lambda delta: None  # of its other deltas
        self._drop(state)

    def _drop(self, state: RequestState) -> None:
        if self.known.get(state.given.request_id) is state:  # else it has ended, and its id may be in use again
            self.inbox.append((state, ALL))


class Watch(Protocol):
    """Makes records of steps for observers: `observe.steps.StepWatch`. The engine has one only while it is observed.

    Times are seconds on the monotonic clock.
    """

    def launched(self, step: ScheduledStep, scheduler: Scheduler, scheduling: float, launching: float) -> None:
        """A step was launched. scheduling, launching: when the engine began to schedule it, and to launch it."""

    def arrived(self, step: ScheduledStep, waiting: float) -> None:
        """The oldest step's result is there and is committed next. waiting: when the engine began to wait for it."""

    def ended(self, request: Request, reason: str) -> None:
        """A sample ended: its finish_reason, or the code of its request's error."""

    def committed(self, step: ScheduledStep, result: StepResult) -> Sequence[Delivery]:
        """The oldest step is committed. Returns the records to deliver."""

    def broken(self, steps: Sequence[ScheduledStep], error: BaseException) -> Sequence[Delivery]:
        """These steps raised and are not committed. Returns the records to deliver."""
