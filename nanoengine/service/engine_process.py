"""`EngineProcess`: an engine's process, as its starter sees it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

from nanoengine.api import errors
from nanoengine.api.errors import EngineUnavailable, NanoEngineError
from nanoengine.distributed.exits import exit_words
from nanoengine.service.client import EngineInfo
from nanoengine.service.control import Control, Message
from nanoengine.service.frames import info_from_json
from nanoengine.service.source import EngineSource

MODULE = "nanoengine.service.process"
_END_SECONDS = 10.0


class EngineProcess:
    """A process with one engine. It ends when this object's control socket closes, also by the end of this process.

    `start` may be called outside of an event loop. The other methods run in one event loop at a time.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: Control) -> None:
        self.process, self.control = process, control

    @classmethod
    def start(cls, source: EngineSource, *, log_level: str = "warning") -> EngineProcess:
        """Starts the process; see `wait_ready`. Raises `OSError`."""
        control, theirs = Control.pair()
        try:
            process = subprocess.Popen(
                [*python(MODULE), str(theirs.fileno()), "untied"], **process_options(theirs.fileno())
            )
        except BaseException:
            control.close()
            raise
        finally:
            theirs.close()
        control.send("start", source=source.to_json(), log_level=log_level)
        return cls(process, control)

    async def wait_ready(self) -> EngineInfo:
        """Waits until requests can be added.

        Raises the error with which the engine could not start, of the same class where that is one of nanoengine's;
        `EngineUnavailable` where the process ended without one.
        """
        while (message := await self.control.receive()) is not None:
            if message.kind == "ready":
                return info_from_json(message.fields["info"])
            if message.kind == "failed":
                raise start_error(message)
        raise EngineUnavailable(f"the engine's process ended before it was ready: {exit_words(await self.status())}")

    def connect(self) -> socket.socket:
        """A new client's socket, for `RemoteClient.connect`. Raises `OSError` where the process has ended."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.control.send("client", fd=theirs.fileno())
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    async def status(self) -> int:
        """Waits for its end."""
        return await asyncio.to_thread(self.process.wait)

    def close(self) -> None:
        """End the process and wait for it. Idempotent."""
        self.control.close()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_error(message: Message) -> NanoEngineError:
    """The error of a message `failed`."""
    name, text = message.fields["error"], message.fields["message"]
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, NanoEngineError):
        with suppress(TypeError):  # one that takes more than a message
            return kind(text)
        return NanoEngineError(text)
    return NanoEngineError(f"the engine could not start: {text}\n{message.fields['traceback']}".rstrip())


def python(module: str) -> list[str]:
    """The command of a module of nanoengine."""
    return [sys.executable, "-P", "-m", module]


def process_options(*fds: int) -> dict[str, Any]:
    """Arguments of `subprocess.Popen` for a process that inherits `fds` and this one's import path."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {
        "stdin": subprocess.DEVNULL,
        "stdout": 2,  # standard error: what a plugin prints must not be in the program's output
        "pass_fds": fds,
        "env": {**os.environ, "PYTHONPATH": path},
        "process_group": 0,  # so that Ctrl-C in a terminal reaches only this process
    }
