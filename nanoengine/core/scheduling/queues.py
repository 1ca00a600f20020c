"""Which requests wait, which run, and in which slot: two queues in the policy's order, and the device tables' slots."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.policy import Policy

Handle = tuple[Request, int]  # a request and its generation when it got the slot


class Roster:
    """Live requests by status. It moves them, and sets status, slot and generation; it knows no tokens or blocks.

    Attributes:
        waiting, running: sorted by the policy's keys.
        free_slots: a slot freed is the next to be used again.
        owners: by slot that is not free.
    """

    def __init__(self, num_slots: int, policy: Policy) -> None:
        self.policy = policy
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_slots = num_slots
        self.free_slots = list(range(num_slots - 1, -1, -1))
        self.owners: dict[int, Handle] = {}
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
        self.owners[request.slot] = (request, request.generation)
        insort(self.running, request, key=self.policy.running_key)

    def drop(self, request: Request) -> None:
        """Waiting or running -> in no queue, finished until it is enqueued again."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            del self.owners[request.slot]
            self.free_slots.append(request.slot)
            request.slot = -1
            request.generation += 1
        else:
            self._dequeue(request)
        request.status = Status.FINISHED

    def service_order(self, first: Request) -> list[Request]:
        """The running requests in policy order, except that `first`'s tier begins with it and goes round."""
        if first.status is not Status.RUNNING:
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
        assert sorted(slots) == sorted(self.owners), "slots leaked or doubled"
        assert sorted(slots + self.free_slots) == list(range(self.num_slots)), "slots leaked or doubled"
        for name, queue, key in (
            ("waiting", self.waiting, self.policy.waiting_key),
            ("running", self.running, self.policy.running_key),
        ):
            assert all(key(a) < key(b) for a, b in pairwise(queue)), f"{name} is out of order"
        for request in self.running:
            assert request.status is Status.RUNNING
            assert self.owners[request.slot] == (request, request.generation)
        for request in self.waiting:
            assert request.status is Status.WAITING and request.slot == -1
            assert request.num_computed == 0 and not request.block_ids
