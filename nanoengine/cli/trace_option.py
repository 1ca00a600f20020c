"""The option `--trace [FILE]` of `run` and `sweep`, which may stand alone: then the file is `trace.json`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from nanoengine.cli.common import is_override

_TRACE, _FILE = "--trace", "trace.json"
_REMOVAL = re.compile(r"~[^\W\d][\w.-]*$")  # an override that removes a key; `~name` alone is a folder, so no trace


def with_trace_file(words: Sequence[str]) -> list[str]:
    """The words of a command line with `--trace=trace.json` where `--trace` has no file of its own behind it: an option
    follows, an override, or nothing."""
    end = words.index("--") if "--" in words else len(words)
    following = zip(words[:end], [*words[1:], "--"], strict=False)
    found = [f"{_TRACE}={_FILE}" if word == _TRACE and not _is_file(after) else word for word, after in following]
    return [*found, *words[end:]]


def _is_file(word: str) -> bool:
    return word == "-" or not (word.startswith("-") or is_override(word) or _REMOVAL.match(word))


class TracedCommand(TyperCommand):
    """A command with the option `--trace [FILE]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        found: list[str] = super().parse_args(ctx, with_trace_file(args))
        return found


def traced_command(function: Callable[..., None]) -> typer.Typer:
    """The function as an app of one command, a `TracedCommand`."""
    app = typer.Typer(rich_markup_mode=None)
    app.command(cls=TracedCommand)(function)
    return app


def trace_option(help_: str) -> Any:
    return typer.Option(_TRACE, metavar="[FILE]", help=f"{help_} Without a name it is {_FILE}.")


def trace_words(trace: Path | None) -> list[str]:
    """The option, as words of another command line."""
    return [] if trace is None else [f"{_TRACE}={trace}"]


def taken_for_a_trace(words: Sequence[str]) -> str:
    """Of a command line without a configuration: that `--trace` took a word, if it did."""
    words = with_trace_file(words)
    if _TRACE not in words:
        return ""
    return f". The word behind {_TRACE} is its file; it may also be written {_TRACE}=FILE, or stand at the end"
