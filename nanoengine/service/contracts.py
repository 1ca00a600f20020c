"""What a service is given: where a client's deltas go, what refuses requests, what counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from nanoengine.api.deltas import RequestDelta
from nanoengine.service.client import ClientRequest, ServiceStats, Usage

BEAT_SECONDS = 0.25
Batch = list[tuple[int, RequestDelta]]
"""A client's key of a request, and what is new of it."""


class Output(Protocol):
    """What takes deltas to one client. The step loop calls it and waits for it: no method may block."""

    def deliver(self, batch: Batch) -> None:
        """What a step gave for this client's requests."""

    def beat(self) -> None:
        """The step loop makes progress, or has nothing to do. Called about every `BEAT_SECONDS`."""

    def ended(self, cause: BaseException | None, batch: Batch) -> None:
        """The service has ended: by `cause`, or (None) because it was closed. `batch`: its last deltas, of which those
        with the error "worker_failed" only say so, too. Nothing is called after this."""


class Queued(Protocol):
    """What waits, and has waited: as in `ServiceStats`."""

    @property
    def queued_requests(self) -> int: ...
    @property
    def queued_tokens(self) -> int: ...
    @property
    def queued_by_client(self) -> Mapping[str, int]: ...
    @property
    def started_requests(self) -> int: ...
    @property
    def started_tokens(self) -> int: ...


class Limits(Protocol):
    def check(self, request: ClientRequest, queue: Queued) -> None:
        """Raises the `RequestError` with which a new request is refused. `queue`: without it; it changes later."""


class Meter(Protocol):
    """The service's counters. Any thread calls it."""

    def count(self, usage: Usage) -> None: ...

    def step(self, seconds: float, gaps: Mapping[float, int], queued: Sequence[float]) -> None:
        """A turn of the step loop. gaps: seconds since requests had tokens before -> how many; queued: seconds that
        requests waited which have tokens for the first time."""

    def render(self, stats: ServiceStats) -> bytes:
        """All counters, as Prometheus reads them."""
        ...
