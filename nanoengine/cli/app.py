"""The app `nanoengine`: the registered commands, and the options that all have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanoengine import __version__
from nanoengine.cli.commands import Commands

app = typer.Typer(
    cls=Commands,
    help="A small LLM inference engine. Every part that you may want to replace is a plugin.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nanoengine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin", metavar="FILE", is_eager=True, help="A plugin in a Python file, for its commands and parts."
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options before a command."""
