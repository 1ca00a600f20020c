"""Runs chat templates in separate processes, which are killed when they take too long: see template_child.py."""

from __future__ import annotations

import marshal
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanoengine.api.errors import EngineClosed, NanoEngineError, RequestError

_CHILD = Path(__file__).with_name("template_child.py")
_START_SECONDS = 60.0
_PROCESSES = 2  # the second one starts when the first is busy, so a slow template delays no other


class TemplateProcesses:
    """Renders templates. Processes start with the first template, and end with `close`, this object or this process.

    Several threads may use it. A fork of this process may too, and starts its own processes.

    Args:
        seconds: the time limit of a rendering.
        memory: bytes that a process may use in addition to what it uses when idle. They include the resulting text.
    """

    def __init__(self, seconds: float = 5.0, memory: int = 512 << 20) -> None:
        self._seconds, self._memory = seconds, memory
        self._closed = False
        self._open_pool()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text that `template` produces. `variables`: of JSON's types, nested no deeper than `marshal` supports.

        Raises `RequestError("invalid_prompt")` with the template's own message and line, or if it takes too long or too
        much memory; `EngineClosed` after `close`.
        """
        if self._closed:
            raise EngineClosed
        if self._owner != os.getpid():
            self._open_pool()  # this is a fork: a thread that does not exist here may hold the old locks
        with self._places:
            process = self._take()
            try:
                try:
                    text = process.render(template, variables, self._seconds)
                except _EndedIdle:  # it ended while idle, maybe just before this template: a new process runs it
                    process = _Process(self._memory)
                    text = process.render(template, variables, self._seconds)
            except BaseException as error:
                if isinstance(error, _Refused):
                    self._idle.append(process)
                    raise RequestError("invalid_prompt", f"the chat template rejected the messages: {error}") from error
                process.end()
                raise
            self._idle.append(process)
            return text

    def close(self) -> None:
        """Ends the processes. Idempotent."""
        self._closed = True
        _end_all(self._idle, self._owner)

    def _open_pool(self) -> None:
        self._owner = os.getpid()
        self._places = threading.Semaphore(_PROCESSES)
        self._idle: deque[_Process] = deque()
        weakref.finalize(self, _end_all, self._idle, self._owner)

    def _take(self) -> _Process:
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                return _Process(self._memory)
            if process.lives():
                return process
            process.end()


def _end_all(idle: deque[_Process], owner: int) -> None:
    while idle and os.getpid() == owner:
        with suppress(IndexError):  # another thread may have taken the last one
            idle.pop().end()


class _Refused(Exception):
    """The template raised an error; the message is the template's."""


class _EndedIdle(Exception):
    """A process that has answered before does not answer any more."""


class _Process:
    """A child process, and this process' end of its socket."""

    answered = False

    def __init__(self, memory: int) -> None:
        """Raises `NanoEngineError` if it cannot be started."""
        self._memory = memory
        self._socket, theirs = socket.socketpair()
        try:
            with theirs:
                self._child = _started(theirs, memory)
        except OSError as error:
            self._socket.close()
            raise NanoEngineError(f"the process that runs chat templates cannot be started: {error}") from error
        try:
            self._receive(len(b"ready"), time.monotonic() + _START_SECONDS)
        except BaseException as error:
            self.end()
            if isinstance(error, OSError | EOFError):
                raise NanoEngineError(
                    f"the process that runs chat templates did not start ({self._status()}): does "
                    f"`{sys.executable} {_CHILD} {memory}` run, and does it find jinja2?"
                ) from error
            raise

    def render(self, template: str, variables: Mapping[str, Any], seconds: float) -> str:
        """The rendered text. Raises `_Refused`; after any other error the process cannot be used again."""
        try:
            request = marshal.dumps((template, dict(variables), seconds))
        except ValueError as error:
            raise _Refused(f"messages or arguments that cannot be passed to it: {error}") from error
        deadline = time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(len(request).to_bytes(8, "little") + request)
            header = self._receive(9, deadline)
            size = int.from_bytes(header[1:], "little")
            if header[:1] == b"m" or size > self._memory:
                raise MemoryError
            text = self._receive(size, deadline).decode("utf-8", "surrogatepass")
        except TimeoutError as error:
            raise self._failed(f"took longer than {seconds:g} s (chat_template_timeout)") from error
        except MemoryError as error:
            raise self._failed(f"took more than {self._memory >> 20} MiB (chat_template_memory)") from error
        except (OSError, EOFError) as error:
            self.end()
            if self.answered:
                raise _EndedIdle from error
            raise self._failed(f"ended its process ({self._status()})") from error
        self.answered = True
        if header[:1] != b"+":
            raise _Refused(text)
        return text

    def lives(self) -> bool:
        return self._child.poll() is None

    def end(self) -> None:
        """Kills the process and waits for it. Idempotent."""
        self._child.kill()
        self._child.wait()
        self._socket.close()

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            self._socket.settimeout(max(1e-6, deadline - time.monotonic()))
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return bytes(data)

    def _failed(self, how: str) -> RequestError:
        return RequestError("invalid_prompt", f"the chat template failed: it {how}")

    def _status(self) -> str:
        status = self._child.poll()
        return signal.Signals(-status).name if status is not None and status < 0 else f"exit status {status}"


def _started(its_end: socket.socket, memory: int) -> subprocess.Popen[bytes]:
    """Starts the child, with the import path of this process. Raises `OSError`."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", str(_CHILD), str(memory)],
        stdin=its_end.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        process_group=0,  # so that Ctrl-C in a terminal does not reach it
    )
