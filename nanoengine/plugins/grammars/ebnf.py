"""Tells a grammar in EBNF (GBNF) from one in Lark's notation."""

from __future__ import annotations

import re

_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


def is_ebnf(text: str) -> bool:
    """Whether a line begins with `name ::=`."""
    return _RULE.search(text) is not None
