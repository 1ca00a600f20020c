"""Who waits, who runs, in which slot: the two queues in the policy's order, and the slots of the device tables."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np

from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.policy import Policy
from nanoengine.core.step import Int64

Handle = tuple[Request, int]  # a request and its generation when it got the slot


class Roster:
    """Live requests by status. It moves them, and sets status, slot and generation; it knows no tokens or blocks.

    Attributes:
        waiting, running: sorted by the policy's keys.
        free_slots: a slot freed is the next to be used again.
        generations: int64, by slot; of its owner.
    """

    def __init__(self, num_slots: int, policy: Policy) -> None:
        self.policy = policy
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.free_slots = list(range(num_slots - 1, -1, -1))
        self._owners: list[Handle | None] = [None] * num_slots
        self.generations: Int64 = np.zeros(num_slots, dtype=np.int64)
        self._admissions = 0

    def enqueue(self, request: Request) -> None:
        request.status = Status.WAITING
        insort(self.waiting, request, key=self.policy.waiting_key)

    def seat(self, request: Request) -> None:
        """Waiting -> running in a slot."""
        self._dequeue(request)
        request.status = Status.RUNNING
        request.slot = self.free_slots.pop()
        request.generation += 1
        request.admitted = self._admissions
        self._admissions += 1
        self._owners[request.slot] = (request, request.generation)
        self.generations[request.slot] = request.generation
        insort(self.running, request, key=self.policy.running_key)

    def drop(self, request: Request) -> None:
        """Waiting or running -> in no queue, finished until it is enqueued again."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._owners[request.slot] = None
            self.free_slots.append(request.slot)
            request.slot = -1
            request.generation += 1
        else:
            self._dequeue(request)
        request.status = Status.FINISHED

    def owners(self, slots: list[int]) -> tuple[Handle, ...]:
        owners = self._owners
        return tuple([owners[slot] for slot in slots])  # type: ignore[misc]

    def service_order(self, first: Request | None) -> list[Request]:
        """The running requests in policy order, except that `first`'s tier begins with it and goes round."""
        if first is None or first.status is not Status.RUNNING:
            return self.running.copy()
        tier, at = self.policy.tier(first), self.running.index(first)
        turned = self.running[at:] + self.running[:at]
        return sorted(turned, key=lambda r: (self.policy.tier(r) > tier) - (self.policy.tier(r) < tier))

    def _dequeue(self, request: Request) -> None:
        key = self.policy.waiting_key
        at = bisect_left(self.waiting, key(request), key=key)
        assert self.waiting[at] is request, f"request {request.id} is not in the queue"
        del self.waiting[at]

    def check(self) -> None:
        slots = [request.slot for request in self.running]
        assert sorted(slots + self.free_slots) == list(range(len(self._owners))), "slots leaked or doubled"
        for name, queue, key in (
            ("waiting", self.waiting, self.policy.waiting_key),
            ("running", self.running, self.policy.running_key),
        ):
            assert all(key(a) < key(b) for a, b in pairwise(queue)), f"{name} is out of order"
        for request in self.running:
            assert request.status is Status.RUNNING
            assert self._owners[request.slot] == (request, request.generation)
        for request in self.waiting:
            assert request.status is Status.WAITING and request.slot == -1
            assert request.num_computed == 0 and not request.block_ids
        for request in (*self.running, *self.waiting):
            assert request.num_tokens == request.prompt_len + len(request.output_token_ids)
