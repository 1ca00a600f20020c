"""Texts that are looked for in a text that comes in pieces. What may be the beginning of one is held back."""

from __future__ import annotations

import re
from collections.abc import Collection


class Marker:
    """Finds the first place of a text."""

    __slots__ = ("_held", "_marker")

    def __init__(self, marker: str) -> None:
        self._marker, self._held = marker, ""

    def feed(self, text: str) -> tuple[str, bool, str]:
        """What is certain to be before the marker, whether it was found, and what is behind it."""
        before, found, after = (self._held + text).partition(self._marker)
        if found:
            self._held = ""
            return before, True, after
        end = len(before) - begun(before, (self._marker,))
        self._held = before[end:]
        return before[:end], False, ""

    def finish(self) -> str:
        """What was held back, when the text has ended."""
        return self._held


class Without:
    """Leaves texts out, wherever they are."""

    __slots__ = ("_held", "_pattern", "_texts")

    def __init__(self, texts: Collection[str]) -> None:
        self._texts = tuple(sorted(texts, key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self._texts))) if texts else None
        self._held = ""

    def feed(self, text: str) -> str:
        """The next piece of the text without them."""
        if self._pattern is None:
            return text
        text = self._pattern.sub("", self._held + text)
        end = len(text) - begun(text, self._texts)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """What was held back: the text ends here, or something else comes between."""
        held, self._held = self._held, ""
        return held


def begun(text: str, markers: Collection[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a marker."""
    most = max(map(len, markers)) - 1
    for count in range(min(most, len(text)), 0, -1):
        if any(marker.startswith(text[-count:]) for marker in markers):
            return count
    return 0
