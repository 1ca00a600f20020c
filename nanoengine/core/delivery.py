"""Outputs and step records on their way from the engine to its clients."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanoengine.api.errors import is_failure
from nanoengine.core.outputs import RequestOutput, RequestState
from nanoengine.core.request import Request
from nanoengine.core.scheduling.messages import ScheduledStep, Update
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import StepResult

Delivery = tuple[Callable[[Any], None], Any]


class Watch:
    """Does nothing: no observer is there. The engine calls these in the order of a step's life; see `StepWatch`."""

    def scheduling(self) -> None:
        """The next step is about to be scheduled."""

    def scheduled(self, step: ScheduledStep, scheduler: Scheduler) -> None:
        """A step was scheduled, and is about to be launched."""

    def launched(self, step: ScheduledStep) -> None:
        """The step was launched."""

    def waiting(self) -> None:
        """The engine is about to wait for the oldest step."""

    def arrived(self, step: ScheduledStep) -> None:
        """The step's result is there, and is about to be committed."""

    def updated(self, updates: Sequence[Update], known: Mapping[str, RequestState]) -> None:
        """What commit or schedule brought; `known` has taken it in."""

    def ended(self, request: Request, reason: str) -> None:
        """A request was aborted, or failed."""

    def committed(self, step: ScheduledStep, result: StepResult) -> Sequence[Delivery]:
        """The step is committed; gives the records to hand out."""
        return ()

    def broken(self, steps: Sequence[ScheduledStep], error: BaseException) -> Sequence[Delivery]:
        """These steps raised, and are not committed; gives the records to hand out."""
        return ()

    def forget(self) -> None:
        """What was scheduled is lost: the engine was interrupted."""


Sink = Callable[[RequestOutput], None]


class Outbox:
    """Clients are called by `deliver` alone, once a step is booked: what they do must not meet it half booked.

    Attributes:
        ready: outputs without a sink, which `take_ready` gives.
    """

    def __init__(self, sink_failed: Callable[[RequestOutput, BaseException], None]) -> None:
        """`sink_failed`: called with the output that a sink did not take, and with what the sink raised."""
        self.ready: list[RequestOutput] = []
        self._sink_failed = sink_failed
        self._undelivered: deque[tuple[Delivery, bool]] = deque()  # True: an output, False: a record

    def put(self, output: RequestOutput, sink: Sink | None) -> None:
        if sink is None:
            self.ready.append(output)
        else:
            self._undelivered.append(((sink, output), True))

    def put_records(self, records: Sequence[Delivery]) -> None:
        self._undelivered += [(record, False) for record in records]

    def take_ready(self) -> list[RequestOutput]:
        ready, self.ready = self.ready, []
        return ready

    def deliver(self) -> None:
        """Call each client with its news, in order. What an observer raises first is raised once all are served."""
        raised: list[BaseException] = []
        while self._undelivered:
            (client, news), is_output = self._undelivered.popleft()
            try:
                client(news)
            except BaseException as error:
                if not is_failure(error):
                    raise
                if is_output:
                    self._sink_failed(news, error)
                else:
                    raised.append(error)
        if raised and isinstance(raised[0], StopIteration):  # would end a stream as if all had come
            raise RuntimeError("an observer raised StopIteration") from raised[0]
        if raised:
            raise raised[0]
