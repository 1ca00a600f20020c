"""One YAML file: its values as plain containers, the line each key stands on, its header and its defaults list."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from nanoengine.api.errors import ConfigError, shown
from nanoengine.setup.config.composer.bounds import LOADER, check_yaml
from nanoengine.setup.config.composer.grammar import ESCAPE_HINT, check_grammar

KeyPath = tuple[str | int, ...]
"""Keys from the root; list items by their index."""

_MAX_BYTES = 64 << 20
_HEADER = re.compile(r"#\s*@package\s+(\S+)\s*$")
_LINE_BREAK = re.compile("[\n\x85\u2028\u2029]")  # YAML 1.1's
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
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"cannot read {label}: it has more than {_MAX_BYTES >> 20} MiB; is it a configuration?")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {label}: {error}") from error
    node, data = load_yaml(text, label, lambda line: f"{label}:{line + 1}")
    if data is None:
        return ConfigFile(label, {}, {}, _header(text), None)
    if not isinstance(data, dict):
        line = node.start_mark.line + 1 if node is not None else 1
        raise ConfigError(f"{label}:{line}: a configuration file is a mapping of keys to values")
    lines = dict(_lines(node, ())) if node is not None else {}
    defaults = data.pop("defaults", None)
    file = ConfigFile(label, data, lines, _header(text), defaults)
    check_texts(data, file.origin)
    if "hydra" in data:
        raise ConfigError(f"{file.origin(('hydra',))}: settings of Hydra itself (hydra:) are not supported")
    refuse_instantiation(data, label)
    return file


def load_yaml(text: str, label: str, place: Callable[[int], str]) -> tuple[yaml.Node | None, Any]:
    """The node, and what it stands for in plain containers: of text, numbers, truth values and None.

    Raises `ConfigError`: of what is no YAML with `label`, of what is out of bounds with the `place` of its line (0 is
    the first).
    """
    try:
        check_yaml(text, place)
        loader = _Loader(text)
        try:
            node: yaml.Node | None = loader.get_single_node()
            return node, None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _syntax_error(label, error, text) from error
    except UnicodeEncodeError as error:  # half a surrogate pair, from an argument that is no UTF-8
        raise ConfigError(f"{label}: not text: it holds bytes that are not UTF-8") from error


class _Loader(LOADER):  # type: ignore[misc]
    """PyYAML's safe loader; `1e-3` is a number, a date is a text, and what cannot be built has a line."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":timestamp", ":float"))]
        for first, known in LOADER.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, TypeError, LookupError) as error:  # !!int "a"
            kind = node.tag.rpartition(":")[2]
            problem = f"{shown(node.value)} is no {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        if None in found:
            raise yaml.constructor.ConstructorError(None, None, "null is no key", node.start_mark)
        return found


_FLOAT = (
    r"[-+]?(\d[\d_]*(\.[\d_]*([eE][-+]?\d+)?|[eE][-+]?\d+)|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT})$"), list("-+0123456789."))


def check_texts(values: Any, origin: Callable[[KeyPath], str]) -> None:
    """Raises `ConfigError` where a text below `values` holds `${` and is no interpolation."""
    for path, value in walk(values):
        if isinstance(value, str) and "${" in value and (why := check_grammar(value)):
            raise ConfigError(f"{origin(path)}: {dotted(path)}: {why}{ESCAPE_HINT}")


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
