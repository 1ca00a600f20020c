"""Calls between tags, as Qwen 3 Coder writes them, with the values of arguments as plain text:

<tool_call>
<function=get_weather>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from nanoengine.plugins.tool_parsers.constraints import quoted
from nanoengine.plugins.tool_parsers.python_values import as_json
from nanoengine.plugins.tool_parsers.scanning import ScanningParser, Steps

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_UNIONS = ("anyOf", "oneOf", "allOf")
_STRING = frozenset(("string",))  # as what a parameter is read that the tool does not have


class Qwen3Coder(ScanningParser):
    """Values are read by the tool's schema: a string where it has a string only, else JSON, Python, or a string.

    The outer tags may be missing.
    """

    special_tokens = (BEGIN, END)

    @classmethod
    def matches(cls, template: str) -> bool:
        return FUNCTION in template and PARAMETER in template

    def _read(self) -> Steps[None]:
        while marker := (yield from self._until(BEGIN, FUNCTION)):
            yield from self._space()
            inner = marker == BEGIN
            if inner and not (yield from self._literal(FUNCTION)):
                self._reject(len(marker))
                continue
            if not (yield from self._function()):
                self._reject(len(marker))
                continue
            yield from self._space()
            if inner and (yield from self._literal(END)):
                self._keep()
            else:
                self._back()

    def _function(self) -> Steps[bool]:
        """Reads what follows "<function=", and reports it. Returns False, with the text held, if it is no function.

        What follows it, or the last parameter of a malformed one, is held.
        """
        name = yield from self._while(_of_name)
        if not name or not (yield from self._literal(">")):
            return False
        self._begin(name)
        types = self._types(name)
        opening = "{"
        while True:
            yield from self._space()
            tag = yield from self._literal(PARAMETER, END_FUNCTION, END)
            if tag and tag != PARAMETER:
                self._arguments("{}" if opening == "{" else "}")
                return True
            key = (yield from self._while(_of_name)) if tag else ""
            if not key or not (yield from self._literal(">")):
                return True
            self._arguments(f"{opening}{quoted(key)}: ")
            opening = ", "
            if not (yield from self._parameter(types.get(key, _STRING))):
                return True

    def _parameter(self, types: frozenset[str]) -> Steps[bool]:
        """Reads a value with the tag that ends it, and reports it. Returns whether the tag came."""
        yield from self._literal("\n")
        self._keep()
        value = _String(self._arguments) if types == _STRING else _Other(self._arguments, types)
        complete = bool((yield from self._until(END_PARAMETER, piece=value.feed)))
        value.end(complete)
        self._keep()
        return complete

    def _types(self, name: str) -> Mapping[str, frozenset[str]]:
        """The JSON types of the function's parameters."""
        schema = next((tool.parameters for tool in self.tools if tool.name == name), {})
        properties = schema.get("properties")
        return {key: types_of(each) for key, each in properties.items()} if isinstance(properties, Mapping) else {}


class _String:
    """Reports a text as a JSON string. A newline at its end belongs to the tags."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report, self._held, self._opening = report, "", '"'

    def feed(self, text: str) -> None:
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        if text:
            self._report(self._opening + quoted(text)[1:-1])
            self._opening = ""

    def end(self, complete: bool) -> None:
        self._report(self._opening + ('"' if complete else quoted(self._held)[1:-1]))


class _Other:
    """Reports a text as JSON of one of the types, if it is that; else as a JSON string."""

    def __init__(self, report: Callable[[str], None], types: frozenset[str]) -> None:
        self._report, self._types, self._parts = report, types, list[str]()

    def feed(self, text: str) -> None:
        self._parts.append(text)

    def end(self, complete: bool) -> None:
        text = "".join(self._parts)
        self._report(_typed(text.removesuffix("\n"), self._types) if complete else text)


def _typed(text: str, types: frozenset[str]) -> str:
    found = as_json(text)
    return found if found and (not types or types & _type_names(json.loads(found))) else quoted(text)


def types_of(schema: Any) -> frozenset[str]:
    """The JSON types that a schema names, with those of its alternatives and values; empty if it names none."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type")
    found = {each for each in ([named] if isinstance(named, str) else _list(named)) if isinstance(each, str)}
    for union in _UNIONS:
        found |= {kind for each in _list(schema.get(union)) for kind in types_of(each)}
    values = [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else ())]
    return frozenset(found or {kind for value in values for kind in _type_names(value)})


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _type_names(value: Any) -> frozenset[str]:
    if isinstance(value, bool) or value is None:
        return frozenset(("null" if value is None else "boolean",))
    if isinstance(value, int | float):
        return frozenset(("number", "integer") if value == int(value) else ("number",))
    kinds = ((str, "string"), (Mapping, "object"), (list, "array"))
    return frozenset(name for kind, name in kinds if isinstance(value, kind))


def _of_name(char: str) -> bool:
    return not char.isspace() and char not in "<>"
