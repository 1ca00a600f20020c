"""One YAML file: its values as plain containers, the line of each key, and its defaults list."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from nanoengine.api.errors import ConfigError, shown
from nanoengine.observe.files import decoded
from nanoengine.setup.config.composer.bounds import LINE_BREAK, LOADER, MAX_KEY, MAX_NUMBER, check_yaml

KeyPath = tuple[str | int, ...]
"""Keys from the root; list items by their index."""

_MAX_BYTES = 64 << 20
_HEADER = re.compile(r"#\s*@package\b")
_INSTANTIATION = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A YAML file, read.

    Attributes:
        label: how messages name it. data: its values, uninterpolated, without the defaults list.
        lines: the line of every key, from 1, by its path with every part as text.
        defaults: the raw defaults list; None if there is none.
    """

    label: str
    data: dict[Any, Any]
    lines: Mapping[tuple[str, ...], int]
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


def walk(value: Mapping[Any, Any] | list[Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key below `value` with its value; list items count as keys."""
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield (*path, key), item
        if isinstance(item, Mapping | list):
            yield from walk(item, (*path, key))


def refuse_keywords(value: Mapping[Any, Any], origin: Callable[[KeyPath], str]) -> None:
    """Raises `ConfigError` on what Hydra reads otherwise: `_target_` and its like, and "???" as the value of a key."""
    for path, item in walk(value):
        if path[-1] in _INSTANTIATION:
            raise ConfigError(
                f"{origin(path)}: {dotted(path)}: {path[-1]} is not supported: nothing in YAML is instantiated; "
                "replaceable parts are plugins (see `nanoengine plugins list`)"
            )
        if item == "???" and all(isinstance(part, str) for part in path):  # in a list, as of prompts, it is a text
            raise ConfigError(
                f"{origin(path)}: {dotted(path)}: ??? (must be given) is not supported: leave the key out, or give its "
                "value"
            )


def read_yaml(path: Path, label: str) -> ConfigFile:
    """Reads a file. Raises `ConfigError` naming file and line where it is no YAML mapping of plain values."""
    try:
        if not path.is_file():
            raise ConfigError(f"cannot read {label}: it {not_a_file(path)}")
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"cannot read {label}: it has more than {_MAX_BYTES >> 20} MiB; is it a configuration?")
        text = decoded(path.read_bytes(), label)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {label}: {error}") from error
    _refuse_header(text, label)
    data, lines = _loaded(text, label, lambda line: f"{label}:{line + 1}")
    if data is None:
        return ConfigFile(label, {}, {}, None)
    if not isinstance(data, dict):
        raise ConfigError(f"{label}:{lines[()]}: a configuration file is a mapping of keys to values")
    defaults = data.pop("defaults", None)
    file = ConfigFile(label, data, lines, defaults)
    if "hydra" in data:
        raise ConfigError(f"{file.origin(('hydra',))}: settings of Hydra itself (hydra:) are not supported")
    refuse_keywords(data, file.origin)
    return file


def load_yaml(text: str, label: str, place: Callable[[int], str]) -> Any:
    """The value of a YAML text, in plain containers: of texts, numbers, truth values and None.

    Raises `ConfigError`: with `label` for what is not YAML, with the `place` of its line (0 is the first) for what is
    out of bounds.
    """
    return _loaded(text, label, place)[0]


def _loaded(text: str, label: str, place: Callable[[int], str]) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The values, and the line of every key, from 1; of the whole at ()."""
    try:
        check_yaml(text, place)
        loader = _Loader(text)
        try:
            node: yaml.Node | None = loader.get_single_node()
            if node is None:
                return None, {}
            lines = _lines(loader, node, place)
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _syntax_error(label, error, text) from error


def _lines(loader: Any, root: yaml.Node, place: Callable[[int], str]) -> dict[tuple[str, ...], int]:
    """The line of every key. Raises `ConfigError` for what is no key, and for a number that takes long to read."""
    lines: dict[tuple[str, ...], int] = {(): root.start_mark.line + 1}
    todo: list[tuple[tuple[str, ...], yaml.Node]] = [((), root)]
    while todo:
        above, node = todo.pop()
        inside: Iterable[tuple[str, yaml.Node, yaml.Node]] = ()
        if isinstance(node, yaml.MappingNode):
            inside = _keys(loader, node, place)
        elif isinstance(node, yaml.SequenceNode):
            inside = ((str(index), item, item) for index, item in enumerate(node.value))
        elif node.tag.endswith((":int", ":float")) and len(node.value) > MAX_NUMBER:
            why = f"a number of {len(node.value)} characters; a text of digits goes in quotes"
            raise ConfigError(f"{place(node.start_mark.line)}: {why}")
        for name, key, value in inside:
            lines[*above, name] = key.start_mark.line + 1
            todo.append(((*above, name), value))
    return lines


def _keys(
    loader: Any, node: yaml.MappingNode, place: Callable[[int], str]
) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """(text, key, value) of each. Raises `ConfigError` for what is no key, and for one that is there twice, in
    whatever spelling: 10 and 0xA."""
    seen = set[Any]()
    for key, value in node.value:
        where = place(key.start_mark.line)
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}: a list or mapping cannot be a key")
        if len(key.value) > MAX_KEY:
            raise ConfigError(f"{where}: a key of {len(key.value)} characters, {key.value[:40]!r}…")
        made = loader.construct_object(key)
        if made is None:
            raise ConfigError(f"{where}: null is no key")
        if isinstance(made, bool):
            raise ConfigError(f"{where}: the key {key.value} is a truth value to YAML; put it in quotes")
        if made == "<<":
            raise ConfigError(f"{where}: merge keys (<<) are not supported: write the keys themselves")
        if made in seen or str(made) in seen:
            spelt = "" if str(made) == key.value else f", spelt {key.value}"
            raise ConfigError(f"{where}: not valid YAML: duplicate key {str(made)!r}{spelt}")
        seen |= {made, str(made)}
        yield str(made), key, value


class _Loader(LOADER):  # type: ignore[misc]
    """PyYAML's safe loader; `1e-3` is a number, a date is a text, and what cannot be built has a line."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [(tag, pattern) for tag, pattern in known if tag.endswith((":int", ":bool", ":null"))]
        for first, known in LOADER.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, TypeError, LookupError) as error:  # 0b_
            kind = node.tag.rpartition(":")[2]
            problem = f"{shown(node.value)} is no {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


_FLOAT = (
    r"[-+]?(\d[\d_]*(\.[\d_]*([eE][-+]?\d+)?|[eE][-+]?\d+)|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT})$"), list("-+0123456789."))


def _syntax_error(label: str, error: yaml.YAMLError, text: str) -> ConfigError:
    if not isinstance(error, yaml.MarkedYAMLError):
        return ConfigError(f"{label}: not YAML: {error}")
    mark = error.problem_mark or error.context_mark
    place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    context = f" ({error.context})" if error.context else ""
    line = LINE_BREAK.split(text)[mark.line :][:1] if mark else []
    tab = "; the line is indented with a tab: YAML takes spaces only" if re.match(r" *\t", "".join(line)) else ""
    return ConfigError(f"{label}{place}: not valid YAML: {error.problem}{context}{tab}")


def _refuse_header(text: str, label: str) -> None:
    """Raises `ConfigError` on a `# @package` header, which Hydra reads before anything but blank lines and headers."""
    for number, line in enumerate(text.splitlines(), 1):
        if _HEADER.match(line.strip()):
            raise ConfigError(
                f"{label}:{number}: a header such as {shown(line.strip()[:60])} is not supported: what a group's file "
                "holds fills the section of the group's name; leave the line out"
            )
        if line.strip() and not re.match(r"#\s*@", line.strip()):
            break


def not_a_file(path: Path) -> str:
    """Why what is at `path` cannot be read as a file: the tail of a message."""
    if path.is_dir():
        return "is a folder, not a file"
    return "is a link to nothing" if not path.exists() else "is a pipe or device, not a file"
