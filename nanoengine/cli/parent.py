"""A combination of a sweep ends with the sweep, however the sweep ends: also by SIGKILL, which it cannot pass on.

The sweep holds one end of a pipe, and its death closes it. What is read from the other end is that death, as between an
engine and its ranks.
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
_PATIENCE = 60.0  # seconds that a combination has to end in words when the sweep is interrupted
_ORPHANS_PATIENCE = 20.0  # the same where the sweep is gone


def run_child(command: Sequence[str], environment: Mapping[str, str], folder: Path, log: IO[Any]) -> int:
    """Runs a process in `folder` to its end; its exit status, a negative one is a signal's number.

    It ends with this process. Ctrl-C and SIGTERM are passed on, and raised once it has ended.
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
    """In a combination of a sweep: ends this process when the sweep's is gone. Elsewhere it does nothing."""
    number = int(os.environ.pop(_PIPE, "-1"))  # this process's own children do not get it
    if number >= 0:
        os.set_inheritable(number, False)
        threading.Thread(target=_watch, args=(number,), name="nanoengine-sweep", daemon=True).start()


def _watch(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM)  # to end in words, with what had finished
    time.sleep(_ORPHANS_PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)  # its ranks end with it
