"""Reads structural tags: free text in which some texts ("triggers") begin a tag whose content follows a JSON schema.

Or, with a separator, nothing but such tags.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanoengine.api import GrammarError

_OLD = frozenset(("type", "structures", "triggers"))
_FLAGS = ("at_least_one", "stop_after_first")
_FORMATS = {
    "triggered_tags": frozenset(("type", "triggers", "tags", *_FLAGS)),
    "tags_with_separator": frozenset(("type", "tags", "separator", *_FLAGS)),
}


@dataclass(frozen=True, slots=True)
class Tag:
    """trigger: its number; -1: there is none. rest: of the tag's begin, behind the trigger. schema: of the content."""

    trigger: int
    rest: str
    schema: Any
    end: str


@dataclass(frozen=True, slots=True)
class Tags:
    """begins: the text begins with a tag, not with free text. ends: it ends with its first tag.

    separator: comes between the tags, and there is no free text and no trigger; None: there is.
    """

    triggers: tuple[str, ...]
    tags: tuple[Tag, ...]
    begins: bool = False
    ends: bool = False
    separator: str | None = None


def read_tags(text: str, backend: str) -> Tags:
    """The triggers and tags of a structural tag, in the form with `structures` or with a `format` of `_FORMATS`.

    Raises `GrammarError` that names what is missing, unknown, or not supported by `backend`.
    """
    given = json.loads(text)
    if given.get("type", "structural_tag") != "structural_tag":
        raise GrammarError(f"structural_tag: type must be 'structural_tag', not {given['type']!r}")
    if "format" in given:
        found = given["format"]
        kind = found.get("type") if isinstance(found, dict) else found
        if kind not in tuple(_FORMATS):  # it may be a value that has no hash
            raise GrammarError(f"structural_tag: {backend} supports the formats {', '.join(_FORMATS)}, not {kind!r}")
        _only("format", found, _FORMATS[kind])
        for name in _FLAGS:
            if not isinstance(found.get(name, False), bool):
                raise GrammarError(f"structural_tag: format.{name} must be true or false, not {found[name]!r:.80}")
        tags = [_new(i, tag, backend) for i, tag in enumerate(_list("format.tags", found.get("tags")))]
    else:
        found, tags = given, old_tags(given)
    begins, ends = (bool(found.get(name)) for name in _FLAGS)
    if found.get("type") == "tags_with_separator":
        separator = found.get("separator")
        if not isinstance(separator, str):
            raise GrammarError(f"structural_tag: format.separator must be a text, not {separator!r:.80}")
        return Tags((), tuple(Tag(-1, *tag) for tag in tags), begins, ends, separator)
    triggers = tuple(_text(f"triggers[{i}]", each) for i, each in enumerate(_list("triggers", found.get("triggers"))))
    return Tags(triggers, tuple(_tag(triggers, *each) for each in tags), begins, ends)


def old_tags(given: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """Begin, schema and end of each tag in the form with `structures`. Raises `GrammarError`."""
    _only("structural_tag", given, _OLD)
    return [_old(i, tag) for i, tag in enumerate(_list("structures", given.get("structures")))]


def map_tag_schemas(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a structural tag in which `change` replaced each JSON schema."""
    if isinstance(value, list):
        return [map_tag_schemas(each, change) for each in value]
    if not isinstance(value, dict):
        return value
    schemas = ("schema", "json_schema")
    return {k: change(each) if k in schemas else map_tag_schemas(each, change) for k, each in value.items()}


def _tag(triggers: tuple[str, ...], begin: str, schema: Any, end: str) -> Tag:
    for number, trigger in sorted(enumerate(triggers), key=lambda each: len(each[1])):  # the shortest is met first
        if begin.startswith(trigger):
            return Tag(number, begin.removeprefix(trigger), schema, end)
    raise GrammarError(f"structural_tag: the tag that begins with {begin!r} begins with no trigger: {list(triggers)}")


def _old(i: int, tag: Any) -> tuple[str, Any, str]:
    where = f"structures[{i}]"
    _only(where, tag, frozenset(("begin", "schema", "end")))
    return _text(f"{where}.begin", tag.get("begin")), tag.get("schema", {}), _end(where, tag)


def _new(i: int, tag: Any, backend: str) -> tuple[str, Any, str]:
    where = f"format.tags[{i}]"
    _only(where, tag, frozenset(("type", "begin", "content", "end")))
    content = tag.get("content")
    kind = content.get("type") if isinstance(content, dict) else content
    if not isinstance(content, dict) or kind != "json_schema":
        raise GrammarError(f"structural_tag: {backend} supports a {where}.content of type json_schema, not {kind!r}")
    _only(f"{where}.content", content, frozenset(("type", "json_schema")))
    return _text(f"{where}.begin", tag.get("begin")), content.get("json_schema", {}), _end(where, tag)


def _end(where: str, tag: dict[str, Any]) -> str:
    end = tag.get("end", "")
    if not isinstance(end, str):
        raise GrammarError(f"structural_tag: {where}.end must be a text, not {end!r:.80}")
    return end


def _only(where: str, value: Any, known: frozenset[str]) -> None:
    if not isinstance(value, dict):
        raise GrammarError(f"structural_tag: {where} must be a JSON object, not {value!r:.80}")
    unknown = sorted(value.keys() - known)
    if unknown:
        raise GrammarError(f"structural_tag: {where} has unknown keys {unknown}; valid: {sorted(known)}")


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise GrammarError(f"structural_tag: {where} must be a list that is not empty, not {value!r:.80}")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise GrammarError(f"structural_tag: {where} must be a text that is not empty, not {value!r:.80}")
    return value
