"""The plugin that registers nanoengine's own commands (those of `lab` are registered there)."""

from __future__ import annotations

from nanoengine.api.hooks import hookimpl
from nanoengine.api.specs import CommandSpec


@hookimpl
def register_commands() -> list[CommandSpec]:
    commands = (
        ("run", "run:command", "Answer the prompts of a configuration."),
        ("chat", "chat:chat", "Talk with a model."),
        ("config", "config:app", "Look at configurations."),
        ("plugins", "plugins:app", "Look at plugins, or start a new one."),
    )
    return [
        CommandSpec(name=name, target=f"nanoengine.cli.{target}", help=text, api=1) for name, target, text in commands
    ]
