"""Defaults lists, nested, with group overrides -> the flat order in which files are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from nanoengine.api.errors import ConfigError, nearest
from nanoengine.setup.config.composer.entries import Entry, parse_entries, parse_options
from nanoengine.setup.config.composer.overrides import Action, Override
from nanoengine.setup.config.composer.search_path import SearchPath
from nanoengine.setup.config.composer.shorthand import Shorthand
from nanoengine.setup.config.composer.yaml_file import ConfigFile

_MAX_FILES, _MAX_NESTED = 500, 32


@dataclass(frozen=True, slots=True)
class Part:
    """A file, and the group whose section its values fill ("": the root)."""

    file: ConfigFile
    group: str


@dataclass
class Expansion:
    """One composition's walk over the defaults lists; the command line's choices replace theirs."""

    search: SearchPath
    shorthands: Mapping[str, Shorthand]
    choices: dict[str, Entry] = field(default_factory=dict)
    deletions: dict[str, Override] = field(default_factory=dict)
    appended: list[Entry] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)  # group -> where
    deleted: set[str] = field(default_factory=set)
    files: int = 0

    def override(self, item: Override) -> None:
        """Takes a group override of the command line."""
        if item.action is Action.FORCE:
            raise ConfigError(f"{item.origin}: ++ is not supported for a group; write {item.key}= or +{item.key}=")
        if item.action is Action.DELETE:
            self.deletions[item.key] = item
        elif item.action is Action.ADD:
            self.appended.append(Entry(item.origin, item.key, _options(item)))
        else:
            self.choices[item.key] = Entry(item.origin, item.key, _options(item))

    def primary(self, file: ConfigFile) -> list[Part]:
        """The user's file and all it draws in, in merging order. Raises `ConfigError`, naming file and line."""
        parts = self._expand(file, "", ())
        # Where the lists lack the group, `group=option` is taken for `+group=option`.
        for entry in [*self.appended, *(each for each in self.choices.values() if each.group not in self.chosen)]:
            parts += self._entry(entry, ())
        return parts

    def _expand(self, file: ConfigFile, group: str, stack: tuple[str, ...]) -> list[Part]:
        self.files += 1
        if self.files > _MAX_FILES or len(stack) > _MAX_NESTED:
            raise ConfigError(
                f"{file.label}: defaults lists draw in more than {_MAX_FILES} files, or more than {_MAX_NESTED} deep"
            )
        parts: list[Part] = []
        for entry in parse_entries(file, group):
            parts += [Part(file, group)] if entry.is_self else self._entry(entry, stack)
        return parts

    def _entry(self, entry: Entry, stack: tuple[str, ...]) -> list[Part]:
        if entry.is_group:
            if self._is_deleted(entry):
                return []
            options = self.choices.get(entry.group, entry)
            entry = replace(entry, where=options.where, options=options.options)
            if entry.group in self.chosen:
                raise ConfigError(
                    f"{self.chosen[entry.group]} and {entry.where}: {entry.group} is chosen twice; to replace a choice "
                    f"write {entry.group}=option on the command line"
                )
            self.chosen[entry.group] = entry.where
        return [part for option in entry.options for part in self._option(entry, option, stack)]

    def _is_deleted(self, entry: Entry) -> bool:
        wanted = self.deletions.get(entry.group)
        if wanted is None or (wanted.has_value and _options(wanted) != entry.options):
            return False
        self.deleted.add(entry.group)
        return True

    def _option(self, entry: Entry, option: str, stack: tuple[str, ...]) -> list[Part]:
        if option == "???":
            valid = nearest("", self._names(entry.group))
            raise ConfigError(f"{entry.where}: {entry.group} must be chosen: {entry.group}=OPTION. {valid}")
        name = f"{entry.group}/{option}" if entry.group else option
        file = self.search.find(name, entry.where)
        if file is None:
            return self._without_file(entry, option)
        if name in stack:
            raise ConfigError(f"{entry.where}: {' -> '.join([*stack, name])} draws itself in")
        return self._expand(file, name.rpartition("/")[0], (*stack, name))

    def _without_file(self, entry: Entry, option: str) -> list[Part]:
        shorthand = self.shorthands.get(entry.group)
        if shorthand and shorthand.accepts(option):
            return [Part(ConfigFile(entry.where, {shorthand.key: option}, {}, None), entry.group)]
        if not entry.group:
            known = nearest(option, self.search.options(""))
            raise ConfigError(f"{entry.where}: no config file {option!r}; {known}{self.search.suspects}")
        if shorthand is None and not self.search.is_group(entry.group):
            known = nearest(entry.group, self.search.groups())
            raise ConfigError(f"{entry.where}: no config group {entry.group!r}; {known}{self.search.suspects}")
        other = f", or {shorthand.otherwise}" if shorthand and shorthand.otherwise else ""
        raise ConfigError(
            f"{entry.where}: no {option!r} in config group {entry.group!r}; "
            f"{nearest(option, self._names(entry.group))}{other}{self.search.suspects}"
        )

    def _names(self, group: str) -> Sequence[str]:
        shorthand = self.shorthands.get(group)
        return [*self.search.options(group), *(shorthand.names if shorthand else ())]


def _options(item: Override) -> tuple[str, ...]:
    plain = isinstance(item.value, int | float) and not isinstance(item.value, bool)
    return parse_options(item.raw if plain else item.value, item.origin)
