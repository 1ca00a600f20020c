"""One YAML file: its values as plain containers, the line each key stands on, its header and its defaults list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from nanoengine.core.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""Keys from the root; list items by their index."""

# omegaconf's own limit, 10,000 nodes, is for strangers' files; a list of prompts may well be longer.
_MAX_NODES = 2_000_000
_HEADER = re.compile(r"#\s*@package\s+(\S+)\s*$")
_LINE_BREAK = re.compile("[\n\x85\u2028\u2029]")  # YAML 1.1's
_LOADER: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"
_INSTANTIATION = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A YAML file, read.

    Attributes:
        label: how messages name it. data: its values, uninterpolated, without the defaults list.
        lines: the line of every key, from 1, by its path with every part as text.
        package: what its `# @package` header says, if there is one.
        defaults: the raw defaults list; None if there is none.
    """

    label: str
    data: dict[Any, Any]
    lines: Mapping[tuple[str, ...], int]
    package: str | None
    defaults: Any

    def origin(self, path: KeyPath = ()) -> str:
        """ "file:line" of a key, or of the nearest parent that has a line of its own."""
        key = tuple(map(str, path))
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.label}:{self.lines[key]}" if key else self.label


def dotted(path: KeyPath) -> str:
    """The path as it is written in overrides and messages: "engine.seed", "prompts[0]"."""
    text = ""
    for part in path:
        text += f"[{part}]" if text and isinstance(part, int) else f".{part}" if text else str(part)
    return text


def parts(key: str) -> list[str]:
    """The inverse of `dotted`, every part as text: "prompts[0]" -> ["prompts", "0"]."""
    return re.findall(r"[^.\[\]]+", key)


def walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key below `value` with what stands there; list items count as keys."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key), item
        yield from walk(item, (*path, key))


def refuse_instantiation(value: Any, where: str) -> None:
    """Raises `ConfigError` on Hydra's `_target_` and its like: YAML runs no code here."""
    for path, _ in walk(value):
        if path[-1] in _INSTANTIATION:
            raise ConfigError(
                f"{where}: {dotted(path)}: {path[-1]} is not supported: nothing in YAML is instantiated; "
                "replaceable parts are plugins (see `nanoengine plugins list`)"
            )


def read_yaml(path: Path, label: str) -> ConfigFile:
    """Reads a file. Raises `ConfigError` naming file and line where it is no YAML mapping of plain values."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {label}: {error}") from error
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise _syntax_error(label, error, text) from error
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return ConfigFile(label, {}, {}, _header(text), None)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{label}:{node.start_mark.line + 1}: a configuration file is a mapping of keys to values")
    lines = dict(_lines(node, ()))
    data = _values(text, label, lines)
    defaults = data.pop("defaults", None)
    file = ConfigFile(label, data, lines, _header(text), defaults)
    if "hydra" in data:
        raise ConfigError(f"{file.origin(('hydra',))}: settings of Hydra itself (hydra:) are not supported")
    refuse_instantiation(data, label)
    return file


def _values(text: str, label: str, lines: Mapping[tuple[str, ...], int]) -> dict[Any, Any]:
    try:
        loaded = OmegaConf.create(text, max_yaml_expanded_nodes=_MAX_NODES)
        data = OmegaConf.to_container(loaded, resolve=False)
    except yaml.YAMLError as error:
        raise _syntax_error(label, error, text) from error
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        place = ConfigFile(label, {}, lines, None, None).origin(tuple(parts(key)))
        raise ConfigError(f"{place}: {key}: {first_line(error)}{interpolation_hint(error)}") from error
    assert isinstance(data, dict)
    return data


def first_line(error: Exception) -> str:
    """omegaconf's message without its table of node types."""
    return str(error).split("\n")[0]


def interpolation_hint(error: Exception) -> str:
    """How a text that only looks like an interpolation is written."""
    kinds = (InterpolationResolutionError, UnsupportedInterpolationType, GrammarParseError)
    return r". A text that holds ${ is written with a backslash: \${" if isinstance(error, kinds) else ""


def _syntax_error(label: str, error: yaml.YAMLError, text: str) -> ConfigError:
    if not isinstance(error, yaml.MarkedYAMLError):
        return ConfigError(f"{label}: not YAML: {error}")
    mark = error.problem_mark or error.context_mark
    place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    context = f" ({error.context})" if error.context else ""
    line = _LINE_BREAK.split(text)[mark.line :][:1] if mark else []
    tab = "; the line is indented with a tab: YAML takes spaces only" if re.match(r" *\t", "".join(line)) else ""
    return ConfigError(f"{label}{place}: not valid YAML: {error.problem}{context}{tab}")


def _header(text: str) -> str | None:
    """The package of a `# @package name` header: before anything but blank lines and other `# @` headers."""
    for line in filter(None, map(str.strip, text.splitlines())):
        if found := _HEADER.match(line):
            return found[1]
        if not re.match(r"#\s*@", line):
            break
    return None


def _lines(node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, str(index)), item.start_mark.line + 1
            yield from _lines(item, (*path, str(index)))
    elif isinstance(node, yaml.MappingNode):
        own = [(key, value) for key, value in node.value if key.tag != _MERGE]
        for merged in (value for key, value in node.value if key.tag == _MERGE):  # `<<: *anchor`; own keys win
            for each in merged.value if isinstance(merged, yaml.SequenceNode) else [merged]:
                yield from _lines(each, path)
        for key, value in own:
            yield (*path, str(key.value)), key.start_mark.line + 1
            yield from _lines(value, (*path, str(key.value)))
