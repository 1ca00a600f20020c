"""Overrides of the command line: `key=value`, `+key=value`, `++key=value`, `~key`, `group=option`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import yaml

from nanoengine.api.errors import ConfigError, shown
from nanoengine.setup.config.composer.bounds import MAX_DEPTH, MAX_KEY
from nanoengine.setup.config.composer.yaml_file import load_yaml, refuse_keywords, walk


class Action(Enum):
    """What an override's prefix asks for. `++` is the same as none: a key may be new or not."""

    SET = ""
    ADD = "+"
    DELETE = "~"


_FORM = re.compile(r"(?P<prefix>~|\+\+|\+|)(?P<key>[^=]*)(?:=(?P<value>.*))?", re.DOTALL)
_KEY = re.compile(r"[^\W\d][\w-]*(?:\.[^\W\d][\w-]*)*")
_NUMBERED = re.compile(r"([\w.-]*[\w-])[.\[]\d.*")
_FUNCTIONS = ("choice", "range", "interval", "glob", "sort", "shuffle", "tag", "extend_list", "int", "float", "str",
              "bool", "json_str")  # fmt: skip
_LONGEST_SHOWN = 200  # characters of an override in a message
_CALL = re.compile(rf"(?P<name>{'|'.join(_FUNCTIONS)})\(.*\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Override:
    """One override, parsed.

    Attributes:
        text: as typed. key: dotted, or a group.
        value: parsed as YAML; None for `~key`. raw: unparsed, for options that only look like a number.
    """

    text: str
    action: Action
    key: str
    value: Any
    raw: str

    @property
    def origin(self) -> str:
        return _origin(self.text)

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.key.split("."))

    @property
    def values(self) -> dict[str, Any]:
        """The value below its keys, as a file would have it."""
        nested = self.value
        for part in reversed(self.path):
            nested = {part: nested}
        return nested  # type: ignore[no-any-return]


def _origin(text: str) -> str:
    return f"override '{text}'" if len(text) <= _LONGEST_SHOWN else f"override '{text[:_LONGEST_SHOWN]}…'"


def check_name(name: str, where: str) -> None:
    """Raises `ConfigError` on a group or file that is no plain name, but something of Hydra's."""
    word, blank, _ = name.partition(" ")
    group, at, _ = name.partition("@")
    why = ""
    if "${" in name:
        why = "interpolation in a defaults list is not supported; write the name"
    elif at:
        section = f"the section {group!r}" if group else "the section of its name"
        why = f"packages (@) are not supported; a group's option fills {section}"
    elif blank and word in ("override", "optional"):
        why = f"'{word}' before a name is not supported; choose the option here, or on the command line"
    elif "/" in name:
        why = "a path is not supported in a defaults list: write '- group: option', or '- file' for a file next to it"
    if why:
        raise ConfigError(f"{where}: {shown(name)}: {why}")


def parse_override(text: str) -> Override:
    """Raises `ConfigError` naming the override and what it should look like."""
    found = _FORM.fullmatch(text)
    assert found is not None  # every part is optional
    key, raw, where = found["key"], found["value"], _origin(text)
    action = Action(found["prefix"].replace("++", ""))
    if raw is None and action is not Action.DELETE:
        raise ConfigError(
            f"{shown(text)} is no override; write key=value, +key=value, ++key=value, ~key or group=option"
        )
    _check_key(key, where)
    if action is Action.DELETE:
        if raw is not None:
            raise ConfigError(f"{where}: a value after ~{key} is not supported; write ~{key}")
        return Override(text, action, key, None, "")
    value = _parse_value(text, raw)
    override = Override(text, action, key, value, raw.strip())
    refuse_keywords(override.values, lambda _: where)
    return override


def _check_key(key: str, where: str) -> None:
    if len(key) > MAX_KEY or key.count(".") >= MAX_DEPTH:
        raise ConfigError(f"{where}: a key of {len(key)} characters; no key is so long, or so deep")
    first = re.split(r"[./]", key)[0]
    if first == "hydra":
        raise ConfigError(f"{where}: settings of Hydra itself are not supported")
    if first == "defaults":
        raise ConfigError(f"{where}: a defaults list is overridden by group: group=option, +group=option, ~group")
    if "@" in key:
        check_name(key, where)
    if "/" in key:
        raise ConfigError(f"{where}: {shown(key)}: groups within groups are not supported; write group=option")
    if not _KEY.fullmatch(key):
        if item := _NUMBERED.fullmatch(key):
            raise ConfigError(
                f"{where}: {shown(key)}: an item of a list cannot be overridden: set {item[1]} as a whole"
            )
        raise ConfigError(f"{where}: {shown(key)} is no key; write for example engine.max_num_seqs=64")


def _parse_value(text: str, raw: str) -> Any:
    if raw.strip() in ("", "-"):  # a lone dash is a text to Hydra, an empty list item to YAML
        return raw.strip()
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
            raise ConfigError(f"{where}: {path[-1]!r} is one word to YAML; write a blank after the colon")
    return value


def _refuse_grammar(text: str, raw: str, value: str) -> None:
    """What Hydra's override grammar reads otherwise than YAML does, and what YAML would cut off."""
    call = _CALL.fullmatch(raw)
    if call and call["name"] in ("range", "choice"):
        raise ConfigError(f"{_origin(text)}: {call['name']}() gives several values, which need --multirun (-m)")
    if call:
        raise ConfigError(
            f"{_origin(text)}: Hydra's {call['name']}() is not supported: write the value itself, or several with "
            "commas and --multirun (-m); a plain text goes in quotes"
        )
    if "," in raw and "${" not in raw:
        raise ConfigError(
            f"{_origin(text)}: a sweep over several values needs --multirun (-m); for a list write "
            f"[{raw[:_LONGEST_SHOWN]}], for a text with a comma put it in quotes"
        )
    if value != raw:  # a comment, or a line break that YAML folds
        raise ConfigError(f"{_origin(text)}: YAML reads only {shown(value)} of it; put the value in quotes")


def merged(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """`above` laid over `below`: mappings are merged, all else is replaced."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def apply_override(config: Mapping[Any, Any], override: Override) -> dict[Any, Any]:
    """`config` with the change. Raises `ConfigError` where the prefix, or the key, does not fit what is there."""
    node: Any = config
    *above, last = override.path
    for depth, part in enumerate(above):
        node, name = node.get(part), ".".join(above[: depth + 1])
        if isinstance(node, list):
            rest = override.key.removeprefix(f"{name}.")
            new = f"{name}=..." if "." in rest else f"{name}={{{rest}: {override.raw}}}"
            raise ConfigError(
                f"{override.origin}: {name} is a list, which has no key {rest!r}; to replace the list, write '{new}'"
            )
        if isinstance(node, str) and "${" in node:
            raise ConfigError(f"{override.origin}: {name} is {shown(node)}, an interpolation: set {name} as a whole")
        node = node if isinstance(node, Mapping) else {}
    present = node.get(last)
    if override.action is Action.DELETE:
        if last not in node:
            raise ConfigError(f"{override.origin}: {override.key} is not in the composed configuration")
        return _without(config, override.path)
    if override.action is Action.ADD and present is not None and not isinstance(override.value, dict | list):
        raise ConfigError(
            f"{override.origin}: {override.key} is there already ({shown(present)}); drop the +, or write ++"
        )
    return merged(config, override.values)


def _without(config: Mapping[Any, Any], path: tuple[str, ...]) -> dict[Any, Any]:
    key, *rest = path
    if rest:
        return {**config, key: _without(config[key], tuple(rest))}
    return {name: value for name, value in config.items() if name != key}
