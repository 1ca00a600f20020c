"""A rank in the engine's process: the rank's process, and the engine's end of its channel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from nanoengine.distributed.channel import STACK_SIGNAL, Channel, Kind, Parcel, anonymous_memory, read_all

_MODULE = "nanoengine.distributed.worker"
_ASK_SECONDS, _TERMINATE_SECONDS, _SETTLE_SECONDS, _STACK_SECONDS = 5.0, 2.0, 1.0, 1.0


class RankProcess:
    """The process of a rank. Making it starts the process; `close` waits for its end and frees resources."""

    def __init__(self, rank: int, memory_fd: int, environment: Mapping[str, str]) -> None:
        """`environment`: the whole environment of the process. Raises `OSError` if it cannot be started."""
        self.rank = rank
        self.announced = self.supplied = 0  # the last plan, and the last plan with columns, that a frame was sent for
        self.channel, theirs = Channel.pair()
        self._stack_fd, self._stack_start = anonymous_memory(f"nanoengine-stack-{rank}", 0), 0
        try:
            inherited = (theirs.fileno(), memory_fd, self._stack_fd)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard error: what a plugin prints must not be in the program's output
                pass_fds=inherited,
                env=dict(environment),
                process_group=0,  # so that Ctrl-C in a terminal reaches only the engine
            )
        except BaseException:
            self._close_ends()
            raise
        finally:
            theirs.close()

    def send(self, kind: Kind, number: int = 0, parcel: Parcel | None = None) -> None:
        """Sends a frame. Errors are ignored: if the rank is gone, the next wait for it raises `WorkerError`."""
        with suppress(OSError):
            self.channel.send(kind, number, parcel)

    def ask_for_stack(self) -> None:
        """Makes the rank write the stacks of all its threads, also of one that hangs in foreign code; see `stack`."""
        self._stack_start = os.fstat(self._stack_fd).st_size
        self._signal(STACK_SIGNAL)

    def stack(self, deadline: float) -> str:
        """The stacks after `ask_for_stack`; waits for them until `deadline`."""
        size = last = self._stack_start
        while (size == self._stack_start or size > last) and time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
            last, size = size, os.fstat(self._stack_fd).st_size
        return self.written_stack() or "(no stack: its Python does not run yet)"

    def written_stack(self) -> str:
        """The stack of the last `ask_for_stack`, or the one that it wrote when a signal such as SIGSEGV ended it."""
        text = read_all(self._stack_fd)[self._stack_start :].decode(errors="replace")
        threads = [thread for thread in text.split("\n\n") if thread.strip() and " in _watch\n" not in thread]
        return "\n\n".join(threads)

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def status(self) -> int | None:
        """Its exit status, if it has ended or ends in a moment; None if it still runs."""
        try:
            return self.process.wait(_SETTLE_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Waits for the process and closes the descriptors. Idempotent."""
        self.process.wait()
        self._close_ends()

    def _close_ends(self) -> None:
        self.channel.close()
        fd, self._stack_fd = self._stack_fd, -1
        if fd >= 0:
            os.close(fd)


def stacks(ranks: Sequence[RankProcess]) -> list[str]:
    """The stacks of each rank, as Python tracebacks."""
    for rank in ranks:
        rank.ask_for_stack()
    deadline = time.monotonic() + _STACK_SECONDS
    return [rank.stack(deadline) for rank in ranks]


def end(ranks: Sequence[RankProcess], *, ask: bool) -> None:
    """Ends all processes and waits for them. With `ask`, they may finish their step first, and are then terminated.

    Processes that are still running are killed.
    """
    if ask:
        for rank in ranks:
            rank.send(Kind.STOP)
        if not _ended(ranks, _ASK_SECONDS):
            for rank in ranks:
                rank._signal(signal.SIGTERM)
            _ended(ranks, _TERMINATE_SECONDS)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.close()


def _ended(ranks: Sequence[RankProcess], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def environment(threads: int) -> dict[str, str]:
    """The environment of a rank: that of this process, with this process's import path."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
