"""The steps of a service for some seconds, as a trace."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nanoengine.api.errors import RequestError
from nanoengine.observe.steps import add_observer, remove_observer
from nanoengine.observe.trace import TraceFile

if TYPE_CHECKING:
    from nanoengine.core.delivery import Watch
    from nanoengine.service.loop import EngineService

MOST_SECONDS = 60.0


def traced(service: EngineService, seconds: float) -> bytes:
    """Waits so many seconds. Returns the trace's JSON, as `TraceFile` writes it.

    Raises `RequestError("invalid_seconds")`, and `EngineUnavailable` where the service has ended.
    """
    if not 0 < seconds <= MOST_SECONDS:
        raise RequestError("invalid_seconds", f"a trace takes up to {MOST_SECONDS:g} seconds, not {seconds:g}")
    if not service.is_alive:
        raise service.unavailable()
    with tempfile.TemporaryDirectory(prefix="nanoengine-trace-") as folder:
        path = Path(folder) / "trace.json"
        with TraceFile(path, {"model": service.info.model}) as trace:
            _change(service, partial(add_observer, trace))
            time.sleep(seconds)
            _change(service, partial(remove_observer, trace))
        return path.read_bytes()


def _change(service: EngineService, change: Callable[[Watch | None], Watch | None]) -> None:
    """Returns when the step loop has changed its watch, or has ended."""
    changed = threading.Event()

    def call() -> None:
        service.engine.change_watch(change)
        changed.set()

    service.between_steps(call)
    while service.is_alive and not changed.wait(0.1):
        pass
