"""The command line, one file per command. Only commands that run a model import torch, after its threads are chosen.

Exit status: 0 for success; 1 if a request failed or results could not be written; 2 for a mistake in usage or
configuration; 130 after Ctrl-C; 143 after SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point of `nanoengine`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if the shell disabled Ctrl-C for it
        signal.signal(signal.SIGINT, _interrupt_once)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt_once)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each gets the lowest free descriptor
        if getattr(sys, name) is None:  # closed by the caller: messages are lost, results are written
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends
    try:
        from nanoengine.cli.threads import Chooser

        chooser = Chooser()
        from nanoengine.cli.app import app

        chooser.settle(os.environ)
        app(prog_name="nanoengine")
    except KeyboardInterrupt as interrupt:  # before a command has started
        from nanoengine.cli.common import ending

        sys.exit(ending(interrupt)[1])
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C or SIGTERM ends the command. Further ones are ignored, because the command is ending already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if number == signal.SIGTERM:
        from nanoengine.cli.common import Terminated

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated
    raise KeyboardInterrupt
