"""What is known of one HTTP request when it has ended, for its log line, its span and the counters. Never a prompt."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanoengine.observe.logs import fields
from nanoengine.server.lifecycle import PROBES
from nanoengine.service.client import EngineClient, Usage

_log = logging.getLogger("nanoengine.access")
_QUIET = PROBES | {"/live"}
_MOST_REASONS = 8  # in a log line
_MOST_PATH = 200  # characters of a path in a log line
_LATER_SECONDS = 0.002

RECORD = "nanoengine.record"
"""The key of a scope."""


@dataclass(slots=True, kw_only=True)
class Record:
    """One request. Seconds are those of the monotonic clock, which is one for all processes of a machine.

    Attributes:
        path: as it came, percent-encoded. route: the path of the route that it reached, or "other": anyone may make up
            paths.
        headers: the names are lower-case. client: name of the API key.
        status: that was sent; 499: the client left before; 0: nothing was sent.
        usage: what the counters get; None: it did not come to the engine.
        model: that answers say. params: fields of `SamplingParams` that were given.
        first_scheduled, first_token: when it happened, if it did.
    """

    method: str
    path: str
    route: str = "other"
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    request_id: str = ""
    client: str = ""
    started: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    status: int = 0
    usage: Usage | None = None
    model: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    first_scheduled: float | None = None
    first_token: float | None = None


def _joined(reasons: Sequence[str]) -> str | None:
    """ "stop,length", or of many samples how often each came: "stop x 200,length x 56"."""
    if len(reasons) > _MOST_REASONS:
        reasons = [f"{reason} x {count}" for reason, count in Counter(reasons).items()]
    return ",".join(reasons) or None


class Tracer(Protocol):
    def ended(self, record: Record) -> None:
        """Makes a span of the request."""


class Observer:
    """Writes a line for each request, counts it, and makes its span: a little later, as a client that has its answer
    may send the next request at once, which need not wait for that."""

    def __init__(self, client: EngineClient, tracer: Tracer | None = None) -> None:
        self._client, self._tracer = client, tracer

    async def ended(self, record: Record) -> None:
        record.ended = time.monotonic()
        if record.path in _QUIET and record.status in (200, 503):  # 503 is an answer that a probe wants
            return
        try:
            await asyncio.sleep(_LATER_SECONDS)
        finally:
            self._write(record)
            usage = record.usage or Usage(client=record.client, endpoint=record.route, status=record.status)
            await self._client.count(usage)
            if self._tracer is not None:
                self._tracer.ended(record)

    def _write(self, record: Record) -> None:
        if not _log.isEnabledFor(logging.INFO):
            return
        values: dict[str, Any] = {"request_id": record.request_id, "client": record.client or None}
        values["seconds"] = round(record.ended - record.started, 6)
        usage = record.usage
        if usage is not None:
            values |= {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
                "finish_reasons": _joined(usage.finish_reasons),
                "first_token_seconds": None if usage.ttft is None else round(usage.ttft, 6),
            }
        known = {name: value for name, value in values.items() if value is not None}
        _log.info("%s %s %s", record.method, record.path[:_MOST_PATH], record.status, extra=fields(**known))
