"""Stop strings: find the one that completes first, and say how much of the text may still become one.

One Knuth-Morris-Pratt automaton a stop string, fed character by character: every character costs O(1) amortised,
however long the stop strings are, and what is found does not depend on how the text was cut into tokens or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string and where it stands: characters `start` to `end` of the text fed so far."""

    stop: str
    start: int
    end: int


class StopMatcher:
    """Looks for several stop strings in a text that arrives piece by piece.

    The match that *completes* first wins; of several that complete at the same character, the one named first
    (vLLM's rule).
    """

    __slots__ = ("_failures", "_first_chars", "_position", "_states", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string is refused when the parameters are resolved"
        self._stops = tuple(stops)
        self._failures = [_failure_table(stop) for stop in stops]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._states = [0] * len(self._stops)
        self._position = 0

    @property
    def held(self) -> int:
        """Length of the longest end of the text that is a proper prefix of a stop string."""
        return max(self._states, default=0)

    def feed(self, text: str, min_end: int = 0) -> StopMatch | None:
        """Appends `text`; returns the first match that ends after character `min_end`, or None.

        After a match only `peek` and `feed` of a new matcher make sense: the rest of `text` was not read.
        """
        states, start = self._states, self._position
        self._position += len(text)
        if not any(states) and self._first_chars.isdisjoint(text):
            return None
        for end, char in enumerate(text, start + 1):
            for i, stop in enumerate(self._stops):
                state = _advance(stop, self._failures[i], states[i], char)
                if state == len(stop):
                    if end > min_end:
                        return StopMatch(stop, end - len(stop), end)
                    state = self._failures[i][state - 1]
                states[i] = state
        return None

    def peek(self, text: str, min_end: int = 0) -> StopMatch | None:
        """What `feed` would return, leaving the matcher as it is."""
        states, position = list(self._states), self._position
        match = self.feed(text, min_end)
        self._states, self._position = states, position
        return match


def _advance(stop: str, failure: Sequence[int], state: int, char: str) -> int:
    """State (matched characters, below `len(stop)`) after `char`; `len(stop)` is a match."""
    while state and stop[state] != char:
        state = failure[state - 1]
    return state + 1 if stop[state] == char else state


def _failure_table(stop: str) -> list[int]:
    """[len(stop)]: for each prefix, the length of its longest proper border (Knuth, Morris, Pratt 1977)."""
    table = [0]
    for char in stop[1:]:
        table.append(_advance(stop, table, table[-1], char))
    return table
