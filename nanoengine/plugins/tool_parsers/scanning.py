"""Tool parsers as generators: they read the text in order, and wait where it has not come yet.

So the events cannot depend on how the text is cut. The text from `_start` on is *held*: it may turn out to be no call,
and then it is content (`_reject`). What was used or reported is no longer held (`_keep`).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from nanoengine.api import Content, ParserEvent, Tool, ToolCallArguments, ToolCallBegin, ToolParser
from nanoengine.plugins.tool_parsers.json_text import JsonText


@dataclass(frozen=True, slots=True)
class _Sought:
    """Markers that are looked for. beginnings: what a text may end with that can become one; most: their length."""

    pattern: re.Pattern[str]
    beginnings: frozenset[str]
    most: int

    def begun(self, text: str, start: int) -> int:
        """How many characters at the end of `text[start:]` may be the beginning of a marker."""
        for at in range(max(start, len(text) - self.most), len(text)):
            if text[at] in self.beginnings and text[at:] in self.beginnings:  # one character is a beginning, too
                return len(text) - at
        return 0


@cache
def _sought(markers: tuple[str, ...]) -> _Sought:
    """Of places that are equal, the longest marker counts."""
    longest_first = sorted(markers, key=len, reverse=True)
    beginnings = frozenset(marker[:end] for marker in markers for end in range(1, len(marker)))
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return _Sought(pattern, beginnings, max(map(len, beginnings), default=0))


T = TypeVar("T")
Steps = Generator[None, None, T]  # it yields where it needs more text
_SPACE = " \t\n\r"


class ScanningParser(ToolParser):
    """Base class of parsers whose `_read` reads the whole text."""

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        super().__init__(tools)
        self._text, self._start, self._pos = "", 0, 0
        self._ended = False
        self._events: list[ParserEvent] = []
        self._calls = 0
        self._steps = self._read()

    @abstractmethod
    def _read(self) -> Steps[None]:
        """Reads the text up to its end."""

    def feed(self, text: str) -> list[ParserEvent]:
        self._text = self._text[self._start :] + text
        self._pos, self._start = self._pos - self._start, 0
        return self._advance()

    def finish(self) -> list[ParserEvent]:
        self._ended = True
        return self._advance()

    def _advance(self) -> list[ParserEvent]:
        next(self._steps, None)
        events, self._events = self._events, []
        return events

    # -- what is reported --

    def _keep(self) -> None:
        """What was read up to here is not held any longer."""
        self._start = self._pos

    def _content(self, text: str) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, Content):
            self._events[-1] = Content(last.text + text)
        elif text:
            self._events.append(Content(text))

    def _reject(self, count: int) -> None:
        """The first `count` characters that are held are content; reading goes on behind them."""
        self._content(self._text[self._start : self._start + count])
        self._pos = self._start + count
        self._keep()

    def _back(self) -> None:
        """Reading goes on where the text that is held begins."""
        self._pos = self._start

    def _begin(self, name: str, count: int | None = None) -> None:
        """Reports a call. It used all that was read so far, or only the first `count` characters that are held."""
        self._events.append(ToolCallBegin(self._calls, name))
        self._calls += 1
        self._start = self._pos if count is None else self._start + count

    def _arguments(self, text: str) -> None:
        index = self._calls - 1
        last = self._events[-1] if self._events else None
        if isinstance(last, ToolCallArguments) and last.index == index:
            self._events[-1] = ToolCallArguments(index, last.text + text)
        elif text:
            self._events.append(ToolCallArguments(index, text))
        self._keep()

    # -- what is read --

    def _peek(self) -> Steps[str]:
        """The next character; "" at the end of the text."""
        while self._pos == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._pos]

    def _space(self) -> Steps[str]:
        """Skips white space. Returns the character behind it, which is not read yet; "" at the end."""
        while (char := (yield from self._peek())) and char in _SPACE:
            self._pos += 1
        return char

    def _rest(self) -> Steps[None]:
        """What comes until the end is content."""
        while (yield from self._peek()):
            self._reject(len(self._text) - self._start)

    def _literal(self, *words: str) -> Steps[str]:
        """Reads the word that comes next. Returns it; "" if none of the words comes."""
        while True:
            rest = self._text[self._pos : self._pos + max(map(len, words))]
            for word in words:
                if rest.startswith(word):
                    self._pos += len(word)
                    return word
            if self._ended or not any(word.startswith(rest) for word in words):
                return ""
            yield

    def _while(self, accepts: Callable[[str], bool]) -> Steps[str]:
        """Reads the characters that are accepted."""
        found = []
        while (char := (yield from self._peek())) and accepts(char):
            self._pos += 1
            found.append(char)
        return "".join(found)

    def _until(self, *markers: str, piece: Callable[[str], None] | None = None) -> Steps[str]:
        """Gives the text before the first marker to `piece` (default: it is content), as it comes.

        Returns the marker, which has been read and is held; "" if the text ends before one.
        """
        give, sought = piece or self._content, _sought(markers)
        while True:
            found = sought.pattern.search(self._text, self._pos)
            at = (
                found.start()
                if found
                else len(self._text) - (0 if self._ended else sought.begun(self._text, self._pos))
            )
            if at > self._pos:
                give(self._text[self._pos : at])
            self._pos = self._start = at
            if found:
                self._pos = found.end()
                return found[0]
            if self._ended:
                return ""
            yield

    def _json(self, piece: Callable[[str], None]) -> Steps[bool]:
        """Gives the text of a JSON value to `piece`, as it comes. Returns whether it is complete, and right."""
        value = JsonText()
        while True:
            self._pos, text = value.feed(self._text, self._pos)
            piece(text)
            if value.done or value.failed or self._ended:
                return value.done
            yield

    def _json_value(self) -> Steps[str]:
        """Reads a JSON value. Returns its text; "" if it is malformed."""
        parts: list[str] = []
        return "".join(parts) if (yield from self._json(parts.append)) else ""

    def _between(self, begin: str, end: str, read: Callable[[], Steps[bool]]) -> Steps[None]:
        """Reads what comes behind each `begin` by `read`, up to the end of the text. `end` may be missing.

        If `read` returns False, with the text held, the marker is content.
        """
        while (yield from self._until(begin)):
            yield from self._space()
            if not (yield from read()):
                self._reject(len(begin))
                continue
            yield from self._space()
            if (yield from self._literal(end)):
                self._keep()
            else:
                self._back()
