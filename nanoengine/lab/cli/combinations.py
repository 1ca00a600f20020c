"""The combinations of a sweep: `model=a,b engine.seed=1,2` are four. Hydra's grammar for comma lists.

A comma separates values unless it stands in quotes, brackets, braces or parentheses, or behind a backslash. Hydra's
functions (`choice()`, `range()`, `interval()`, `glob()`) are refused where the overrides are parsed, by name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from nanoengine.api.errors import ConfigError

_CLOSING = {"[": "]", "{": "}", "(": ")"}
_LONGEST_NAME = 100  # characters of a folder's name; file systems take 255 bytes


@dataclass(frozen=True, slots=True)
class Combination:
    """`overrides`: for the composer, one value each. `varied`: those of them that differ, key -> value as typed."""

    overrides: tuple[str, ...]
    varied: Mapping[str, str]

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.varied.items())

    def folder(self, number: int) -> str:
        """Name of its folder: number, then what varies, made safe for file systems."""
        parts = (f"{key}={_short(value)}" for key, value in self.varied.items())
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(parts))
        return f"{number}_{name}"[:_LONGEST_NAME].rstrip("_.,")


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """Every combination, the last override varying fastest. Raises `ConfigError` naming the override."""
    axes: list[tuple[str, list[str]]] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        values = split_values(raw) if equals else []
        if len(values) < 2:
            axes.append(("", [text]))
            continue
        if key.startswith("~"):
            raise ConfigError(f"override {text!r}: a deletion cannot be swept over; give one value, or none")
        if key.lstrip("+") == "output":
            raise ConfigError(f"override {text!r}: a sweep gives each combination its own output")
        if "" in values:
            raise ConfigError(f"override {text!r}: a value of the sweep is empty; for an empty text write ''")
        if any(name == key for name, _ in axes):
            raise ConfigError(f"override {text!r}: {key} is swept over twice")
        axes.append((key, values))
    return [_combination(axes, choice) for choice in itertools.product(*(values for _, values in axes))]


def _combination(axes: Sequence[tuple[str, list[str]]], choice: Sequence[str]) -> Combination:
    pairs = [(key, value) for (key, _), value in zip(axes, choice, strict=True)]
    texts = tuple(f"{key}={value}" if key else value for key, value in pairs)
    return Combination(texts, {key.lstrip("+"): value for key, value in pairs if key})


def split_values(raw: str) -> list[str]:
    """The values of a comma list, blanks around them removed; one where there is no list.

    Brackets or quotes that do not close make one value: the composer says what is wrong with it.
    """
    values, start, open_brackets, quote, before = [], 0, [], "", ","
    skip = False
    for place, char in enumerate(raw):
        if skip:
            skip = False
        elif char == "\\" and quote != "'":
            skip = True
        elif quote and char == quote:
            skip = quote == "'" and raw[place + 1 : place + 2] == "'"  # two of them are one within the text
            quote = quote if skip else ""
        elif quote:
            pass
        elif char in "'\"" and before in ",[{(:":  # elsewhere it is an apostrophe
            quote = char
        elif char in _CLOSING:
            open_brackets.append(_CLOSING[char])
        elif open_brackets and char == open_brackets[-1]:
            open_brackets.pop()
        elif char == "," and not open_brackets:
            values.append(raw[start:place].strip())
            start = place + 1
        if not char.isspace():
            before = char
    return [raw.strip()] if quote or open_brackets else [*values, raw[start:].strip()]


def _short(value: str) -> str:
    """Of a path, what it ends with."""
    plain = value.strip("'\"")
    return PurePath(plain).name or plain
