"""Follows one JSON value while its text comes: where it ends, and whether a character is wrong."""

from __future__ import annotations

import re

_SPACE = " \t\n\r"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_HEX = frozenset("0123456789abcdefABCDEF")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_BEGUN = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE][+-]?[0-9]*)?)?|[eE][+-]?[0-9]*)?)?")
_WORDS = {"t": "true", "f": "false", "n": "null"}
_CLOSES = {"{": "}", "[": "]"}
_SPACED = frozenset(("value", "item", "key", "member", "colon", "after"))  # states in which white space may come
_MOST_DEPTH = 100  # who reads it with json.loads recurses
_MOST_DIGITS = 1000  # who reads it with int() has a limit, too


class JsonText:
    """One JSON value, whose text is given to `feed` as it comes.

    Attributes:
        done: the value is complete. failed: the character after what was taken is wrong there.
    """

    __slots__ = ("_is_key", "_missing", "_open", "_state", "done", "failed")

    def __init__(self) -> None:
        self._state = "value"  # what comes next
        self._open: list[str] = []  # the brackets that are open
        self._is_key = False  # the string that is open is a key
        self._missing = ""  # the rest of a word; the hexadecimal digits of an escape; what is there of a number
        self.done = self.failed = False

    def feed(self, text: str, start: int = 0) -> tuple[int, str]:
        """Takes `text[start:]` as far as it belongs to the value.

        Returns where what was taken ends, and its text, in which control characters in strings, which JSON does not
        allow, are escapes.
        """
        parts: list[str] = []
        while start < len(text) and not self.done:
            end = _PLAIN.match(text, start).end() if self._state == "string" else start  # type: ignore[union-attr]
            if end > start:
                parts.append(text[start:end])
                start = end
                continue
            char = text[start]
            if self._state == "number" and not self._is_number(char):
                if self.failed:
                    break
                continue  # the number has ended before this character
            if char not in _SPACE or self._state not in _SPACED:
                self.failed = not self._takes(char)
                if self.failed:
                    break
            parts.append(f"\\u{ord(char):04x}" if self._state == "string" and char < " " else char)
            start += 1
        return start, "".join(parts)

    def _takes(self, char: str) -> bool:
        """Whether the character is right here. Goes on to the next state."""
        state = self._state
        if state == "string":
            return self._in_string(char)
        if state in ("escape", "hex"):
            return self._in_escape(char)
        if state in ("value", "item"):
            return self._close() if (state, char) == ("item", "]") else self._begin(char)
        if state in ("key", "member"):
            self._state, self._is_key = "string", True
            return char == '"' or ((state, char) == ("member", "}") and self._close())
        if state == "colon":
            self._state = "value"
            return char == ":"
        if state == "word":
            expected, self._missing = self._missing[0], self._missing[1:]
            return char == expected and (bool(self._missing) or self._end())
        if state == "after":
            if char == ",":
                self._state = "value" if self._open[-1] == "[" else "key"
                return True
            return char == _CLOSES[self._open[-1]] and self._close()
        return True  # a digit

    def _begin(self, char: str) -> bool:
        self._is_key = False
        if char in _CLOSES:
            self._open.append(char)
            self._state = "member" if char == "{" else "item"
            return len(self._open) <= _MOST_DEPTH
        if char == '"':
            self._state = "string"
        elif char in _WORDS:
            self._state, self._missing = "word", _WORDS[char][1:]
        else:
            self._state, self._missing = "number", char
            return char == "-" or "0" <= char <= "9"
        return True

    def _is_number(self, char: str) -> bool:
        """Whether the character belongs to the number. If not, the value ends, or has failed."""
        longer = self._missing + char
        if _NUMBER_BEGUN.fullmatch(longer):
            self._missing, self.failed = longer, len(longer) > _MOST_DIGITS
            return not self.failed
        self.failed = _NUMBER.fullmatch(self._missing) is None
        if not self.failed:
            self._end()
        return False

    def _in_string(self, char: str) -> bool:
        if char == '"':
            return self._end_key() if self._is_key else self._end()
        if char == "\\":
            self._state = "escape"
        return True

    def _end_key(self) -> bool:
        self._state = "colon"
        return True

    def _in_escape(self, char: str) -> bool:
        if self._state == "hex":
            self._missing += char
            if len(self._missing) == 4:
                self._state = "string"
            return char in _HEX
        self._state, self._missing = ("hex" if char == "u" else "string"), ""
        return char in '"\\/bfnrtu'

    def _close(self) -> bool:
        self._open.pop()
        return self._end()

    def _end(self) -> bool:
        """A value has ended."""
        self._state, self.done = "after", not self._open
        return True
