"""omegaconf's grammar of interpolation, within bounds: it takes about 10 us a character."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

ESCAPE_HINT = r". A text that holds ${ is written with a backslash: \${"
"""How a text that only looks like an interpolation is written: the tail of a message."""

_BRACKET = re.compile(r"\\*\$\{|[{}\[\]]")
_MAX_TEXT, _MAX_WITHIN, _MAX_NESTED = 100_000, 1_000, 16  # characters of a text, of its interpolations; brackets
_MAX_READ = 20_000  # characters within interpolations, of all texts of a composition; outside of them 20 count as one


@dataclass(slots=True)
class Grammar:
    """The interpolations of one composition: each text parsed once, the characters of all of them counted."""

    trees: dict[str, Any] = field(default_factory=dict)
    read: int = 0

    def check(self, text: str) -> str:
        """Why a text that holds `${` is no interpolation, or one too many; "" if it is one."""
        if len(text) > _MAX_TEXT:
            return f"a text with ${{ in it has {len(text):,} characters, more than {_MAX_TEXT:,}"
        within, deepest = _extent(text)
        if within > _MAX_WITHIN or deepest > _MAX_NESTED:
            most = f"at most {_MAX_WITHIN:,} and {_MAX_NESTED}"
            return f"a text has interpolations of {within:,} characters, {deepest} within each other; {most} are read"
        if why := self.count(within + 3 * text.count("${") + (len(text) - within) // 20):
            return why
        if text in self.trees:
            return ""
        try:
            self.trees[text] = parse(text)
        except (OmegaConfBaseException, RecursionError, ValueError) as error:
            return str(error).split("\n")[0] or type(error).__name__
        return ""

    def count(self, characters: int) -> str:
        """Takes them from what may be read; why that is too much, or ""."""
        self.read += characters
        return "" if self.read <= _MAX_READ else f"the interpolations have more than {_MAX_READ:,} characters in all"


def _extent(text: str) -> tuple[int, int]:
    """How many characters are within interpolations, and how deep brackets are nested in them."""
    within = depth = deepest = start = 0
    for found in _BRACKET.finditer(text):
        bracket = found[0]
        if bracket.endswith("${"):
            if depth == 0 and len(bracket) % 2:  # an odd number of backslashes: it is a text
                continue
            start = start if depth else found.end()
            depth += 1
        elif depth:
            depth += 1 if bracket in "{[" else -1
            within += 0 if depth else found.start() - start
        deepest = max(deepest, depth)
    return within + (len(text) - start if depth else 0), deepest
