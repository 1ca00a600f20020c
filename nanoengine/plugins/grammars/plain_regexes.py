"""Refuses regular expressions that xgrammar takes more widely than they are meant.

It ignores anchors wherever they are, lets `.` match a line break, and has no classes inside of classes. In a string of
JSON it writes quotes, backslashes and control characters of a pattern as they are, which is no JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nanoengine.api import GrammarError

_PART = re.compile(r"\\.|\[\^?|.", re.DOTALL)
_KEPT_ESCAPES = frozenset("dDwWsS!#$%&'()*+,-./:;<=>?@[]^_`{|}~")  # that are no quote, backslash or control character


def plain_regex(pattern: str) -> str:
    """The expression for xgrammar, where `.` is no line break. Raises `GrammarError` that names what is refused."""
    return "".join("[^\\n]" if part == "." and not in_class else part for part, in_class in _parts(pattern))


def check_pattern(pattern: str) -> None:
    """A `pattern` in a JSON schema. Raises `GrammarError` that names what is refused."""
    for part, _ in _parts(pattern):
        wrong = part[1:] not in _KEPT_ESCAPES if part[0] == "\\" else part == '"' or part < " "
        if wrong:
            raise _refused(pattern, f"{part!r}, which xgrammar does not write as JSON")


def _parts(pattern: str) -> Iterator[tuple[str, bool]]:
    """Characters, escapes and beginnings of classes, and whether each is in a class."""
    depth, in_class = 0, False
    for found in _PART.finditer(pattern):
        part, before, behind = found[0], pattern[: found.start()], pattern[found.end() :]
        if in_class:
            if part[0] == "[":
                raise _refused(pattern, r"[ in a class: write \[")
        elif (part == "^" and not (not before or (depth == 0 and before[-1] == "|"))) or (
            part == "$" and not (not behind or (depth == 0 and behind[0] == "|"))
        ):
            raise _refused(pattern, f"{part} inside of it, which xgrammar ignores")
        depth += 0 if in_class else (part == "(") - (part == ")")
        yield part, in_class
        in_class = part != "]" if in_class else part[0] == "["


def _refused(pattern: str, what: str) -> GrammarError:
    return GrammarError(f"the regular expression {pattern!r:.80} has {what}; or use the backend llguidance")
