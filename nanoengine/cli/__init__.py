"""The command line, one file a command. Torch is imported only by what runs a model, and is given its threads before.

Exit status: 0; 1 if any request failed or results could not be written; 2 for a mistake of usage or configuration;
130 when interrupted, 143 when terminated.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point of `nanoengine`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell started it deaf to Ctrl-C
        signal.signal(signal.SIGINT, _interrupt_once)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt_once)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each takes the lowest number that is free
        if getattr(sys, name) is None:  # closed by the caller: what is said goes nowhere, results are written
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives
    try:
        from nanoengine.cli.threads import Chooser

        chooser = Chooser()
        from nanoengine.cli.app import app

        chooser.settle(os.environ)
        app(prog_name="nanoengine")
    except KeyboardInterrupt as interrupt:  # before a command had begun
        from nanoengine.cli.common import ending

        sys.exit(ending(interrupt)[1])
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C or SIGTERM ends the command; further ones must not break into its closing, which is short."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if number == signal.SIGTERM:
        from nanoengine.cli.common import Terminated

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated
    raise KeyboardInterrupt
