"""`nanoengine sweep`: runs every combination of the overrides' values. `nanoengine run --multirun` calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanoengine.cli.common import ConfigArgument, DebugOption, OverridesArgument, PluginOption, user_errors
from nanoengine.cli.trace_option import trace_option, traced_command
from nanoengine.lab.cli import multirun


def sweep(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    plugin: PluginOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a sweep: give its folder.")] = False,
    trace: Annotated[
        Path | None,
        trace_option("Name of a file for the timeline, in each combination's folder."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print each phase of the starts, into each run.log.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Run every combination of the overrides' values: model=a,b engine.seed=1,2."""
    with user_errors(debug):
        options = [*(["--verbose"] if verbose else []), *(["--debug"] if debug else [])]
        status = multirun.sweep(config, overrides or (), plugin or (), resume=resume, options=options, trace=trace)
        if status:
            raise typer.Exit(status)


command = traced_command(sweep)
