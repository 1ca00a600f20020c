"""Literals of Python as JSON: where one ends while its text comes, and its value."""

from __future__ import annotations

import ast
import json
import re
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


class PythonString:
    """The text of one string without a prefix, as JSON. In double quotes, "\\/" is the escape that JSON has.

    Attributes:
        done: its end has come. failed: what follows what was taken is no escape.
    """

    __slots__ = ("_quote", "done", "failed")

    def __init__(self) -> None:
        self._quote = ""  # the marks around it
        self.done = self.failed = False

    def feed(self, text: str, start: int = 0) -> tuple[int, str]:
        """Takes `text[start:]` as far as it is certain. Returns where that ends, and its JSON text.

        What was not taken must be given again, with more text.
        """
        parts: list[str] = []
        while start < len(text) and not self.done and not self.failed:
            end, taken = self._take(text, start) if self._quote else self._open(text, start)
            if end == start:
                break
            parts.append(taken)
            start = end
        return start, "".join(parts)

    def _open(self, text: str, at: int) -> tuple[int, str]:
        """One, two (an empty string) or three marks."""
        mark = text[at]
        count = len(text[at : at + 3]) - len(text[at : at + 3].lstrip(mark))
        if count < 3 and at + count == len(text):
            return at, ""
        self.done = count == 2
        self._quote = mark * (3 if count == 3 else 1)
        return at + count, '""' if self.done else '"'

    def _take(self, text: str, at: int) -> tuple[int, str]:
        plain = _PLAIN.match(text, at)
        if plain:
            return plain.end(), plain[0]
        char = text[at]
        if char == "\\":
            return self._escape(text, at)
        if char != self._quote[0]:
            return at + 1, _inside(char)
        if text.startswith(self._quote, at):
            self.done = True
            return at + len(self._quote), '"'
        if self._quote.startswith(text[at:]):
            return at, ""  # three marks may come
        return at + 1, _inside(char)

    def _escape(self, text: str, at: int) -> tuple[int, str]:
        found = _ESCAPE.match(text, at)
        if found is None or (found["octal"] and len(found["octal"]) < 3 and found.end() == len(text)):
            self.failed = found is None and _ESCAPE_BEGUN.fullmatch(text, at) is None
            return at, ""
        if found["char"] == "/" and self._quote[0] == '"':
            return found.end(), "/"
        try:
            with warnings.catch_warnings():  # of escapes that Python does not know
                warnings.simplefilter("ignore")
                value = str(ast.literal_eval(f'"{found[0]}"'))
        except SyntaxError:  # there is no such character
            self.failed = True
            return at, ""
        return found.end(), _inside(value)


_PLAIN = re.compile(r"""[^\\'"\x00-\x1f]+""")
_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}\n]{1,99}\}|(?P<octal>[0-7]{1,3})|(?P<char>[^xuUN0-7]))",
    re.DOTALL,
)
_ESCAPE_BEGUN = re.compile(r"\\(?:x[0-9a-fA-F]?|u[0-9a-fA-F]{0,3}|U[0-9a-fA-F]{0,7}|N(?:\{[^}\n]{0,99})?)?")


def _inside(text: str) -> str:
    """The text in a JSON string."""
    return json.dumps(text, ensure_ascii=_has_surrogates(text))[1:-1]


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
