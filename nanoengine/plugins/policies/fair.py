"""Each client gets tokens by its weight, however many requests it sends.

The idea: a virtual token counter for each client (Sheng et al., "Fairness in Serving Large Language Models", 2024).
Tokens that are computed for a client raise its counter by their cost, divided by its weight. The waiting client with
the lowest counter is next: of its requests the one of the best priority, then the oldest. A client with nothing in the
queue cannot save up: when it comes back, its counter is lifted to the lowest one of the clients that wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoengine.api import Policy, QueuedRequest
from nanoengine.plugins.policies.params import FairParams

_IDLE_KEPT = 1024  # clients: beyond these, such as would be lifted anyway are forgotten


@dataclass(slots=True, eq=False)
class _Client:
    """counter: the cost of what it got, by its weight. waiting: requests in the queue."""

    name: str
    weight: float
    counter: float
    waiting: int = 0


class Fair(Policy):
    params: FairParams

    def __init__(self, params: FairParams) -> None:
        super().__init__(params)
        self._clients: dict[str, _Client] = {}
        self._waiting: dict[str, _Client] = {}
        self._last: _Client | None = None  # the last one that left the queue with nothing waiting
        self._keep = _IDLE_KEPT

    def waiting_key(self, request: QueuedRequest) -> tuple[str, int]:
        return (request.client, request.priority)

    def next_key(self) -> tuple[str, ...]:
        lowest = self._lowest()
        return () if lowest is None else (lowest.name,)

    def queued(self, request: QueuedRequest, returned: bool) -> None:
        client = self._client(request.client)
        if not client.waiting:
            if not returned:  # a preempted request has waited before
                client.counter = max(client.counter, self._level())
            self._waiting[client.name] = client
        client.waiting += 1

    def left(self, request: QueuedRequest) -> None:
        client = self._client(request.client)
        client.waiting -= 1
        if not client.waiting:
            del self._waiting[client.name]
            self._last = client

    def served(self, request: QueuedRequest, prompt: int, generated: int) -> None:
        client = self._client(request.client)
        cost = self.params.prompt_cost * prompt + self.params.output_cost * generated
        client.counter += cost / client.weight

    def counters(self) -> dict[str, float]:
        """By client, the cost of what it got, divided by its weight."""
        return {name: client.counter for name, client in self._clients.items()}

    def _lowest(self) -> _Client | None:
        return min(self._waiting.values(), key=lambda client: client.counter, default=None)

    def _level(self) -> float:
        """The counter that a client which comes back has at least."""
        lowest = self._lowest() or self._last
        return 0.0 if lowest is None else lowest.counter

    def _client(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            if len(self._clients) >= self._keep:
                self._forget_idle()
            weight = self.params.weights.get(name, self.params.default_weight)
            client = self._clients[name] = _Client(name, weight, self._level())
        return client

    def _forget_idle(self) -> None:
        level = self._level()
        self._clients = {n: c for n, c in self._clients.items() if c.waiting or c.counter > level}
        self._keep = 2 * len(self._clients) + _IDLE_KEPT
