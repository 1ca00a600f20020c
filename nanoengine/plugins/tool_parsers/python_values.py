"""Literals of Python as JSON: where one ends while its text comes, and its value."""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

from nanoengine.plugins.tool_parsers.json_text import JsonText

_NAMES = {"true": True, "false": False, "null": None}
_MOST_DEPTH = 100


class PythonText:
    """The text of one literal, up to a "," or ")" that does not belong to it.

    Attributes:
        done: that has come.
    """

    __slots__ = ("_closing", "_depth", "_escaped", "_opening", "_quote", "done")

    def __init__(self) -> None:
        self._depth = 0
        self._opening = ""  # quotation marks that may be the beginning of three
        self._quote = ""  # the marks that will end the string
        self._closing = ""  # those of them that have come
        self._escaped = False
        self.done = False

    def feed(self, text: str, start: int = 0) -> tuple[int, str]:
        """Takes `text[start:]` as far as it belongs to the literal.

        Returns where what was taken ends, and its text, in which newlines in strings of one line are escapes.
        """
        parts: list[str] = []
        for at in range(start, len(text)):
            char = text[at]
            self.done = self._is_end(char)
            if self.done:
                return at, "".join(parts)
            parts.append("\\n" if char == "\n" and len(self._quote) == 1 else char)
        return len(text), "".join(parts)

    def _is_end(self, char: str) -> bool:
        """Whether the literal has ended before this character. If not, goes on to the state behind it."""
        if self._opening:
            if char == self._opening[0]:
                self._opening += char
                if len(self._opening) == 3:
                    self._quote, self._opening = self._opening, ""
                return False
            self._quote, self._opening = (self._opening if len(self._opening) == 1 else ""), ""
        if self._quote:
            self._in_string(char)
            return False
        if char in "\"'":
            self._opening = char
        elif char in "([{":
            self._depth += 1
        elif char in ")]}" and self._depth:
            self._depth -= 1
        else:
            return char in ",)]}" and not self._depth
        return False

    def _in_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == self._quote[0]:
            self._closing += char
            if self._closing == self._quote:
                self._quote = self._closing = ""
            return
        self._closing = ""


def as_json(text: str) -> str:
    """The JSON text of a literal of Python or JSON; "" if it is none, or has no value in JSON."""
    value = JsonText()
    if value.feed(f"{text.strip()} ")[0] >= len(text.strip()) and value.done:  # a number ends before the space
        return text.strip()
    try:
        with warnings.catch_warnings():  # of escapes that Python does not know
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
        found = json.dumps(_value(tree.body, 0), ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return found if found.isascii() or not _has_surrogates(found) else json.dumps(json.loads(found))


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _value(node: ast.expr, depth: int) -> Any:
    """The value of a literal. Raises `ValueError` for another expression."""
    match node:
        case _ if depth > _MOST_DEPTH:
            raise ValueError("nested too deeply")
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as number)):
            return -number if isinstance(node.op, ast.USub) else number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, depth + 1) for item in items]
        case ast.Dict(keys=keys, values=values) if all(isinstance(_key(key), str) for key in keys):
            return {_key(key): _value(value, depth + 1) for key, value in zip(keys, values, strict=True)}
    raise ValueError(f"{ast.unparse(node)} is not a literal")


def _key(node: ast.expr | None) -> Any:
    return node.value if isinstance(node, ast.Constant) else None
