"""The control socket between the supervisor and its processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanoengine.service.control import Control

_CHILD = """
import asyncio, os, sys
from nanoengine.service.control import inherit
async def main():
    control = inherit(int(sys.argv[1]))
    control.send("up", pid=os.getpid())
    while await control.receive() is not None: pass
asyncio.run(main())
"""
_PARENT = f"""
import asyncio, os, sys, time
from nanoengine.service.control import Control
async def main():
    control, theirs = Control.pair()
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", {_CHILD!r}, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    print((await control.receive()).fields["pid"], flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_messages_keep_their_order_and_their_descriptors(tmp_path: Path) -> None:
    async def main() -> None:
        here, there = Control.pair()
        other = Control(there)
        for n in range(3):
            (tmp_path / str(n)).write_text(f"file {n}")
            with (tmp_path / str(n)).open() as file:
                here.send("plain", n=n, text="é\n" * 40_000)
                here.send("with a file", file.fileno(), n=n)
            plain, carrying = await other.receive(), await other.receive()
            assert plain is not None
            assert carrying is not None
            assert (plain.kind, plain.fields["n"], len(plain.fields["text"]), plain.fd) == ("plain", n, 80_000, None)
            assert carrying.fd is not None
            assert not os.get_inheritable(carrying.fd)
            with os.fdopen(carrying.fd) as file:
                assert file.read() == f"file {n}"
        here.close()
        assert await other.receive() is None
        with pytest.raises(OSError, match="closed"):
            await other.receive()

    asyncio.run(main())


def test_descriptors_that_are_never_read_are_closed(tmp_path: Path) -> None:
    async def main() -> None:
        here, there = Control.pair()
        read, write = os.pipe()
        for _ in range(3):
            here.send("take this", write)
        os.close(write)
        other = Control(there)
        first = await other.receive()
        assert first is not None
        assert first.fd is not None
        os.close(first.fd)
        other.close()
        assert os.read(read, 1) == b""  # no copy of the other end is left
        os.close(read)

    asyncio.run(main())


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_ends_with_its_supervisor_even_if_it_is_stopped(stopped: bool) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, signal.SIGTERM)  # the supervisor's to handle: it has no effect
    os.kill(pid, signal.SIGINT)
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_message_to_an_end_that_is_gone_raises_and_leaves_nothing() -> None:
    """Outside of an event loop, too; the descriptor that was to go with it is closed."""
    before = set(os.listdir("/proc/self/fd"))
    control, theirs = Control.pair()
    theirs.close()
    for _ in range(2):
        with open(os.devnull) as file, pytest.raises(BrokenPipeError):
            control.send("client", file.fileno())
    control.close()
    control.close()
    assert set(os.listdir("/proc/self/fd")) == before
