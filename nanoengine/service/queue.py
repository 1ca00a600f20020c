"""The requests of a service that have not started yet: how many, whose, until when; and how far their prompts are."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nanoengine.api.deltas import RequestDelta
from nanoengine.api.errors import RequestError
from nanoengine.service.client import ClientRequest

if TYPE_CHECKING:
    from nanoengine.core.request import Request
    from nanoengine.service.member import Member


class OpenRequest:
    """A request between `Member.add` and its last delta.

    Attributes:
        failure: why it was aborted, if the service did that. gone: its client has left. answered: it has tokens.
        added: when it came; fed_at: when a step last gave it tokens, for the meter; 0: never. Monotonic seconds.
    """

    __slots__ = ("added", "answered", "failure", "fed_at", "gone", "key", "member", "request")

    def __init__(self, member: Member, key: int, request: ClientRequest) -> None:
        self.member, self.key, self.request = member, key, request
        self.failure: RequestError | None = None
        self.gone = self.answered = False
        self.added, self.fed_at = time.monotonic(), 0.0

    def put(self, delta: RequestDelta) -> None:
        """The engine's sink."""
        self.answered = True
        self.member.service.took(self, delta)


class Queue:
    """Requests from `add` until they start. Its owner guards it with a lock.

    Attributes:
        queued_requests, queued_tokens: how many, and the tokens of their prompts: one with n samples counts n times,
            its prompt too. queued_by_client: how many of each.
        started_requests, started_tokens: what was taken out since the start.
    """

    def __init__(self) -> None:
        self._entries: dict[str, OpenRequest] = {}
        self._deadlines: list[tuple[float, int, OpenRequest]] = []
        self._prefilling: dict[str, tuple[OpenRequest, int]] = {}  # those that want progress, and the last one
        self.queued_requests = self.queued_tokens = self.started_requests = self.started_tokens = 0
        self.queued_by_client: dict[str, int] = {}

    @property
    def is_followed(self) -> bool:
        """Whether `follow` and `late` have anything to do."""
        return bool(self._entries or self._prefilling)

    def add(self, entry: OpenRequest) -> None:
        request = entry.request
        self._entries[request.request_id] = entry
        count = request.params.n
        self.queued_requests += count
        self.queued_tokens += count * len(request.prompt_token_ids)
        self.queued_by_client[request.client] = self.queued_by_client.get(request.client, 0) + count
        if request.timeout is not None:
            heapq.heappush(self._deadlines, (time.monotonic() + request.timeout, id(entry), entry))

    def remove(self, entry: OpenRequest) -> None:
        """It has started, or ended. No effect where it is not there."""
        request = entry.request
        if self._entries.get(request.request_id) is not entry:
            return
        del self._entries[request.request_id]
        count = request.params.n
        tokens = count * len(request.prompt_token_ids)
        self.queued_requests, self.queued_tokens = self.queued_requests - count, self.queued_tokens - tokens
        self.started_requests, self.started_tokens = self.started_requests + count, self.started_tokens + tokens
        self.queued_by_client[request.client] -= count
        if not self.queued_by_client[request.client]:
            del self.queued_by_client[request.client]

    def late(self, now: float) -> Iterator[OpenRequest]:
        """Those whose time is over, each once; with the failure that they end with."""
        while self._deadlines and (self._deadlines[0][0] <= now or not self._waits(self._deadlines[0][2])):
            entry = heapq.heappop(self._deadlines)[2]
            if self._waits(entry):
                seconds = f"{entry.request.timeout:g} seconds"
                entry.failure = RequestError("deadline", f"the request had not started after {seconds} in the queue")
                yield entry

    def _waits(self, entry: OpenRequest) -> bool:
        return self._entries.get(entry.request.request_id) is entry and entry.failure is None

    def follow(self, running: Sequence[Request]) -> list[tuple[OpenRequest, RequestDelta]]:
        """Take out what runs now. Returns the progress of prompts that is to be reported."""
        news = []
        for sample in running:
            entry = self._entries.get(sample.parent)
            if entry is not None:
                self.remove(entry)
                if entry.request.progress:
                    self._prefilling[sample.parent] = entry, 0
            if sample.parent not in self._prefilling:
                continue
            entry, last = self._prefilling[sample.parent]
            done = min(sample.num_computed, sample.prompt_len)
            if done > last and not entry.answered:
                self._prefilling[sample.parent] = entry, done
                cached = sample.num_cached or 0
                delta = RequestDelta(
                    sample.parent, num_cached_tokens=cached, num_computed_tokens=done, seed=sample.seed
                )
                news.append((entry, delta))
        self._prefilling = {name: each for name, each in self._prefilling.items() if not each[0].answered}
        return news
