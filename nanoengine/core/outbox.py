"""Outputs and step records on their way from the engine to whoever wants them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from nanoengine.api.errors import is_failure
from nanoengine.core.request import RequestOutput
from nanoengine.observe.steps import Delivery

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
        if raised:
            raise raised[0]
