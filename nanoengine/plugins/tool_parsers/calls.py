"""Calls as JSON objects, {"name": ..., "arguments": {...}}, which several forms share."""

from __future__ import annotations

import json

from nanoengine.plugins.tool_parsers.json_text import JsonText
from nanoengine.plugins.tool_parsers.scanning import ScanningParser, Steps

_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)


class JsonCallsParser(ScanningParser):
    """Base class of parsers for forms with such objects."""

    def _calls_in(self, separators: str = "", *, bare: bool = False) -> Steps[bool]:
        """Reads objects, with white space or one of `separators` between them, or a list of objects.

        Returns False, with the text held, if it does not begin with a call. What follows the last call is held.

        Args:
            bare: no marker says that these are calls, so each must have arguments and no unknown keys.
        """
        is_list = bool((yield from self._literal("[")))
        separators, first = "," if is_list else separators, self._calls
        while True:
            yield from self._space()
            if not (yield from self._call(bare=bare)):
                break
            char = yield from self._space()
            if is_list and char == "]":
                self._pos += 1
                self._keep()
                return True
            if char and char in separators:
                self._pos += 1
            elif char != "{" or is_list:
                break
        if self._calls > first:
            self._back()
        return self._calls > first

    def _call(self, *, bare: bool) -> Steps[bool]:
        """Reads one object and reports its call. Returns False if it is none.

        If an object turns out to be malformed after its call was reported, what follows the arguments is held.
        """
        index, name, arguments = self._calls, "", ""
        if not (yield from self._literal("{")):
            return False
        while (key := (yield from self._key())) and (key in _KEYS or not bare or self._calls > index):
            begun = self._calls > index
            if name and not begun and key in _ARGUMENTS and (yield from self._peek()) == "{":
                self._begin(name)
                if not (yield from self._json(self._arguments)):
                    return True
            else:
                value = yield from self._json_value()
                name = _name(value) if key == "name" else name
                arguments = _object(value) if key in _ARGUMENTS and not begun else arguments
                if not value or (key == "name" and not name) or (key in _ARGUMENTS and not begun and not arguments):
                    break
                if name and arguments and not begun:
                    self._report(name, arguments)
            yield from self._space()
            separator = yield from self._literal(",", "}")
            if separator == "}":
                if name and not bare and self._calls == index:
                    self._report(name, "{}")
                if self._calls > index:
                    self._keep()
                break
            if not separator:
                break
        return self._calls > index

    def _key(self) -> Steps[str]:
        """Reads the key of a member and what comes before its value. Returns "" if there is none."""
        if (yield from self._space()) != '"':
            return ""
        key = yield from self._json_value()
        yield from self._space()
        if not key or not (yield from self._literal(":")):
            return ""
        yield from self._space()
        return str(json.loads(key))

    def _report(self, name: str, arguments: str) -> None:
        self._begin(name)
        self._arguments(arguments)


def _name(text: str) -> str:
    """The name of a function in its JSON text; "" if it is none."""
    name = json.loads(text) if text.startswith('"') else ""
    return str(name) if name.isprintable() else ""


def _object(text: str) -> str:
    """The JSON text of an object, of which `text` may be the JSON text, or a string with it; "" if it is none."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        text = json.loads(text).strip() or "{}"
        value = JsonText()
        end, text = value.feed(text)
        if not value.done or end < len(text):
            return ""
    return text if text.startswith("{") else ""
