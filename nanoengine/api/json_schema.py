"""Walks over the schemas inside a JSON schema. What only looks like one (in `enum` or `const`) is left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]

_ONE = frozenset(
    ("additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not",
     "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties")
)  # fmt: skip
_LISTS = frozenset(("allOf", "anyOf", "items", "oneOf", "prefixItems"))
_BY_NAME = frozenset(
    ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")
)  # fmt: skip


def map_schemas(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy of a schema in which `change` replaced each schema that is an object, the innermost first.

    `change` gets a copy, which it may alter. Raises `RecursionError` for a schema that is nested too deeply.
    """
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _LISTS and isinstance(value, list):
            found[key] = [map_schemas(each, change) for each in value]
        elif key in _BY_NAME and isinstance(value, Mapping):
            found[key] = {name: map_schemas(each, change) for name, each in value.items()}
        elif key in _ONE:
            found[key] = map_schemas(value, change)
        else:
            found[key] = value
    return change(found)


def close_objects(schema: Any) -> Any:
    """A copy in which objects with `properties` have no others, unless the schema says something about them."""

    def close(each: dict[str, Any]) -> dict[str, Any]:
        return (
            {**each, "additionalProperties": each.get("additionalProperties", False)} if "properties" in each else each
        )

    return map_schemas(schema, close)
