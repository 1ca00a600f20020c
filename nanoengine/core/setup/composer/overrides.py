"""Overrides of the command line: `key=value`, `+key=value`, `++key=value`, `~key`; groups likewise, with `@package`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanoengine.core.errors import ConfigError
from nanoengine.core.setup.composer.yaml_file import (
    first_line,
    interpolation_hint,
    parts,
    refuse_instantiation,
    walk,
)


class Action(Enum):
    """What an override's prefix asks for."""

    SET = ""
    ADD = "+"
    FORCE = "++"
    DELETE = "~"


_FORM = re.compile(r"(?P<prefix>~|\+\+|\+|)(?P<key>[^=@]*)(?:@(?P<package>[^=]*))?(?:=(?P<value>.*))?", re.DOTALL)
_KEY = re.compile(r"[\w$-]+(?:[./][\w$-]+|\[\d+\])*")
_FUNCTIONS = ("choice", "range", "interval", "glob", "sort", "shuffle", "tag", "extend_list", "int", "float", "str",
              "bool", "json_str")  # fmt: skip
_CALL = re.compile(rf"(?P<name>{'|'.join(_FUNCTIONS)})\(.*\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Override:
    """One override, parsed.

    Attributes:
        text: as typed. key: dotted, or a group. package: behind `@`. has_value: False for a bare `~key`.
        value: parsed as YAML; raw: unparsed, for options that only look like a number.
    """

    text: str
    action: Action
    key: str
    package: str | None
    has_value: bool
    value: Any
    raw: str

    @property
    def origin(self) -> str:
        return f"override '{self.text}'"


def parse_override(text: str) -> Override:
    """Raises `ConfigError` naming the override and what it should look like."""
    found = _FORM.fullmatch(text)
    assert found is not None  # every part is optional
    action, key, raw = Action(found["prefix"]), found["key"], found["value"]
    if raw is None and action is not Action.DELETE:
        raise ConfigError(f"{text!r} is no override; write key=value, +key=value, ++key=value, ~key or group=option")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"override {text!r}: {key!r} is no key; write for example engine.max_num_seqs=64")
    if parts(key)[0].split("/")[0] == "hydra":
        raise ConfigError(f"override {text!r}: settings of Hydra itself are not supported")
    if parts(key)[0] == "defaults":
        raise ConfigError(
            f"override {text!r}: a defaults list is overridden by group: group=option, +group=option, ~group"
        )
    value = _parse_value(text, raw) if raw is not None else None
    refuse_instantiation({key.split(".")[-1]: value}, f"override {text!r}")
    return Override(text, action, key, found["package"], raw is not None, value, (raw or "").strip())


def _parse_value(text: str, raw: str) -> Any:
    if not raw.strip():
        return ""
    if raw.strip() == "-":  # a text to Hydra, an empty list item to YAML
        return "-"
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)["value"]  # type: ignore[call-overload, index]
    except yaml.MarkedYAMLError as error:
        raise ConfigError(
            f"override {text!r}: the value is not valid YAML: {error.problem}; put it in quotes"
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"override {text!r}: {first_line(error)}{interpolation_hint(error)}") from error
    if isinstance(value, str) and raw.strip()[0] not in "'\"":
        _refuse_grammar(text, raw.strip(), value)
    for path, item in walk([value]):
        if item is None and isinstance(path[-1], str) and ":" in path[-1]:
            raise ConfigError(f"override {text!r}: {path[-1]!r} is one word to YAML; write a blank after the colon")
    return value


def _refuse_grammar(text: str, raw: str, value: str) -> None:
    """What Hydra's override grammar reads otherwise than YAML does, and what YAML would cut off."""
    if call := _CALL.fullmatch(raw):
        raise ConfigError(
            f"override {text!r}: Hydra's {call['name']}() is not supported; for a plain text, put it in quotes"
        )
    if "," in raw and "${" not in raw:
        raise ConfigError(
            f"override {text!r}: a sweep over several values needs --multirun (-m); for a list write [{raw}], "
            "for a text with a comma put it in quotes"
        )
    if value != raw:  # a comment, or a line break that YAML folds
        raise ConfigError(f"override {text!r}: YAML reads only {value!r} of it; put the value in quotes")


def apply_override(config: DictConfig, override: Override) -> None:
    """Changes `config` in place. Raises `ConfigError` where the prefix does not fit what is there."""
    try:
        if override.action is Action.DELETE:
            _delete(config, override)
            return
        present = OmegaConf.select(config, override.key, throw_on_missing=False)
        if override.action is Action.ADD and present is not None and not isinstance(override.value, dict | list):
            raise ConfigError(
                f"override {override.text!r}: {override.key} is there already ({present!r}); drop the +, or write ++"
            )
        merge = isinstance(override.value, dict) and isinstance(present, DictConfig)
        OmegaConf.update(config, override.key, override.value, merge=merge, force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:  # omegaconf lets int("x") of a list index through
        why = _no_such_item(config, override) or first_line(error)
        raise ConfigError(f"override {override.text!r}: {why}") from error


def _no_such_item(config: DictConfig, override: Override) -> str:
    """Which list the key wants an item of that it has not, and what to write instead; "" if that is not the cause."""
    node: Any = config
    above = ""
    for part in parts(override.key):
        if isinstance(node, ListConfig) and not part.isdigit():
            mend = f"{above}={{{part}: {override.raw}}}" if override.key == f"{above}.{part}" else f"{above}=..."
            return f"{above} is a list, which has no key {part!r}; to replace the list, write '{mend}'"
        if isinstance(node, ListConfig) and int(part) >= len(node):
            size = "1 item" if len(node) == 1 else f"{len(node)} items"
            return f"index {part} is out of range: {above} has {size}, counted from 0; to make it longer, write it anew"
        node, above = _child(node, part), f"{above}.{part}" if above else part
    return ""


def _delete(config: DictConfig, override: Override) -> None:
    *path, last = parts(override.key)
    node: Any = config
    for part in path:
        node = _child(node, part)
    key = _key_in(node, last)
    if key is None:
        raise ConfigError(f"override {override.text!r}: {override.key} is not in the composed configuration")
    if override.has_value and OmegaConf.to_container(OmegaConf.create([node[key]])) != [override.value]:
        raise ConfigError(f"override {override.text!r}: {override.key} is {node[key]!r}, so nothing was deleted")
    del node[key]


def _child(node: Any, part: str) -> Any:
    key = _key_in(node, part)
    return None if key is None else node[key]


def _key_in(node: Any, part: str) -> Any:
    """`part` as a key of `node`, as a number where the node has it so; None if it has not."""
    if isinstance(node, ListConfig):
        return int(part) if part.isdigit() and int(part) < len(node) else None
    if not isinstance(node, DictConfig):
        return None
    return next((key for key in node if str(key) == part), None)
