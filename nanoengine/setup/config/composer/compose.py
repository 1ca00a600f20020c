"""Files and overrides -> one plain dictionary, interpolated, with the origin of every key."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoengine.api.errors import ConfigError
from nanoengine.setup.config.composer.bounds import MAX_DEPTH
from nanoengine.setup.config.composer.expand import Expansion, Part
from nanoengine.setup.config.composer.grammar import ESCAPE_HINT, Grammar
from nanoengine.setup.config.composer.interpolate import Interpolation, resolved
from nanoengine.setup.config.composer.overrides import Action, Override, apply_override, merge, parse_override
from nanoengine.setup.config.composer.search_path import SearchPath
from nanoengine.setup.config.composer.shorthand import Shorthand
from nanoengine.setup.config.composer.yaml_file import ConfigFile, KeyPath, dotted, parts, walk

Said = tuple[KeyPath, Any, str]
"""A key, the value it was given, and by whom."""

_MAX_SAID = 40_000  # keys and values of all files and overrides
_PARENT: Mapping[str, Any] = {}  # stands for "whatever holds the key that an override names"


@dataclass(frozen=True, slots=True)
class Origin:
    """Who gave a key its value: "file:line" or "override '...'"; and whether that value is a mapping."""

    by: str
    section: bool


@dataclass(frozen=True, slots=True)
class Composed:
    """The outcome of a composition.

    Attributes:
        data: plain containers; only what files and overrides gave.
        origins: who gave each key its value. Parts of keys are text.
        said: every key that any file or override held, even one that was later replaced or deleted.
    """

    data: dict[Any, Any]
    origins: Mapping[tuple[str, ...], Origin]
    said: Sequence[tuple[KeyPath, str]]

    def origin(self, path: KeyPath) -> str:
        """Who gave the key, or its nearest parent, its value."""
        return _origin(self.origins, path)


def compose(
    primary: ConfigFile,
    search: SearchPath,
    overrides: Sequence[str] = (),
    *,
    shorthands: Mapping[str, Shorthand],
    defaults: Mapping[str, Any],
    plain: Collection[str] = (),
) -> Composed:
    """Composes `primary`. Raises `ConfigError` naming file and line, or the override.

    Args:
        shorthands: groups that take plain values. defaults: what interpolation may refer to beside what was given.
        plain: keys that are no groups, even where a folder of that name holds YAML.
    """
    expansion = Expansion(search, shorthands)
    changes: list[Override] = []
    for item in map(parse_override, overrides):
        if item.key not in plain and _is_group(item, search, shorthands):
            expansion.override(item)
        else:
            changes.append(item)
    said, config = _Said(), dict[Any, Any]()
    for part in expansion.primary(primary):
        values, layer = _layer(part, shorthands)
        said.add(layer)
        merge(config, values)
    # `~group` where no defaults list chose it deletes the section, if a file holds it.
    deletions = [item for key, item in expansion.deletions.items() if key not in expansion.deleted]
    for item in [*deletions, *changes]:
        apply_override(config, item)
        if item.action is Action.DELETE:
            said.forget(tuple(parts(item.key)))
        else:
            said.add(_said_by(item))
    data = _resolved(config, defaults, said)
    return Composed(data, said.origins, [(path, origin) for path, _, origin in said.all])


@dataclass
class _Said:
    """What files and overrides say, in order, and who gave each key the value that it has."""

    all: list[Said] = field(default_factory=list)
    origins: dict[tuple[str, ...], Origin] = field(default_factory=dict)
    below: dict[tuple[str, ...], list[tuple[str, ...]]] = field(default_factory=dict)  # the keys in each
    grammar: Grammar = field(default_factory=Grammar)

    def add(self, said: Iterable[Said]) -> None:
        """Raises `ConfigError` for too much, and for a text that holds `${` and is no interpolation."""
        for path, value, by in said:
            self.all.append((path, value, by))
            if len(self.all) > _MAX_SAID:
                raise ConfigError(f"{by}: files and overrides hold more than {_MAX_SAID:,} values in all")
            if isinstance(value, str) and "${" in value and (why := self.grammar.check(value)):
                raise ConfigError(f"{by}: {dotted(path)}: {why}{ESCAPE_HINT}")
            if len(path) > MAX_DEPTH:
                raise ConfigError(f"{by}: {dotted(path)[:100]}…: more than {MAX_DEPTH} deep")
            self._record(path, value, by)

    def _record(self, path: KeyPath, value: Any, by: str) -> None:
        key = tuple(map(str, path))
        old = self.origins.get(key)
        if old is not None and (value == "???" or value is _PARENT):
            return  # "must be given" does not replace what was given
        section = isinstance(value, Mapping)
        if section and old is not None and old.section:
            return  # two mappings are merged; all else is replaced
        self.forget(key)
        self.origins[key] = Origin(by, section)
        self.below.setdefault(key[:-1], []).append(key)

    def forget(self, key: tuple[str, ...]) -> None:
        """The key, and all below it."""
        todo = [key]
        while todo:
            each = todo.pop()
            self.origins.pop(each, None)
            todo += self.below.pop(each, ())


def _is_group(item: Override, search: SearchPath, shorthands: Mapping[str, Shorthand]) -> bool:
    if (item.key in shorthands or search.is_group(item.key)) and not isinstance(item.value, dict):
        return True
    if "/" in item.key:
        raise ConfigError(f"{item.origin}: no config group {item.key!r}; groups: {', '.join(search.groups())}")
    return False


def _layer(part: Part, shorthands: Mapping[str, Shorthand]) -> tuple[dict[Any, Any], list[Said]]:
    """A part's values, nested below its group, and what it says."""
    prefix = tuple(part.group.split("/")) if part.group else ()
    data: dict[Any, Any] = dict(part.file.data)
    if not prefix:
        for name, shorthand in shorthands.items():
            if isinstance(data.get(name), str) and data[name] != "???" and "${" not in data[name]:
                data[name] = {shorthand.key: data[name]}
    said: list[Said] = [((*prefix, *path), value, part.file.origin(path)) for path, value in walk(data)]
    for depth in range(len(prefix), 0, -1):
        data = {prefix[depth - 1]: data}
        said.insert(0, (prefix[:depth], data, part.file.label))
    return data, said


def _said_by(item: Override) -> list[Said]:
    path = tuple(parts(item.key))
    above: list[Said] = [(path[:depth], _PARENT, item.origin) for depth in range(1, len(path))]
    below: list[Said] = [((*path, *rest), value, item.origin) for rest, value in walk(item.value)]
    return [*above, (path, item.value, item.origin), *below]


def _origin(origins: Mapping[tuple[str, ...], Origin], path: KeyPath) -> str:
    key = tuple(map(str, path))
    while key and key not in origins:
        key = key[:-1]
    return origins[key].by if key else "configuration"


def _resolved(config: dict[Any, Any], defaults: Mapping[str, Any], said: _Said) -> dict[Any, Any]:
    """Plain containers with every interpolation done; only the keys of `config`."""
    full: dict[Any, Any] = {}
    merge(full, defaults)
    merge(full, config)
    try:
        return resolved(full, config, said.grammar)
    except Interpolation as error:
        raise ConfigError(f"{_origin(said.origins, error.path)}: {dotted(error.path)}: {error}") from error
