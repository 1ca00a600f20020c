"""Which request goes first, and which one is preempted: order only, no resources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from nanoengine.api.errors import ConfigError, nearest
from nanoengine.core.request import Request


class Policy(ABC):
    """Orders requests. Keys are compared with `<`; the scheduler keeps both queues sorted by them."""

    @abstractmethod
    def waiting_key(self, request: Request) -> tuple[int, ...]:
        """Order of admission; unique, and constant. A preempted request returns to the place its key names."""

    @abstractmethod
    def running_key(self, request: Request) -> tuple[int, ...]:
        """Order in which running requests share the token budget; unique, and constant while it runs."""

    def tier(self, request: Request) -> int:
        """Within a tier, requests take turns when the budget is too small for all; a lower tier goes first."""
        return 0

    def victim(self, running: Sequence[Request]) -> Request:
        """The request that is preempted when blocks run out; `running` is sorted by `running_key`."""
        return running[-1]


class FCFS(Policy):
    """First come, first served. The last admitted one is preempted."""

    def waiting_key(self, request: Request) -> tuple[int, ...]:
        return (request.arrival, request.order)

    def running_key(self, request: Request) -> tuple[int, ...]:
        return (request.admission,)


class PriorityPolicy(Policy):
    """A lower value goes first, then the earlier arrival. The worst priority is preempted, then the latest arrival.

    As in vLLM, priorities order the queue and choose the victim when a running request lacks blocks; a waiting request
    never drives out a running one just because its priority is better.
    """

    def waiting_key(self, request: Request) -> tuple[int, ...]:
        return (request.priority, request.arrival, request.order)

    running_key = waiting_key

    def tier(self, request: Request) -> int:
        return request.priority


POLICIES: Mapping[str, type[Policy]] = {"fcfs": FCFS, "priority": PriorityPolicy}


def make_policy(name: str) -> Policy:
    """Raises `ConfigError` for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"scheduling_policy={name!r} is unknown: {nearest(name, POLICIES)}")
    return POLICIES[name]()
