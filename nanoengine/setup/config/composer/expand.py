"""Defaults lists, nested, with group overrides -> the flat order in which files are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nanoengine.api.errors import ConfigError, nearest
from nanoengine.setup.config.composer.entries import Entry, check_package, parse_entries, parse_options
from nanoengine.setup.config.composer.overrides import Action, Override
from nanoengine.setup.config.composer.search_path import SearchPath
from nanoengine.setup.config.composer.shorthand import Shorthand
from nanoengine.setup.config.composer.yaml_file import ConfigFile

_MAX_FILES, _MAX_NESTED = 500, 32


@dataclass(frozen=True, slots=True)
class Part:
    """A file, and the dotted package that its values are put under ("": the root)."""

    file: ConfigFile
    package: str


@dataclass
class _Choice:
    """What an override chose for a group. `appendable`: it came from outside, and may be added at the end."""

    options: tuple[str, ...]
    where: str
    entry: Entry
    appendable: bool = False
    used: bool = False


@dataclass
class Expansion:
    """One composition's walk over the defaults lists.

    A list is walked from its end, because an `override` entry, or one in a file further down, changes what stands
    before it. What came first keeps its word: the command line, then the outer list.
    """

    search: SearchPath
    shorthands: Mapping[str, Shorthand]
    choices: dict[str, _Choice] = field(default_factory=dict)
    deletions: dict[str, Override] = field(default_factory=dict)
    appended: list[Entry] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)  # key -> where
    deleted: set[str] = field(default_factory=set)
    files: int = 0

    def override(self, item: Override) -> None:
        """Takes a group override of the command line."""
        package = check_package(item.package, item.origin) if item.package is not None else None
        options = () if item.action is Action.DELETE else _options(item)
        entry = Entry(item.origin, item.key, item.key, options, package=package)
        key = entry.key("")
        if item.action is Action.FORCE:
            raise ConfigError(f"{item.origin}: ++ is not supported for a group; write {key}= or +{key}=")
        if item.action is Action.DELETE:
            self.deletions[key] = item
        elif item.action is Action.ADD:
            self.appended.append(entry)
        else:
            self.choices[key] = _Choice(options, item.origin, entry, appendable=True)

    def primary(self, file: ConfigFile) -> list[Part]:
        """The user's file and all it draws in, in merging order. Raises `ConfigError`, naming file and line."""
        package = Entry(file.label, "", "", (), is_group=False).final_package("", _header(file))
        parts = self._expand(file, "", package, ())
        for choice in self.choices.values():
            if not choice.used and not choice.appendable:
                known = nearest(choice.entry.key(""), self.chosen)
                raise ConfigError(f"{choice.where}: no group to override is called {choice.entry.group!r}; {known}")
        for entry in self.appended:
            parts += self._entry(entry, package, ())
        # Where the lists lack the group, `group=option` is taken for `+group=option`.
        for choice in [each for each in self.choices.values() if not each.used]:
            parts += self._entry(choice.entry, package, ())
        return parts

    def _expand(self, file: ConfigFile, folder: str, package: str, stack: tuple[str, ...]) -> list[Part]:
        self.files += 1
        if self.files > _MAX_FILES or len(stack) > _MAX_NESTED:
            raise ConfigError(
                f"{file.label}: defaults lists draw in more than {_MAX_FILES} files, or more than {_MAX_NESTED} deep"
            )
        entries = parse_entries(file, folder)
        for entry in entries:
            if entry.override:
                self.choices.setdefault(entry.key(package), _Choice(entry.options, entry.where, entry))
        parts: list[list[Part]] = []
        for entry in reversed(entries):
            if entry.is_self:
                parts.append([Part(file, package)])
            elif not entry.override:
                parts.append(self._entry(entry, package, stack))
        return [part for group in reversed(parts) for part in group]

    def _entry(self, entry: Entry, parent: str, stack: tuple[str, ...]) -> list[Part]:
        if entry.is_group:
            key = entry.key(parent)
            if self._is_deleted(key, entry):
                return []
            if key in self.choices and entry.where != self.choices[key].where:
                choice = self.choices[key]
                choice.used = True
                entry = entry.choosing(choice.options, choice.where)
            alone = len(entry.options) < 2  # lists of options may be added to
            if alone and key in self.chosen:
                raise ConfigError(
                    f"{self.chosen[key]} and {entry.where}: {key} is chosen twice; to replace a choice write "
                    f"{key}=option on the command line, or 'override {key}: option' in a list"
                )
            if alone:
                self.chosen[key] = entry.where
        parts: list[list[Part]] = [self._option(entry, option, parent, stack) for option in reversed(entry.options)]
        return [part for group in reversed(parts) for part in group]

    def _is_deleted(self, key: str, entry: Entry) -> bool:
        if key not in self.deletions:
            return False
        wanted = self.deletions[key]
        if wanted.has_value and _options(wanted) != entry.options:
            return False
        self.deleted.add(key)
        return True

    def _option(self, entry: Entry, option: str, parent: str, stack: tuple[str, ...]) -> list[Part]:
        if option == "???":
            valid = nearest("", self._names(entry.group))
            raise ConfigError(f"{entry.where}: {entry.key(parent)} must be chosen: {entry.key(parent)}=OPTION. {valid}")
        name = f"{entry.group}/{option}" if entry.group else option
        file = self.search.find(name)
        if file is None:
            return self._without_file(entry, option, parent)
        if name in stack:
            raise ConfigError(f"{entry.where}: {' -> '.join([*stack, name])} draws itself in")
        return self._expand(file, name.rpartition("/")[0], entry.final_package(parent, _header(file)), (*stack, name))

    def _without_file(self, entry: Entry, option: str, parent: str) -> list[Part]:
        shorthand = self.shorthands.get(entry.group)
        if shorthand and shorthand.accepts(option):
            return [Part(ConfigFile(entry.where, {shorthand.key: option}, {}, None, None), entry.final_package(parent))]
        if entry.optional:
            return []
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


def _header(file: ConfigFile) -> str | None:
    """The package of the file's header, which is always meant from the root."""
    if file.package is None:
        return None
    package = check_package(file.package, f"{file.label}: @package")
    return package if package.startswith("_global_") else f"_global_.{package}"


def _options(item: Override) -> tuple[str, ...]:
    plain = isinstance(item.value, int | float) and not isinstance(item.value, bool)
    return parse_options(item.raw if plain else item.value, item.origin)
