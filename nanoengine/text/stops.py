"""Stop strings: finds the one that is complete first, and how much of the text may be the beginning of one.

There is a Knuth-Morris-Pratt automaton for each stop string. A character costs O(1) amortised, for any length of stop
strings, and the result does not depend on how the text is split into tokens or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string and its position: characters `start` to `end` of the text so far."""

    stop: str
    start: int
    end: int


class StopMatcher:
    """Searches for several stop strings in a text that comes in pieces.

    The match that is *complete* first is returned. If several are complete at the same character, it is the first in
    `stops` (as in vLLM).

    Attributes:
        held: length of the longest end of the text that is a proper prefix of a stop string.
    """

    __slots__ = ("_failures", "_first_chars", "_position", "_states", "_stops", "held")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string is rejected when the parameters are resolved"
        self._stops = tuple(stops)
        self._failures = [_failure_table(stop) for stop in stops]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._states = [0] * len(self._stops)
        self._position = self.held = 0

    def feed(self, text: str, min_end: int = 0) -> StopMatch | None:
        """Appends `text`; returns the first match that ends after character `min_end`, or None.

        After a match the matcher must not be used again, because the rest of `text` was not read.
        """
        states, start = self._states, self._position
        self._position += len(text)
        if not self.held and self._first_chars.isdisjoint(text):
            return None
        for end, char in enumerate(text, start + 1):
            for i, stop in enumerate(self._stops):
                state = _advance(stop, self._failures[i], states[i], char)
                if state == len(stop):
                    if end > min_end:
                        return StopMatch(stop, end - len(stop), end)
                    state = self._failures[i][state - 1]
                states[i] = state
        self.held = max(states)
        return None

    def peek(self, text: str, min_end: int = 0) -> StopMatch | None:
        """What `feed` would return. The matcher does not change."""
        states, position, held = list(self._states), self._position, self.held
        match = self.feed(text, min_end)
        self._states, self._position, self.held = states, position, held
        return match


def _advance(stop: str, failure: Sequence[int], state: int, char: str) -> int:
    """The state after `char`: the number of matched characters. `len(stop)` is a match."""
    while state and stop[state] != char:
        state = failure[state - 1]
    return state + 1 if stop[state] == char else state


def _failure_table(stop: str) -> list[int]:
    """[len(stop)]: for each prefix, the length of its longest proper border (Knuth, Morris, Pratt 1977)."""
    table = [0]
    for char in stop[1:]:
        table.append(_advance(stop, table, table[-1], char))
    return table
