"""Overrides of the command line: `key=value`, `+key=value`, `++key=value`, `~key`, `group=option`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import yaml

from nanoengine.api.errors import ConfigError, shown
from nanoengine.setup.config.composer.bounds import MAX_DEPTH, MAX_KEY
from nanoengine.setup.config.composer.entries import check_group
from nanoengine.setup.config.composer.yaml_file import load_yaml, parts, refuse_instantiation, walk


class Action(Enum):
    """What an override's prefix asks for."""

    SET = ""
    ADD = "+"
    FORCE = "++"
    DELETE = "~"


_FORM = re.compile(r"(?P<prefix>~|\+\+|\+|)(?P<key>[^=]*)(?:=(?P<value>.*))?", re.DOTALL)
_KEY = re.compile(r"[\w$-]+(?:[./][\w$-]+|\[\d+\])*")
_FUNCTIONS = ("choice", "range", "interval", "glob", "sort", "shuffle", "tag", "extend_list", "int", "float", "str",
              "bool", "json_str")  # fmt: skip
_LONGEST_SHOWN = 200  # characters of an override in a message
_CALL = re.compile(rf"(?P<name>{'|'.join(_FUNCTIONS)})\(.*\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Override:
    """One override, parsed.

    Attributes:
        text: as typed. key: dotted, or a group. has_value: False for a bare `~key`.
        value: parsed as YAML; raw: unparsed, for options that only look like a number.
    """

    text: str
    action: Action
    key: str
    has_value: bool
    value: Any
    raw: str

    @property
    def origin(self) -> str:
        return _origin(self.text)


def parse_override(text: str) -> Override:
    """Raises `ConfigError` naming the override and what it should look like."""
    found = _FORM.fullmatch(text)
    assert found is not None  # every part is optional
    action, key, raw = Action(found["prefix"]), found["key"], found["value"]
    if raw is None and action is not Action.DELETE:
        raise ConfigError(
            f"{shown(text)} is no override; write key=value, +key=value, ++key=value, ~key or group=option"
        )
    if len(key) > MAX_KEY or len(parts(key)) > MAX_DEPTH:
        raise ConfigError(f"{_origin(text)}: a key of {len(key)} characters; no key is so long, or so deep")
    check_group(key, _origin(text))
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{_origin(text)}: {shown(key)} is no key; write for example engine.max_num_seqs=64")
    if parts(key)[0].split("/")[0] == "hydra":
        raise ConfigError(f"{_origin(text)}: settings of Hydra itself are not supported")
    if parts(key)[0] == "defaults":
        raise ConfigError(
            f"{_origin(text)}: a defaults list is overridden by group: group=option, +group=option, ~group"
        )
    value = _parse_value(text, raw) if raw is not None else None
    refuse_instantiation({key.split(".")[-1]: value}, f"override {text!r}")
    return Override(text, action, key, raw is not None, value, (raw or "").strip())


def _parse_value(text: str, raw: str) -> Any:
    if not raw.strip():
        return ""
    if raw.strip() == "-":  # a text to Hydra, an empty list item to YAML
        return "-"
    where = _origin(text)
    try:
        value = load_yaml(raw, where, lambda _: where)
    except ConfigError as error:
        if isinstance(error.__cause__, yaml.MarkedYAMLError):
            why = f"the value is not valid YAML: {error.__cause__.problem}; put it in quotes"
            raise ConfigError(f"{where}: {why}") from error.__cause__
        raise
    if isinstance(value, str) and raw.strip()[0] not in "'\"":
        _refuse_grammar(text, raw.strip(), value)
    for path, item in walk([value]):
        if item is None and isinstance(path[-1], str) and ":" in path[-1]:
            raise ConfigError(f"{_origin(text)}: {path[-1]!r} is one word to YAML; write a blank after the colon")
    return value


def _refuse_grammar(text: str, raw: str, value: str) -> None:
    """What Hydra's override grammar reads otherwise than YAML does, and what YAML would cut off."""
    if call := _CALL.fullmatch(raw):
        raise ConfigError(
            f"{_origin(text)}: Hydra's {call['name']}() is not supported; for a plain text, put it in quotes"
        )
    if "," in raw and "${" not in raw:
        raise ConfigError(
            f"{_origin(text)}: a sweep over several values needs --multirun (-m); for a list write "
            f"[{raw[:_LONGEST_SHOWN]}], for a text with a comma put it in quotes"
        )
    if value != raw:  # a comment, or a line break that YAML folds
        raise ConfigError(f"{_origin(text)}: YAML reads only {shown(value)} of it; put the value in quotes")


def _origin(text: str) -> str:
    return f"override '{text}'" if len(text) <= _LONGEST_SHOWN else f"override '{text[:_LONGEST_SHOWN]}…'"


def merge(into: dict[Any, Any], layer: Mapping[Any, Any]) -> None:
    """Lays `layer` over `into`: mappings are merged, all else is replaced; "???" does not undo what was given."""
    for key, value in layer.items():
        old = into.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict):
            merge(old, value)
        elif value != "???" or key not in into:
            into[key] = _copied(value)


