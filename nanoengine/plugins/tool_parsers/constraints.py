"""Values of `structured_outputs` that several parsers make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanoengine.api import Tool

Tag = tuple[str, Mapping[str, Any], str]  # what begins a call, the schema of what follows, what ends it


def quoted(text: str) -> str:
    """The JSON text of a string."""
    return json.dumps(text, ensure_ascii=False)


def any_object(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object, also if the tool has none or does not say so."""
    return schema if "type" in schema else {"type": "object", **schema}


def tagged(
    trigger: str, tags: Sequence[Tag], *, required: bool, parallel: bool, separator: str = ""
) -> Mapping[str, Any]:
    """Free text in which `trigger` begins one of the tags; if `required`, tags alone, with `separator` between them."""
    contents = [{"type": "json_schema", "json_schema": any_object(schema)} for _, schema, _ in tags]
    found = {
        "type": "tags_with_separator" if required else "triggered_tags",
        "tags": [
            {"type": "tag", "begin": begin, "content": content, "end": end}
            for (begin, _, end), content in zip(tags, contents, strict=True)
        ],
        "at_least_one": required,
        "stop_after_first": not parallel,
        **({"separator": separator} if required else {"triggers": [trigger]}),
    }
    return {"structural_tag": {"type": "structural_tag", "format": found}}


def one_call(tools: Sequence[Tool], key: str) -> dict[str, Any]:
    """JSON schema of a call. key: of its arguments."""
    calls, schemas = [], {}
    for number, tool in enumerate(tools):
        place = f"tool_{number}"
        schemas[place] = _moved(any_object(tool.parameters), f"#/$defs/{place}")
        members = {"name": {"const": tool.name}, key: {"$ref": f"#/$defs/{place}"}}
        calls.append(
            {"type": "object", "properties": members, "required": ["name", key], "additionalProperties": False}
        )
    return {"anyOf": calls, "$defs": schemas}


def list_of_calls(tools: Sequence[Tool], key: str, *, parallel: bool) -> dict[str, Any]:
    """JSON schema of a list of calls. key: of a call's arguments. parallel: it may have more than one."""
    call = one_call(tools, key)
    found = {"type": "array", "items": {"anyOf": call["anyOf"]}, "minItems": 1, "$defs": call["$defs"]}
    return found if parallel else {**found, "maxItems": 1}


def _moved(schema: Any, path: str) -> Any:
    """A copy of a schema for another place in a document: references to its own parts begin with `path`."""
    if isinstance(schema, list):
        return [_moved(each, path) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, path) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = path + reference[1:]
    return moved


def python_calls(tools: Sequence[Tool], *, parallel: bool) -> str:
    """A Lark grammar of a list of calls in Python's notation, with arguments in the order of the schema, as JSON."""
    some = "(" + " | ".join(f"call_{i}" for i in range(len(tools))) + ")"
    lines = [f'start: "[" {some} (", " {some})* "]"' if parallel else f'start: "[" {some} "]"']
    for i, tool in enumerate(tools):
        lines += [f'call_{i}: {quoted(tool.name)} "(" none_{i}_0 ")"', *_python_arguments(i, tool.parameters)]
    return "\n".join(lines) + "\n"


def _python_arguments(i: int, schema: Mapping[str, Any]) -> list[str]:
    """Rules of the arguments from number `j` on: `none_i_j` if none came before, else `more_i_j`."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties = dict(schema.get("properties", {}))
    lines = []
    for j, (name, value) in enumerate(properties.items()):
        body = {**shared, **value} if isinstance(value, Mapping) else value
        one, rest = f"{quoted(f'{name}=')} %json {json.dumps(body)}", f"more_{i}_{j + 1}"
        wanted = name in schema.get("required", ())
        lines.append(f"pair_{i}_{j}: {one}")
        lines.append(f"none_{i}_{j}: pair_{i}_{j} {rest}" + ("" if wanted else f" | none_{i}_{j + 1}"))
        lines.append(f'more_{i}_{j}: ", " pair_{i}_{j} {rest}' + ("" if wanted else f" | {rest}"))
    return [*lines, f'none_{i}_{len(properties)}: ""', f'more_{i}_{len(properties)}: ""']
