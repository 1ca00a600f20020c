"""What the commands share: options, and how errors are shown."""

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
from nanoengine.setup.config.config import BARE

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model's answer must not control the terminal
FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143

_FIRST = "nanoengine.first_override"  # key in the context: the override that stands where a configuration may be
_OVERRIDE = re.compile(r"(\+\+?|~)?[^\W\d][\w.-]*=")


def is_override(word: str) -> bool:
    """Whether it is `key=value`, and not the name of a file that is there."""
    return bool(_OVERRIDE.match(word)) and not os.path.exists(word)


def _configuration(context: typer.Context, given: str) -> str:
    """The configuration; an override in its place belongs to the recipe `bare`: `nanoengine run model=NAME`."""
    if not is_override(given):
        return given
    context.meta[_FIRST] = given
    return BARE


def _with_the_first(context: typer.Context, given: list[str] | None) -> list[str]:
    first = context.meta.pop(_FIRST, None)
    return [*([] if first is None else [first]), *(given or ())]


def _complete_configuration(incomplete: str) -> list[str]:
    from nanoengine.cli.completion import configurations

    return configurations(incomplete)


def _complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    from nanoengine.cli.completion import overrides

    return overrides(ctx.params.get("overrides") or [], incomplete)


ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG|RECIPE|MODEL",
        help="A YAML file, a shipped recipe such as quickstart, or a model such as smollm2-135m.",
        callback=_configuration,
        autocompletion=_complete_configuration,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OVERRIDES]...",
        help="key=value, +key=value, ++key=value, ~key or group=option; for example sampler.top_p=0.9 model=./folder",
        show_default=False,
        callback=_with_the_first,
        autocompletion=_complete_override,
    ),
]


def _with_those_before(context: typer.Context, files: list[Path] | None) -> list[Path]:
    """The files of `nanoengine --plugin A COMMAND --plugin B`: both."""
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
    """SIGTERM. The command ends as after Ctrl-C: with a message, and keeps what has finished."""


class ResultsLost(NanoEngineError):
    """Results could not be written while prompts ran, e.g. because the disk is full."""


@contextmanager
def user_errors(debug: bool) -> Iterator[None]:
    """A context that turns errors into one message and an exit status.

    2 for a `NanoEngineError`, 1 for lost results, 130 for Ctrl-C, 143 for SIGTERM. Other exceptions are bugs and are
    raised on.
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
    """A context in which log messages of the engine are on separate lines above a progress bar; all with `debug`."""
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
    """A word for the interrupt, and the exit status."""
    return ("terminated", TERMINATED) if isinstance(interrupt, Terminated) else ("interrupted", INTERRUPTED)


def say(text: str, file: TextIO | None = None, *, style: Callable[[str], str] | None = None) -> None:
    """Writes a line to standard error, or to `file`. Characters that cannot be shown are escaped.

    If standard error cannot be written, only the line is lost. Raises `OSError` for another `file`. `style`: applied to
    the escaped text.
    """
    out = sys.stderr if file is None else file
    try:
        shown = printable(text, out)
        print(shown if style is None else style(shown), file=out, flush=True)
    except (OSError, ValueError):  # there is no reader, the disk is full, or it is closed
        abandon(out)
        if file is not None:
            raise


def answer(text: str, end: str = "\n") -> None:
    """Writes the result of a command to standard output.

    Raises `ResultsLost`, and `BrokenPipeError` if there is no reader any more; then the command ends without a message,
    as usual.
    """
    try:
        print(printable(text, sys.stdout), end=end, flush=True)
    except (OSError, ValueError) as error:
        abandon(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        cause = error.strerror if isinstance(error, OSError) else error
        raise ResultsLost(f"cannot write to standard output: {cause}") from error


def abandon(out: TextIO) -> None:
    """Discards everything that is written to `out`, also its buffer, which the interpreter would fail to flush."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), out.fileno())


def printable(text: str, out: TextIO) -> str:
    """The text with characters escaped that `out` cannot encode, and on a terminal also control characters."""
    encoding = out.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text) if out.isatty() else text
