"""Refuses what xgrammar would ignore, or take more widely than JSON Schema means it. What is left it supports exactly.

A string with a length could have control characters, which JSON has not, and bytes that are no UTF-8: it is written as
a pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.api import GrammarError
from nanoengine.api.json_schema import map_schemas
from nanoengine.plugins.grammars.plain_regexes import check_pattern

_NO_EFFECT = frozenset(
    ("$schema", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
     "$defs", "definitions")
)  # fmt: skip
_OF_TYPE: Mapping[str, frozenset[str]] = {
    "string": frozenset(("minLength", "maxLength", "pattern")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "boolean": frozenset(),
    "null": frozenset(),
}
_CHARACTER = "[ !#-\\[\\]-~\u00a0-\ud7ff\ue000-\U0010ffff]"  # that JSON has as it is
_ALONE = ("$ref", "const", "enum", "anyOf")
_KNOWN = _NO_EFFECT.union({"type", *_ALONE}, *_OF_TYPE.values())


def plain(schema: Any) -> Any:
    """The schema for xgrammar. Raises `GrammarError` that names the keyword, or the combination of keywords."""
    return map_schemas(schema, _plain)


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    _check(schema)
    if "minLength" not in schema and "maxLength" not in schema:
        return schema
    low, high = schema.pop("minLength", 0), schema.pop("maxLength", "")
    return {**schema, "pattern": f"^{_CHARACTER}{{{low},{high}}}$"}


def _check(schema: dict[str, Any]) -> None:
    unknown = sorted(schema.keys() - _KNOWN)
    if unknown:
        raise GrammarError(f"the JSON schema has {', '.join(unknown)}, which xgrammar does not support exactly{_FIX}")
    if "$ref" in schema and not str(schema["$ref"]).startswith("#"):
        raise GrammarError(f"the JSON schema has the $ref {schema['$ref']!r} to another document{_FIX}")
    rules = sorted(schema.keys() - _NO_EFFECT)
    alone = [name for name in _ALONE if name in schema]
    if alone:
        values = schema["enum"] if "enum" in schema else [schema.get("const")]
        rest = [name for name in rules if name != alone[0]]
        if rest == ["type"] and alone[0] in ("enum", "const") and all(_is(value, schema["type"]) for value in values):
            rest = []
        if rest:
            raise GrammarError(
                f"the JSON schema has {', '.join(rest)} next to {alone[0]}, which xgrammar ignores{_FIX}"
            )
        return
    kind = schema.get("type")
    if rules and not isinstance(kind, str):
        raise GrammarError(f"the JSON schema has {', '.join(rules)} without one type, which xgrammar ignores{_FIX}")
    if isinstance(kind, str):
        if kind not in _OF_TYPE:
            raise GrammarError(f"the JSON schema has an unknown type {kind!r}; valid: {', '.join(_OF_TYPE)}")
        foreign = [name for name in rules if name != "type" and name not in _OF_TYPE[kind]]
        if foreign:
            raise GrammarError(f"the JSON schema has {', '.join(foreign)} for a {kind}, where it has no effect{_FIX}")
    if isinstance(schema.get("pattern"), str):
        check_pattern(schema["pattern"])
    if "properties" in schema and schema.get("additionalProperties", False) is not False:
        raise GrammarError(
            "the JSON schema has additionalProperties next to properties, whose names xgrammar lets be written with "
            f"escapes a second time{_FIX}"
        )
    if "pattern" in schema and ("minLength" in schema or "maxLength" in schema):
        raise GrammarError(f"the JSON schema has a length next to pattern, which xgrammar ignores{_FIX}")
    unnamed = sorted(set(schema.get("required", ())) - set(schema.get("properties", ())))
    if unnamed:
        raise GrammarError(f"the JSON schema requires {unnamed[0]!r}, which is not in its properties{_FIX}")


_FIX = ": leave it out, or use the backend llguidance"


def _is(value: Any, kind: Any) -> bool:
    kinds = kind if isinstance(kind, list) else [kind]
    return any(
        {"string": isinstance(value, str), "null": value is None, "boolean": isinstance(value, bool),
         "integer": isinstance(value, int) and not isinstance(value, bool),
         "number": isinstance(value, int | float) and not isinstance(value, bool),
         "array": isinstance(value, list), "object": isinstance(value, dict)}.get(each, False)
        for each in kinds
    )  # fmt: skip
