"""Files and overrides -> one plain dictionary, interpolated, with the origin of every key."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nanoengine.api.errors import ConfigError
from nanoengine.setup.config.composer.bounds import MAX_DEPTH
from nanoengine.setup.config.composer.defaults import Defaults, Layer, Shorthand
from nanoengine.setup.config.composer.interpolate import Interpolation, resolved
from nanoengine.setup.config.composer.overrides import Action, Override, apply_override, merged, parse_override
from nanoengine.setup.config.composer.search_path import SearchPath
from nanoengine.setup.config.composer.yaml_file import ConfigFile, KeyPath, dotted, walk

_MAX_GIVEN = 40_000  # keys and values of all files and overrides


@dataclass(frozen=True, slots=True)
class Composed:
    """The outcome of a composition.

    Attributes:
        data: plain containers; only what files and overrides gave.
        origins: who gave each of its keys: "file:line", or "override '...'".
        given: every key that any file or override held, even one that was later replaced or deleted, and by whom.
    """

    data: dict[Any, Any]
    origins: Mapping[KeyPath, str]
    given: Sequence[tuple[KeyPath, str]]

    def origin(self, path: KeyPath) -> str:
        """Who gave the key, or its nearest parent, its value."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins[path] if path else "configuration"


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
        shorthands: groups that take plain values. defaults: what interpolation may refer to besides what was given.
        plain: keys that are no groups, even where a folder of that name holds YAML.
    """
    choices: dict[str, Override] = {}
    changes: list[Override] = []
    for item in map(parse_override, overrides):
        if item.key not in plain and (item.key in shorthands or search.is_group(item.key)) and _is_option(item.value):
            first = choices.get(item.key, item)
            if first.raw != item.raw and Action.DELETE not in (first.action, item.action):
                raise ConfigError(f"{first.origin} and {item.origin}: {item.key} is chosen twice; leave one out")
            choices[item.key] = item
        else:
            changes.append(item)
    layers, deletions = Defaults(search, shorthands, choices).layers(primary)
    record, config = _Record(), dict[Any, Any]()
    for layer in layers:
        record.add(layer)
        config = merged(config, layer.values)
    for item in [*deletions, *changes]:
        record.change(item)
        config = apply_override(config, item)
    composed = Composed(config, record.of(config), record.given)
    try:
        return replace(composed, data=resolved(config, merged(defaults, config)))
    except Interpolation as error:
        raise ConfigError(f"{composed.origin(error.path)}: {dotted(error.path)}: {error}") from error


def _is_option(value: Any) -> bool:
    return not isinstance(value, dict) and not (isinstance(value, str) and "${" in value)


@dataclass
class _Record:
    """Every key that files and overrides gave, in order, and who gave each key the value that it has."""

    given: list[tuple[KeyPath, str]] = field(default_factory=list)
    latest: dict[KeyPath, tuple[str, bool]] = field(default_factory=dict)  # who, and whether a mapping

    def add(self, layer: Layer) -> None:
        """Raises `ConfigError` for too much."""
        for path, value in walk(layer.values):
            by = layer.origin(path)
            self.given.append((path, by))
            if len(self.given) > _MAX_GIVEN:
                raise ConfigError(f"{by}: files and overrides hold more than {_MAX_GIVEN:,} values in all")
            if len(path) > MAX_DEPTH:
                raise ConfigError(f"{by}: {dotted(path)[:100]}…: more than {MAX_DEPTH} deep")
            is_mapping = isinstance(value, Mapping)
            if not (is_mapping and self.latest.get(path, ("", False))[1]):  # two mappings are merged
                self.latest[path] = (by, is_mapping)

    def change(self, item: Override) -> None:
        if item.action is Action.DELETE:
            depth = len(item.path)
            self.latest = {path: by for path, by in self.latest.items() if path[:depth] != item.path}
        else:
            self.add(Layer(item.values, lambda _: item.origin))

    def of(self, config: Mapping[Any, Any]) -> dict[KeyPath, str]:
        """Who gave each key of `config`, which is composed of what was added."""
        return {path: self.latest[path][0] for path, _ in walk(config)}
