"""The combinations of a sweep: `model=a,b engine.seed=1,2` are four. Lists with commas work as in Hydra.

A comma separates values, except in quotes, brackets, braces or parentheses, or after a backslash. `range(START, STOP,
STEP)`, without its stop as in Python and Hydra, and `choice(A, B)` are lists, too; Hydra's other functions
(`interval()`, `glob()`) are rejected by name when overrides are parsed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePath

from nanoengine.api.errors import ConfigError

_CLOSING = {"[": "]", "{": "}", "(": ")"}
_MOST = 10_000  # combinations
_CALL = re.compile(r"(?P<name>range|choice)\((?P<inside>.*)\)", re.DOTALL)
_LONGEST_NAME = 100  # most characters of a folder's name; file systems allow 255 bytes


@dataclass(frozen=True, slots=True)
class Combination:
    """A combination. `overrides`: for the composer, with one value each. `varied`: key -> value of those that vary."""

    overrides: tuple[str, ...]
    varied: Mapping[str, str]

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.varied.items())

    def folder(self, number: int) -> str:
        """The name of its folder: the number and the varied values, with characters that every file system allows."""
        parts = (f"{key}={_short(value)}" for key, value in self.varied.items())
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(parts))
        return f"{number}_{name}"[:_LONGEST_NAME].rstrip("_.,")


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """All combinations; the last override varies fastest. Raises `ConfigError` that names the override."""
    axes: list[tuple[str, list[str]]] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        values = _values(text, raw) if equals else []
        if len(values) < 2 and not _CALL.fullmatch(raw.strip()):
            axes.append(("", [text]))
            continue
        if key.startswith("~"):
            raise ConfigError(f"override {text!r}: a deletion cannot have several values")
        if key.lstrip("+") == "output":
            raise ConfigError(f"override {text!r}: a sweep gives each combination its own output")
        if "" in values:
            raise ConfigError(f"override {text!r}: a value of the sweep is empty; for an empty text write ''")
        if any(name == key for name, _ in axes):
            raise ConfigError(f"override {text!r}: {key} has several values twice; give one list")
        axes.append((key, values))
    if (count := math.prod(len(values) for _, values in axes)) > _MOST:
        raise ConfigError(f"the overrides make {count:,} combinations; a sweep has at most {_MOST:,}")
    return [_combination(axes, choice) for choice in itertools.product(*(values for _, values in axes))]


def _values(text: str, raw: str) -> list[str]:
    """The values of an override. Raises `ConfigError` that names it."""
    parts = split_values(raw)
    call = _CALL.fullmatch(parts[0]) if len(parts) == 1 else None
    if call is None and len(parts) == 1:
        return parts
    if call is None or call["name"] == "choice":
        inside = parts if call is None else split_values(call["inside"])
        return [value for part in inside for value in _values(text, part)]
    try:
        found = _range(*map(Decimal, split_values(call["inside"])))
    except (ArithmeticError, TypeError, ValueError) as error:
        form = "range(STOP), range(START, STOP) or range(START, STOP, STEP), in numbers"
        raise ConfigError(f"override {text!r}: write {form}; the step is not 0") from error
    if not 0 < len(found) <= _MOST:
        raise ConfigError(f"override {text!r}: a range of {len(found) or 'no'} values; it has 1 to {_MOST:,}")
    return found


def _range(first: Decimal, stop: Decimal | None = None, step: Decimal = Decimal(1)) -> list[str]:
    """The numbers from `first` (from 0, if it is the only one) up to `stop`, which is not one of them; exact."""
    start, stop = (Decimal(0), first) if stop is None else (first, stop)
    count = max(0, math.ceil((stop - start) / step))
    return [f"{start + n * step:f}" for n in range(min(count, _MOST + 1))]


def _combination(axes: Sequence[tuple[str, list[str]]], choice: Sequence[str]) -> Combination:
    pairs = [(key, value) for (key, _), value in zip(axes, choice, strict=True)]
    texts = tuple(f"{key}={value}" if key else value for key, value in pairs)
    return Combination(texts, {key.lstrip("+"): value for key, value in pairs if key})


def split_values(raw: str) -> list[str]:
    """The values of a list with commas, without spaces around them; one value if there is no list.

    If a bracket or quote is not closed, there is one value, and the composer reports the error.
    """
    values, start, open_brackets, quote, before = [], 0, [], "", ","
    skip = False
    for place, char in enumerate(raw):
        if skip:
            skip = False
        elif char == "\\" and quote != "'":
            skip = True
        elif quote and char == quote:
            skip = quote == "'" and raw[place + 1 : place + 2] == "'"  # two quotes mean one quote in the text
            quote = quote if skip else ""
        elif quote:
            pass
        elif char in "'\"" and before in ",[{(:":  # in other places it is an apostrophe
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
    """The value for names of folders: of a path, its last part."""
    plain = value.strip("'\"")
    return PurePath(plain).name or plain