def _copied(value: Any) -> Any:
    """A copy in which nothing is there twice, whatever aliases the file had."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def apply_override(config: dict[Any, Any], override: Override) -> None:
    """Changes `config` in place. Raises `ConfigError` where the prefix, or the key, does not fit what is there."""
    *path, last = parts(override.key)
    if override.action is Action.DELETE:
        _delete(config, override, path, last)
        return
    node: Any = config
    for depth, part in enumerate(path):
        node = _inside(node, part, path[:depth], override)
    key = _place(node, last, path, override)
    present = node.get(key) if isinstance(node, dict) else node[key]
    value, there = override.value, present is not None and present != "???"
    if override.action is Action.ADD and there and not isinstance(value, dict | list):
        raise ConfigError(
            f"{override.origin}: {override.key} is there already ({shown(present)}); drop the +, or write ++"
        )
    if isinstance(value, dict) and isinstance(present, dict):
        merge(present, value)
    else:
        node[key] = _copied(value)


def _inside(node: Any, part: str, above: Sequence[str], override: Override) -> Any:
    """The list or mapping below `part`; made where there is none."""
    key = _place(node, part, above, override)
    child = node.get(key) if isinstance(node, dict) else node[key]
    if isinstance(child, str) and "${" in child:
        name = ".".join([*above, part])
        raise ConfigError(f"{override.origin}: {name} is {shown(child)}, an interpolation: set {name} as a whole")
    if not isinstance(child, dict | list):
        child = node[key] = {}
    return child


def _place(node: Any, part: str, path: Sequence[str], override: Override) -> Any:
    """`part` as a key of `node`, which may lack it; of a list an index that is there."""
    key = _key_in(node, part)
    if key is not None or isinstance(node, dict):
        return part if key is None else key
    above = ".".join(path)
    if not part.isdecimal():
        mend = f"{above}={{{part}: {override.raw}}}" if override.key == f"{above}.{part}" else f"{above}=..."
        why = f"{above} is a list, which has no key {part!r}; to replace the list, write '{mend}'"
    else:
        size = "1 item" if len(node) == 1 else f"{len(node)} items"
        why = f"index {part} is out of range: {above} has {size}, counted from 0; to make it longer, write it anew"
    raise ConfigError(f"{override.origin}: {why}")


def _delete(config: dict[Any, Any], override: Override, path: Sequence[str], last: str) -> None:
    node: Any = config
    for part in path:
        key = _key_in(node, part)
        node = None if key is None else node[key]
    key = _key_in(node, last)
    if key is None:
        raise ConfigError(f"{override.origin}: {override.key} is not in the composed configuration")
    if override.has_value and node[key] != override.value:
        raise ConfigError(f"{override.origin}: {override.key} is {shown(node[key])}, so nothing was deleted")
    del node[key]


def _key_in(node: Any, part: str) -> Any:
    """`part` as a key of `node`, as a number where the node has it so; None if it has not."""
    if isinstance(node, list):
        return int(part) if part.isdecimal() and int(part) < len(node) else None
    if not isinstance(node, dict):
        return None
    return part if part in node else next((key for key in node if str(key) == part), None)
