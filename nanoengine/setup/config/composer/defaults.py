"""The defaults list of the file that is run, with the command line's choices, as layers in the order of merging."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoengine.api.errors import ConfigError, nearest, shown
from nanoengine.setup.config.composer.overrides import Action, Override, check_name
from nanoengine.setup.config.composer.search_path import SearchPath
from nanoengine.setup.config.composer.yaml_file import ConfigFile, KeyPath

_GROUP = re.compile(r"[\w-]+")


@dataclass(frozen=True, slots=True)
class Shorthand:
    """A group whose option may be a value instead of a file: `model=./folder`, `attention=torch`.

    Attributes:
        key: the section's key that the value is for: `model: x` means `model: {source: x}`.
        accepts: whether an option that no group file has may be taken as that key's value.
        names: such values that are known by name, for did-you-mean.
        otherwise: what else an option may be, for the message.
    """

    key: str
    accepts: Callable[[str], bool]
    names: Sequence[str] = field(default=())
    otherwise: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """Values to merge, from the root of the configuration; `origin(path)` is who gave each: "file:line"."""

    values: dict[Any, Any]
    origin: Callable[[KeyPath], str]


@dataclass(frozen=True, slots=True)
class _Choice:
    """`option`: a file of the folder `group`, or of the root (""). `where`: "file:line", or the override."""

    where: str
    group: str
    option: str


@dataclass(frozen=True, slots=True)
class Defaults:
    """How a defaults list becomes layers. `overrides`: those of the command line that choose an option, by group."""

    search: SearchPath
    shorthands: Mapping[str, Shorthand]
    overrides: Mapping[str, Override]

    def layers(self, file: ConfigFile) -> tuple[list[Layer], list[Override]]:
        """Of the file that is run; and the deletions of groups (`~group`) that its list does not choose.

        Raises `ConfigError`, naming file and line, or the override.
        """
        taken: dict[str, str] = {}  # where each group, file and _self_ is chosen
        layers: list[Layer] = []
        for entry in _entries(file):
            name, override = entry.group or f"- {entry.option}", self.overrides.get(entry.group)
            if name in taken:
                raise _twice(entry, taken[name], entry.where)
            taken[name] = entry.where
            if override is None:
                layers.append(self._layer(file, entry))
            elif override.action is Action.ADD:
                raise _twice(entry, entry.where, override.origin)
            elif override.action is Action.SET:
                layers.append(self._layer(file, _chosen(override)))
        rest = [override for group, override in self.overrides.items() if group not in taken]
        layers += [self._layer(file, _chosen(each)) for each in rest if each.action is not Action.DELETE]
        return layers, [each for each in rest if each.action is Action.DELETE]

    def _layer(self, primary: ConfigFile, choice: _Choice) -> Layer:
        if not choice.group and choice.option == "_self_":
            return self._of_root(primary)
        file = self.search.find(choice.group, choice.option, choice.where)
        if file is None:
            file = self._without_file(choice)
        if file.defaults is not None:
            raise ConfigError(
                f"{file.origin(('defaults',))}: only the file that is run may have a defaults list, but {choice.where} "
                "names this file: list its files there (`nanoengine config show` prints a recipe in one piece)"
            )
        if not choice.group:
            return self._of_root(file)
        return Layer({choice.group: file.data}, lambda path: file.origin(path[1:]))

    def _of_root(self, file: ConfigFile) -> Layer:
        """`model: x` in the body of a file means `model: {source: x}`."""
        values = dict(file.data)
        for name, shorthand in self.shorthands.items():
            if isinstance(values.get(name), str) and "${" not in values[name]:
                values[name] = {shorthand.key: values[name]}
        return Layer(values, file.origin)

    def _without_file(self, choice: _Choice) -> ConfigFile:
        where, group, option, hint = choice.where, choice.group, choice.option, self.search.failure_hint
        shorthand = self.shorthands.get(group)
        if shorthand and shorthand.accepts(option):
            return ConfigFile(where, {shorthand.key: option}, {}, None)
        if group and shorthand is None and not self.search.is_group(group):
            raise ConfigError(f"{where}: no config group {group!r}; {nearest(group, self.search.groups())}{hint}")
        names = [*self.search.options(group), *(shorthand.names if shorthand else ())]
        if not group:
            raise ConfigError(f"{where}: no config file {option!r}; {nearest(option, names)}{hint}")
        other = f", or {shorthand.otherwise}" if shorthand and shorthand.otherwise else ""
        raise ConfigError(f"{where}: no {option!r} in config group {group!r}; {nearest(option, names)}{other}{hint}")


def _twice(entry: _Choice, first: str, second: str) -> ConfigError:
    replace = f"; to replace a choice write {entry.group}=OPTION on the command line" if entry.group else ""
    return ConfigError(f"{first} and {second}: {entry.group or entry.option} is chosen twice{replace}")


def _entries(file: ConfigFile) -> list[_Choice]:
    """The entries of its list; `_self_` is the last where it is missing."""
    raw = [] if file.defaults is None else file.defaults
    if not isinstance(raw, list):
        raise ConfigError(f"{file.origin(('defaults',))}: defaults must be a list, such as '- sampler: greedy'")
    entries = [_entry(item, file.origin(("defaults", index))) for index, item in enumerate(raw)]
    has_self = any(entry.option == "_self_" and not entry.group for entry in entries)
    return entries if has_self else [*entries, _Choice(file.label, "", "_self_")]


def _entry(item: Any, where: str) -> _Choice:
    if isinstance(item, str):
        check_name(item, where)
        return _Choice(where, "", item)
    if isinstance(item, dict) and len(item) == 1:
        [(group, option)] = ((str(key), value) for key, value in item.items())
        check_name(group, where)
        if not _GROUP.fullmatch(group):
            raise ConfigError(f"{where}: {shown(group)} is no name of a group")
        return _Choice(where, group, _option(group, option, where))
    raise ConfigError(
        f"{where}: {shown(item)} is no entry of a defaults list; write '- group: option', '- file' or '- _self_'"
    )


def _chosen(override: Override) -> _Choice:
    value = override.value
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = override.raw  # an option that only looks like a number
    return _Choice(override.origin, override.key, _option(override.key, value, override.origin))


def _option(group: str, value: Any, where: str) -> str:
    """Raises `ConfigError` for what is no name of an option."""
    if value is None or value == "???":
        instead = f"leave the group out, or write {group}=OPTION, or ~{group}, on the command line"
        raise ConfigError(f"{where}: {'null' if value is None else value} chooses no option of {group}: {instead}")
    if isinstance(value, list):
        raise ConfigError(f"{where}: a list of options is not supported: choose one option of {group}")
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"{where}: {shown(value)} is no name of an option; put a name that YAML reads otherwise in quotes"
        )
    if "${" in value:
        raise ConfigError(
            f"{where}: {shown(value)}: interpolation in a defaults list is not supported; name the option"
        )
    return value
