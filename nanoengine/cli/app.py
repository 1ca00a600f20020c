"""The commands and what is common to all."""

from __future__ import annotations

from typing import Annotated

import typer

from nanoengine import __version__
from nanoengine.cli import config, plugins
from nanoengine.cli.chat import chat
from nanoengine.cli.run import run
from nanoengine.lab.cli import bench
from nanoengine.lab.cli.report import report

app = typer.Typer(
    help="A small LLM inference engine whose every replaceable part is a plugin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(run)
app.command()(chat)
app.command()(report)
app.add_typer(bench.app, name="bench")
app.add_typer(config.app, name="config")
app.add_typer(plugins.app, name="plugins")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nanoengine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Runs before every command."""
