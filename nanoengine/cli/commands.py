"""The commands that plugins register, including nanoengine's own. They are imported only when they are called."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from nanoengine.api.errors import PluginError, shown
from nanoengine.api.plugin_calls import plugin_call
from nanoengine.cli.common import say, user_errors
from nanoengine.setup.plugins.choose import missing_modules
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry
from nanoengine.setup.plugins.targets import TargetLoader

_REGISTRY = "nanoengine.registry"  # key of the registry in the context of the current command line
_COMPLETION = ("install_completion", "show_completion")


def call(name: str, words: Sequence[str]) -> None:
    """Calls a command as if `words` were typed after its name. Raises `typer.Exit`, and what the command raises."""
    registry = discover()
    with _hints(registry, words), Listed(registry, name).make_context(f"nanoengine {name}", list(words)) as context:
        context.command.invoke(context)


class Commands(TyperGroup):
    """The group of all commands of `nanoengine`. Errors that a plugin's command raises are shown as for our own."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(dict.fromkeys(name.split()[0] for name in _registry(ctx).commands))

    def get_command(self, ctx: Any, cmd_name: str) -> Listed:
        return Listed(_registry(ctx), cmd_name)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with user_errors(debug=False):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        words = [*getattr(ctx, "_protected_args", ()), *ctx.args]  # click takes words from its lists
        with user_errors(debug=False), _hints(_registry(ctx), words):
            return super().invoke(ctx)


@contextmanager
def _hints(registry: Registry, words: Sequence[str]) -> Iterator[None]:
    """A context in which click's errors say what to write in the place of an unknown option or a missing configuration.

    They are errors of typer's click, whose classes have no public names.
    """
    try:
        yield
    except Exception as error:
        context: Any = getattr(error, "ctx", None)
        params = () if context is None else [each.name for each in context.command.params]
        if "overrides" in params and hasattr(error, "possibilities"):
            from nanoengine.cli.completion import instead_of_option

            option = str(getattr(error, "option_name", ""))
            error.message += instead_of_option(registry, option, words)  # type: ignore[attr-defined]
        elif "overrides" in params and getattr(getattr(error, "param", None), "name", "") == "config":
            from nanoengine.cli.completion import example_of
            from nanoengine.cli.trace_option import taken_for_a_trace

            taken = taken_for_a_trace(words) if "trace" in params else ""
            error.message = example_of(context.command_path) + taken  # type: ignore[attr-defined]
        raise


def _registry(context: Any) -> Registry:
    """The registry, including the files of `nanoengine --plugin`. Raises `PluginError` for a file that fails."""
    root = context.find_root()
    if _REGISTRY not in root.meta:
        root.meta[_REGISTRY] = discover([Path(each) for each in root.params.get("plugin") or ()])
    found: Registry = root.meta[_REGISTRY]
    return found


class Listed(TyperCommand):
    """A registered command: its name and line of help. A call imports the target and runs it.

    If the name is not available, a call raises `PluginError` with the cause, and a group does not list it.
    """

    def __init__(self, registry: Registry, name: str) -> None:
        self._registry = registry
        self._inner = _inner(registry, name)
        found = registry.commands.get(name)
        # A group that no plugin registers consists of its commands, but not if several plugins register the group.
        self._made = found is None and bool(self._inner) and name not in _not_available(registry)
        listed = found is not None or (self._made and any(n.startswith(f"{name} ") for n in registry.commands))
        self.owners = _owners(registry, name)
        super().__init__(name=name, help=found.spec.help if found else f"Of {self.owners}.", hidden=not listed)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        command = self._load()
        if parent is None or isinstance(parent, command.context_class):
            return command.make_context(info_name, args, parent, **extra)
        command.main(args, prog_name=f"{parent.command_path} {info_name}")  # typer may have its own version of click
        raise AssertionError("click did not end the process")

    def _load(self) -> Any:
        """The target as a command of typer or click, with the commands that other plugins registered for its group."""
        name, registry = str(self.name), self._registry
        inner = {word: Listed(registry, f"{name} {word}") for word in self._inner}
        if self._made:
            commands: dict[str, Any] = dict(inner)
            return TyperGroup(name=name, help=self.help, commands=commands, no_args_is_help=True, rich_markup_mode=None)
        command = load_command(registry, name)
        own = getattr(command, "commands", None)
        for word in [word for word in inner if own is None or word in own]:
            refused, here = inner.pop(word), registry.commands[name].origin
            why = "which is not a group" if own is None else "which has a command of that name"
            say(f"command {refused.name!r} of {refused.owners} is skipped: {name!r} is of {here}, {why}")
        if inner and own is not None:
            command = copy.copy(command)
            command.commands = {**own, **inner}
        return command


def _owners(registry: Registry, name: str) -> str:
    """The plugins that registered the command, or commands of the group, also those that were rejected."""
    claims = [
        *registry.commands.items(),
        *((c.name, each) for c in registry.conflicts if c.kind == "commands" for each in c.claims),
    ]
    return " and ".join(dict.fromkeys(str(c.origin) for n, c in claims if f"{n} ".startswith(f"{name} ")))


def _inner(registry: Registry, name: str) -> list[str]:
    """The names that plugins registered for the group `name`, also unavailable ones, whose call says why."""
    prefix = f"{name} "
    names = [each for each in (*registry.commands, *_not_available(registry)) if each.startswith(prefix)]
    return list(dict.fromkeys(each.removeprefix(prefix).split()[0] for each in names))


def _not_available(registry: Registry) -> list[str]:
    clashes = [conflict.name for conflict in registry.conflicts if conflict.kind == "commands"]
    provided = [failure.provides for failure in registry.failures if failure.provides is not None]
    return [*clashes, *(name for kind, name in provided if kind == "commands" and isinstance(name, str))]


def load_command(registry: Registry, name: str) -> Any:
    """The click command of a registered name.

    Raises `PluginError` if the name or a required module is not available, or if the target cannot be loaded or is no
    command.
    """
    found = registry.require("commands", name)
    if missing := missing_modules(found.spec):
        raise PluginError(f"command {name!r} of {found.origin} {missing}")
    loader = TargetLoader(registry.plugin_files)
    target = loader.load(found.spec.target)
    if not isinstance(target, type) and callable(getattr(target, "make_context", None)):
        return target
    described = f"command {name!r} of {found.origin}: {loader.describe(found.spec.target)}"
    if not isinstance(target, typer.Typer) and (isinstance(target, type) or not callable(target)):
        raise PluginError(f"{described} is {shown(target)}, not a function, typer app or click command")
    with plugin_call(f"{described} cannot be made a typer command", found.spec.target.partition(":")[0]):
        return _of_typer(target)


def _of_typer(target: Any) -> Any:
    """The click command of a typer app or of a function, without typer's options for shell completion."""
    app = target
    if not isinstance(target, typer.Typer):
        app = typer.Typer(rich_markup_mode=None)
        app.command()(target)
    command = typer.main.get_command(app)
    command.params = [each for each in command.params if each.name not in _COMPLETION]
    return command
