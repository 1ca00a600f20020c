"""Calls as a list in Python's notation, of Llama 4 and others: [get_weather(city="Paris"), get_time()].

It is at the beginning of the output, or after <|python_start|>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoengine.api import Tool
from nanoengine.plugins.tool_parsers.constraints import python_calls, quoted
from nanoengine.plugins.tool_parsers.python_values import PythonString, PythonText, as_json
from nanoengine.plugins.tool_parsers.scanning import ScanningParser, Steps

BEGIN, END = "<|python_start|>", "<|python_end|>"


class Pythonic(ScanningParser):
    """Arguments have names, and are literals of Python or JSON. Strings are reported as they come, others whole."""

    special_tokens = (BEGIN, END)

    @classmethod
    def matches(cls, template: str) -> bool:
        return BEGIN in template or "[func_name1(" in template

    @classmethod
    def constraint(cls, tools: Sequence[Tool], *, required: bool, parallel: bool) -> Mapping[str, Any] | None:
        fits = required and all(map(_is_readable, tools))
        return {"grammar": python_calls(tools, parallel=parallel)} if fits else None

    def _read(self) -> Steps[None]:
        yield from self._space()
        if not (yield from self._list()):
            self._back()
        yield from self._between(BEGIN, END, self._list)

    def _list(self) -> Steps[bool]:
        """Reads a list of calls and reports them. Returns False, with the text held, if it begins with none.

        What follows the last call, or the last argument of a malformed one, is held.
        """
        first = self._calls
        if not (yield from self._literal("[")):
            return False
        while (yield from self._call()):
            yield from self._space()
            separator = yield from self._literal(",", "]")
            if separator == "]":
                self._keep()
            if separator != ",":
                break
        if self._calls > first:
            self._back()
        return self._calls > first

    def _call(self) -> Steps[bool]:
        """Reads one call and reports it. Returns whether it is complete."""
        yield from self._space()
        name = yield from self._while(_of_name)
        if not name or not (yield from self._literal("(")):
            return False
        if (yield from self._space()) == ")":
            self._pos += 1
            self._begin(name)
            self._arguments("{}")
            return True
        return (yield from self._named_arguments(name))

    def _named_arguments(self, name: str) -> Steps[bool]:
        """Reads the arguments of a call, up to its ")", and reports the call with them."""
        opening, char = "{", ""
        while char != ")":
            before = self._pos - self._start
            key = yield from self._while(_of_name)
            yield from self._space()
            if not key.isidentifier() or not (yield from self._literal("=")):
                return False
            char = yield from self._space()
            if opening == "{":
                if not char or char not in _BEGINS_LITERAL:
                    return False
                self._begin(name, before)
            lead = f"{opening}{quoted(key)}: "
            if not (yield from (self._string(lead) if char in ("'", '"') else self._value(lead))):
                return False
            opening = ", "
            yield from self._space()
            if (yield from self._literal(",")):
                char = yield from self._space()
            elif (yield from self._peek()) != ")":
                return False
            else:
                char = ")"
        self._pos += 1
        self._arguments("}")
        return True

    def _string(self, lead: str) -> Steps[bool]:
        """Reads a string and reports it with what leads to it, as it comes. Returns whether it is complete."""
        string = PythonString()
        while True:
            self._pos, text = string.feed(self._text, self._pos)
            if text:
                self._arguments(lead + text)
                lead = ""
            if string.done or string.failed or self._ended:
                return string.done
            yield

    def _value(self, lead: str) -> Steps[bool]:
        """Reads another literal, up to a "," or ")", and reports it and what leads to it. Returns whether it is one."""
        literal, parts = PythonText(), list[str]()
        while not literal.done:
            self._pos, text = literal.feed(self._text, self._pos)
            parts.append(text)
            if not literal.done:
                if self._ended:
                    return False
                yield
        value = as_json("".join(parts))
        if value:
            self._arguments(lead + value)
        return bool(value)


def _is_readable(tool: Tool) -> bool:
    """Whether the parser can read the tool's name and those of its arguments, as far as the schema is one."""
    properties, required = tool.parameters.get("properties", {}), tool.parameters.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    known = all(isinstance(name, str) and name in properties for name in required)
    return known and all(map(_of_name, tool.name)) and all(map(str.isidentifier, properties))


def _of_name(char: str) -> bool:
    return char.isalnum() or char in "_-."


_BEGINS_LITERAL = frozenset("\"'[({-+.0123456789TFNtfnrbuRBU")
