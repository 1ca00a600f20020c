"""Files and overrides -> one plain dictionary, interpolated, with the origin of every key."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoengine.api.errors import ConfigError
from nanoengine.setup.config.composer.expand import Expansion, Part
from nanoengine.setup.config.composer.interpolate import Interpolation, resolved
from nanoengine.setup.config.composer.overrides import Action, Override, apply_override, merge, parse_override
from nanoengine.setup.config.composer.search_path import SearchPath
from nanoengine.setup.config.composer.shorthand import Shorthand
from nanoengine.setup.config.composer.yaml_file import ConfigFile, KeyPath, dotted, parts, walk

Said = tuple[KeyPath, Any, str]
"""A key, the value it was given, and by whom."""

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
    values: Collection[str] = (),
) -> Composed:
    """Composes `primary`. Raises `ConfigError` naming file and line, or the override.

    Args:
        shorthands: groups that take plain values. defaults: what interpolation may refer to beside what was given.
        values: keys that are no groups, even where a folder of that name holds YAML.
    """
    expansion = Expansion(search, shorthands)
    changes: list[Override] = []
    for item in map(parse_override, overrides):
        if item.key not in values and _is_group(item, search, shorthands):
            expansion.override(item)
        else:
            changes.append(item)
    layers = [_layer(part, shorthands) for part in expansion.primary(primary)]
    config: dict[Any, Any] = {}
    for data, _ in layers:
        merge(config, data)
    said = [each for _, layer in layers for each in layer]
    # `~group` where no defaults list chose it deletes the section, if a file holds it.
    deletions = [item for key, item in expansion.deletions.items() if key not in expansion.deleted]
    origins = _apply(config, [*deletions, *changes], said)
    return Composed(_resolved(config, defaults, origins), origins, [(path, origin) for path, _, origin in said])


def _apply(config: dict[Any, Any], changes: Iterable[Override], said: list[Said]) -> dict[tuple[str, ...], Origin]:
    """Changes `config`, adds what the overrides say to `said`, and gives the origin of every key."""
    origins: dict[tuple[str, ...], Origin] = {}
    _record(origins, said)
    for item in changes:
        apply_override(config, item)
        if item.action is Action.DELETE:
            _forget(origins, tuple(parts(item.key)))
        else:
            new = _said_by(item)
            said += new
            _record(origins, new)
    return origins


def _is_group(item: Override, search: SearchPath, shorthands: Mapping[str, Shorthand]) -> bool:
    if (item.key in shorthands or search.is_group(item.key)) and not isinstance(item.value, dict):
        return True
    if item.package is not None or "/" in item.key:
        raise ConfigError(f"{item.origin}: no config group {item.key!r}; groups: {', '.join(search.groups())}")
    return False


def _layer(part: Part, shorthands: Mapping[str, Shorthand]) -> tuple[dict[Any, Any], list[Said]]:
    """A part's values, nested below its package, and what it says."""
    prefix = tuple(part.package.split(".")) if part.package else ()
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


def _record(origins: dict[tuple[str, ...], Origin], said: Iterable[Said]) -> None:
    for path, value, by in said:
        key = tuple(map(str, path))
        old = origins.get(key)
        if value == "???" and old is not None:
            continue  # "must be given" does not replace what was given
        if value is _PARENT and old is not None:
            continue
        section = isinstance(value, Mapping)
        if not (section and old is not None and old.section):  # two mappings are merged; all else is replaced
            if old is not None:
                _forget(origins, key)
            origins[key] = Origin(by, section)


def _forget(origins: dict[tuple[str, ...], Origin], key: tuple[str, ...]) -> None:
    for old in [each for each in origins if each[: len(key)] == key]:
        del origins[old]


def _origin(origins: Mapping[tuple[str, ...], Origin], path: KeyPath) -> str:
    key = tuple(map(str, path))
    while key and key not in origins:
        key = key[:-1]
    return origins[key].by if key else "configuration"


def _resolved(
    config: dict[Any, Any], defaults: Mapping[str, Any], origins: Mapping[tuple[str, ...], Origin]
) -> dict[Any, Any]:
    """Plain containers with every interpolation done; only the keys of `config`."""
    full: dict[Any, Any] = {}
    merge(full, defaults)
    merge(full, config)
    try:
        return resolved(full, config)
    except Interpolation as error:
        raise ConfigError(f"{_origin(origins, error.path)}: {dotted(error.path)}: {error}") from error
