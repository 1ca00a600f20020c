"""What the commands share: options, and how a user's mistake is shown."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, TextIO

import typer

from nanoengine.api.errors import NanoEngineError

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model's answer must not drive the terminal
FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG|RECIPE", help="A YAML file, or a shipped recipe such as quickstart.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OVERRIDES]...",
        help="key=value, +key=value, ++key=value, ~key or group=option; for example sampler.top_p=0.9 model=./folder",
        show_default=False,
    ),
]


def _with_those_before(context: typer.Context, files: list[Path] | None) -> list[Path]:
    """`nanoengine --plugin A COMMAND --plugin B` means both."""
    return [Path(each) for each in (*(context.find_root().params.get("plugin") or ()), *(files or ()))]


PluginOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        help="A plugin in a Python file. May be given several times.",
        callback=_with_those_before,
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Terminated(KeyboardInterrupt):
    """SIGTERM: someone ends the process. It ends as with Ctrl-C, in words, with what had finished."""


class ResultsLost(NanoEngineError):
    """Results could not be written while prompts ran: the disk is full, or the like."""


@contextmanager
def user_errors(debug: bool) -> Iterator[None]:
    """A user's mistake becomes one message and exit status 2, lost results 1, Ctrl-C 130, SIGTERM 143.

    All else is a bug.
    """
    try:
        yield
    except NanoEngineError as error:
        if debug:
            say(traceback.format_exc())
        say(f"error: {error}")
        raise typer.Exit(FAILED if isinstance(error, ResultsLost) else USAGE) from error
    except KeyboardInterrupt as interrupt:
        word, status = ending(interrupt)
        say(word)
        raise typer.Exit(status) from interrupt


@contextmanager
def shown_beside_bars(debug: bool) -> Iterator[None]:
    """What the engine logs goes on lines of its own, above a progress bar; all of it with `debug`."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    logger = logging.getLogger("nanoengine")
    level = logger.level
    if debug:
        logger.setLevel(logging.DEBUG)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.setLevel(level)


def ending(interrupt: KeyboardInterrupt) -> tuple[str, int]:
    """In a word, and as exit status."""
    return ("terminated", TERMINATED) if isinstance(interrupt, Terminated) else ("interrupted", INTERRUPTED)


def say(text: str, file: TextIO | None = None, *, style: Callable[[str], str] | None = None) -> None:
    """A line to the user, next to the answers (standard error) or as one; what cannot be shown is escaped.

    Where standard error cannot be written, what is said is lost and nothing else. Raises `OSError` for another `file`.
    `style`: put around it, once it is escaped.
    """
    out = sys.stderr if file is None else file
    try:
        shown = printable(text, out)
        print(shown if style is None else style(shown), file=out, flush=True)
    except (OSError, ValueError):  # its reader has gone, the disk is full; it was closed
        abandon(out)
        if file is not None:
            raise


def answer(text: str, end: str = "\n") -> None:
    """What was asked for, to standard output. Raises `ResultsLost`, and `BrokenPipeError` where its reader has gone:
    then the command ends without a word, as is usual."""
    try:
        print(printable(text, sys.stdout), end=end, flush=True)
    except (OSError, ValueError) as error:
        abandon(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        cause = error.strerror if isinstance(error, OSError) else error
        raise ResultsLost(f"cannot write to standard output: {cause}") from error


def abandon(out: TextIO) -> None:
    """Nothing goes there any more: neither what is buffered, at whose flush the interpreter would fail as it ends."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), out.fileno())


def printable(text: str, out: TextIO) -> str:
    """What `out` can show: characters beyond its encoding are escaped, and control characters on a terminal."""
    encoding = out.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text) if out.isatty() else text
