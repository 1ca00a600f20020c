"""One client, as the service knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanoengine.service.client import ClientRequest
from nanoengine.service.contracts import Batch, Output

if TYPE_CHECKING:
    from nanoengine.service.loop import EngineService
    from nanoengine.service.queue import OpenRequest


class Member:
    """One client of the service, as the service knows it: its open requests, by keys that the client chooses."""

    def __init__(self, service: EngineService, output: Output) -> None:
        self.service, self.output = service, output
        self.open: dict[int, OpenRequest] = {}
        self.batch: Batch = []  # the step loop's own

    def add(self, key: int, request: ClientRequest, *, resumed: bool = False) -> None:
        """Add a request. Its deltas carry `key`, which no other open request of this client has.

        `resumed`: it ran in an engine before, so no limit refuses it. Raises as `EngineClient.add` does.
        """
        self.service.add(self, key, request, resumed=resumed)

    def abort(self, key: int, sample: int | None = None) -> None:
        """End a request, or one of its samples. No effect where it has ended."""
        entry = self.open.get(key)
        if entry is not None:
            self.service.end(entry, sample)

    def leave(self) -> None:
        """The client is gone: all its requests are aborted, and its output is not called again. Idempotent."""
        self.service.quit(self)
