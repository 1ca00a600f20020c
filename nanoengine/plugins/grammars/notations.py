"""Grammars in Lark's notation and in EBNF (GBNF): which one a text has, and both for llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from llguidance.gbnf_to_lark import gbnf_to_lark

from nanoengine.plugins.grammars.ebnf import is_ebnf

_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|#[^\n]*|[\w-]+|\)(?=[ \t]*[*+?{])', re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_JSON = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|#[^\n]*|/(?:[^/\\\n]|\\.)+/|(%json\s*)(?=\{)', re.DOTALL)


def lark_of(text: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """The grammar in Lark's notation, in which `change` replaced each schema behind `%json`.

    Raises `ValueError` for one in EBNF that is wrong.
    """
    if not is_ebnf(text):
        return _changed(text, change)
    try:
        return gbnf_to_lark(_PARTS.sub(_plain, text))
    except Exception as error:  # it raises Exception, and IndexError behind the end of the text
        raise ValueError(f"it is no EBNF (GBNF): {error}") from error


def _changed(text: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    parts, at = [], 0
    for found in _JSON.finditer(text):
        if found[1] is None or found.start() < at:
            continue  # a text, a comment, an expression; or it is inside of a schema
        try:
            schema, end = json.JSONDecoder().raw_decode(text, found.end())
        except ValueError:
            continue  # llguidance says what is wrong
        parts += [text[at : found.end()], json.dumps(change(schema))]
        at = end
    return "".join([*parts, text[at:]])


def _plain(found: re.Match[str]) -> str:
    """A part of an EBNF grammar as the converter of llguidance reads it rightly.

    It shortens the escapes of characters; the classes that it makes are those of Rust, where two of some characters
    are operators; it needs the name "start" for itself; and it leaves out the parentheses of a repeated group that has
    one part, also where this is a repetition.
    """
    part = found[0]
    if part == "start":
        return "start-of-user"
    if part == ")":
        return ' "")'
    if part[0] in '"[':
        part = _ESCAPE.sub(_character, part)
    if part[0] == "[":
        part = part.replace("&&", r"&\x26").replace("~~", r"~\x7e").replace("--", r"-\x2d")
    return part


def _character(found: re.Match[str]) -> str:
    digits = found[1] or found[2] or found[3]
    if digits is None:
        return found[0]
    code = int(digits, 16)
    return f"\\x{code:02x}" if code < 0x80 else chr(code)
