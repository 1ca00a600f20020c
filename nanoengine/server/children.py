"""A process of the server, as the supervisor sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from nanoengine.service.control import Control, Message
from nanoengine.service.engine_process import process_options

_KILL_SECONDS = 5.0


class Child:
    """A process with a control socket: `python -m MODULE CONTROL [ARGUMENTS]`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, control: Control) -> None:
        self.name, self.process, self.control = name, process, control
        self.pid = process.pid

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], *, arguments: Sequence[str] = (), fds: Sequence[int] = ()
    ) -> Child:
        """Starts `command` with the number of its control socket, and then `arguments`. `fds`: what it inherits.

        Raises `OSError`.
        """
        control, theirs = Control.pair()
        try:
            process = await asyncio.create_subprocess_exec(
                *command, str(theirs.fileno()), *arguments, **process_options(theirs.fileno(), *fds)
            )
        except BaseException:
            control.close()
            raise
        finally:
            theirs.close()
        return cls(name, process, control)

    def send(self, kind: str, /, fd: int | None = None, **fields: Any) -> None:
        """Sends a message. A process that is gone does not get it: who waits for it notices its end."""
        with suppress(OSError):
            self.control.send(kind, fd, **fields)

    async def receive(self) -> Message | None:
        """The next message. None: it has ended, or will in a moment."""
        try:
            return await self.control.receive()
        except OSError:
            return None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()

    async def end(self, seconds: float) -> int:
        """Closes the control socket, upon which it ends; kills it if it still runs after `seconds`. Its status."""
        self.control.close()
        try:
            return await asyncio.wait_for(asyncio.shield(self.process.wait()), seconds)
        except TimeoutError:
            self.kill()
            return await self.process.wait()

    async def status(self) -> int:
        """Its exit status, once it has closed its control socket; it is killed if it does not end."""
        return await self.end(_KILL_SECONDS)
