"""One thread that makes calls in their order: a CPU's stream.

Not `concurrent.futures`, whose locks are taken by Python code: an interrupt (Ctrl-C) between a lock's taking and the
block that gives it back leaves it held for good. Here all that the caller waits for is a call in C.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from nanoengine.api.errors import EngineClosed

_LOOK_SECONDS = 0.1  # an interrupted wait may have taken the gate with it


class Call:
    """A call that was handed over."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function: Callable[[], Any] | None = function
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def result(self) -> Any:
        """What it returned, once it has; raises what it raised, or `EngineClosed` if it was dropped."""
        while self._outcome is None:
            self._gate.acquire(timeout=_LOOK_SECONDS)
        value, error = self._outcome
        if error is None:
            return value
        try:
            raise error
        finally:
            del self, error  # the traceback holds this frame

    def _run(self) -> None:
        function, self._function = self._function, None
        assert function is not None
        try:
            self._end(function(), None)
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._end(None, error)
        finally:
            del self, function  # as in `result`

    def _end(self, value: Any, error: BaseException | None) -> None:
        self._outcome = (value, error)
        self._gate.release()

    def _drop(self) -> None:
        self._function = None
        self._end(None, EngineClosed("the engine was closed before this was run"))


class StepThread:
    """Ends with `close`, when it is collected, or with the interpreter, whichever comes first."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._calls,), name=name, daemon=True)
        self._thread.start()
        self._unattended = weakref.finalize(self, _end, self._calls, self._thread)

    def submit(self, function: Callable[[], Any]) -> Call:
        """Does not wait."""
        call = Call(function)
        self._calls.put(call)
        return call

    def close(self) -> None:
        """Waits for the call that runs, and drops those behind it. Idempotent."""
        self._unattended()


def _serve(calls: SimpleQueue[Call | None]) -> None:
    while (call := calls.get()) is not None:
        call._run()
        del call  # what it returned is not kept until the next one


def _end(calls: SimpleQueue[Call | None], thread: threading.Thread) -> None:
    while True:
        try:
            call = calls.get_nowait()
        except Empty:
            break
        if call is not None:
            call._drop()
    calls.put(None)
    if thread is not threading.current_thread():
        thread.join()
