"""Commands that examine and measure an engine. They are registered by the same hook as a package's commands."""

from __future__ import annotations

from nanoengine.api.hooks import hookimpl
from nanoengine.api.specs import CommandSpec


@hookimpl
def register_commands() -> list[CommandSpec]:
    doctor = "Check whether nanoengine can run here: environment, GPU, plugins, attention backends."
    commands = (
        ("bench", "bench:app", "Measure the engine."),
        ("report", "report:report", "Make an HTML page of the results of a run or a sweep."),
        ("sweep", "sweep:command", "Run every combination of the overrides' values."),
        ("config explain", "explain:explain", "Print what keys of a configuration mean: type, default, range."),
        ("doctor", "doctor:doctor", doctor),
        ("plugins doctor", "doctor:doctor", doctor),
        ("plugins new", "new_plugin:new", "Write a plugin package that installs, runs and passes its tests."),
    )
    return [
        CommandSpec(name=name, target=f"{__name__}.cli.{target}", help=text, api=1) for name, target, text in commands
    ]
