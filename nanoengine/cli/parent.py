"""Ends a combination of a sweep when the sweep ends, even by SIGKILL, which the sweep cannot pass on.

The sweep has one end of a pipe, which is closed when the sweep ends. The combination reads the other end, as the ranks
of an engine do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from nanoengine.cli.common import ending

_PIPE = "NANOENGINE_SWEEP_PIPE"
_PATIENCE = 60.0  # seconds that a combination has to end normally when the sweep is interrupted
_ORPHANS_PATIENCE = 20.0  # seconds that it has if the sweep has ended


def run_child(command: Sequence[str], environment: Mapping[str, str], folder: Path, log: IO[Any]) -> int:
    """Runs a process in `folder`. Returns its exit status; a negative one is the number of a signal.

    The process ends when this process ends. Ctrl-C and SIGTERM are passed on to it, and raised when it has ended.
    """
    ours = theirs = -1
    if sys.platform != "win32":
        theirs, ours = os.pipe()
    inherited = () if theirs < 0 else (theirs,)
    try:
        process = subprocess.Popen(
            command, cwd=folder, env={**environment, _PIPE: str(theirs)}, pass_fds=inherited,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip
        try:
            return process.wait()
        except BaseException as error:
            word = ending(error)[0] if isinstance(error, KeyboardInterrupt) else ""
            process.send_signal(signal.SIGINT if word == "interrupted" else signal.SIGTERM)
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    finally:
        for end in (ours, theirs):
            if end >= 0:
                os.close(end)


def end_with_parent() -> None:
    """Ends this process when the sweep that started it has ended. Does nothing if no sweep started it."""
    number = int(os.environ.pop(_PIPE, "-1"))  # removed, so that the children of this process do not get it
    if number >= 0:
        os.set_inheritable(number, False)
        threading.Thread(target=_watch, args=(number,), name="nanoengine-sweep", daemon=True).start()


def _watch(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM)  # it ends with a message, and keeps what has finished
    time.sleep(_ORPHANS_PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)  # its ranks end too
