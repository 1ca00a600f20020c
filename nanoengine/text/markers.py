"""Texts that are looked for in a text that comes in pieces. What may be the beginning of one is held back."""

from __future__ import annotations

import re
from collections.abc import Collection


class Marker:
    """Finds the first place of a text."""

    __slots__ = ("_beginnings", "_held", "_marker")

    def __init__(self, marker: str) -> None:
        self._marker, self._held, self._beginnings = marker, "", Beginnings((marker,))

    def feed(self, text: str) -> tuple[str, bool, str]:
        """What is certain to be before the marker, whether it was found, and what is behind it."""
        before, found, after = (self._held + text).partition(self._marker)
        if found:
            self._held = ""
            return before, True, after
        end = len(before) - self._beginnings.at_end(before)
        self._held = before[end:]
        return before[:end], False, ""

    def finish(self) -> str:
        """What was held back, when the text has ended."""
        return self._held


class Without:
    """Leaves texts out, wherever they are."""

    __slots__ = ("_beginnings", "_held", "_pattern")

    def __init__(self, texts: Collection[str]) -> None:
        longest_first = sorted(texts, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if texts else None
        self._beginnings = Beginnings(texts)
        self._held = ""

    def feed(self, text: str) -> str:
        """The next piece of the text without them."""
        if self._pattern is None:
            return text
        text = self._pattern.sub("", self._held + text)
        end = len(text) - self._beginnings.at_end(text)
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """What was held back: the text ends here, or something else comes between."""
        held, self._held = self._held, ""
        return held


class Beginnings:
    """What a text may end with that can become one of the markers."""

    __slots__ = ("_all", "_first", "_most")

    def __init__(self, markers: Collection[str]) -> None:
        self._all = frozenset(marker[:end] for marker in markers for end in range(1, len(marker)))
        self._most = max(map(len, self._all), default=0)
        self._first = frozenset(marker[0] for marker in markers)

    def at_end(self, text: str) -> int:
        """The number of characters at the end of the text that are the longest such beginning."""
        end = text[-self._most :] if self._most else ""
        if self._first.isdisjoint(end):
            return 0
        return next((len(end) - at for at in range(len(end)) if end[at:] in self._all), 0)
