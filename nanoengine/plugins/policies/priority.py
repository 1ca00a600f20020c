"""A lower priority value goes first, then the earlier arrival; the worst one is preempted, then the latest arrival."""

from __future__ import annotations

from nanoengine.api import Policy, QueuedRequest


class Priority(Policy):
    """As in vLLM, priorities order the queue and choose the victim when a running request lacks blocks; a waiting
    request never drives out a running one just because its priority is better."""

    def waiting_key(self, request: QueuedRequest) -> tuple[int, ...]:
        return (request.priority,)

    def running_key(self, request: QueuedRequest) -> tuple[int, ...]:
        return (request.priority, request.arrival)
