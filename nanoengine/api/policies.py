"""The interface of scheduling policies: which waiting request is admitted next, and in which order those that run share
a step. Imports no torch.

A policy only orders. It owns no request, no slot and no KV block, and it cannot change what a request draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

Key = tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRequest:
    """What a policy knows about one sample of a request. It does not change while the sample lives.

    Attributes:
        id: of the request, with the number of the sample: "req-7/0".
        client: who asks; "" if it is not known.
        priority: lower is more urgent.
        arrival: running number of the request: lower came earlier. Samples of one request have the same.
        num_prompt_tokens: tokens of the prompt. max_tokens: most tokens that it may generate.
    """

    id: str
    client: str = ""
    priority: int = 0
    arrival: int = 0
    num_prompt_tokens: int = 1
    max_tokens: int = 1


class Policy:
    """Base class of scheduling policies. One instance per engine, in the process that schedules.

    What a method raises for a request fails this request alone, with the error code "policy_failed".

    Class attributes:
        by_arrival: requests are admitted in the order in which they are added, whatever else comes. So an engine may
            begin before all requests of a batch are added.
    """

    by_arrival: ClassVar[bool] = False

    def __init__(self, params: Any) -> None:
        """`params`: an instance of `PolicySpec.params`, with the values of the configuration."""
        self.params = params

    def waiting_key(self, request: QueuedRequest) -> Key:
        """The place of a request in the queue: lower is admitted earlier, and of equal ones the earlier arrival.

        Asked once, when the request is added: a request that is preempted returns to this place. Integers and strings,
        of the same types for all requests. Default: arrival alone decides.
        """
        return ()

    def running_key(self, request: QueuedRequest) -> Key:
        """The place of a request among those that run, asked at each admission; of equal ones the earlier admitted.

        If blocks run out, the last one is preempted. Requests with the same first item take turns if a step has too few
        tokens for all of them; those with a lower one go first. At least one item. Default: all are equal.
        """
        return (0,)

    def next_key(self) -> Key:
        """The next request to be admitted is the first one with a `waiting_key` of at least this.

        Asked before each admission, so it may change while keys do not: with a key that begins with the client, it may
        name a client. Default: the first request of the queue.
        """
        return ()

    def queued(self, request: QueuedRequest, returned: bool) -> None:
        """The request waits from now on. returned: it was admitted before, and was preempted."""

    def left(self, request: QueuedRequest) -> None:
        """The request waits no more: it was admitted, or it has ended."""

    def served(self, request: QueuedRequest, prompt: int, generated: int) -> None:
        """Tokens that were computed for the request: of its prompt, without those that the prefix cache held; generated
        ones. The prompt is counted once, at the first admission; tokens that a preemption makes the engine compute
        again are not counted."""
