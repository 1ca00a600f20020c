"""What YAML may hold, checked on the parser's events, before anything is built of it.

A few lines can stand for more than memory holds (aliases of aliases), recurse without an end, or be a number whose
digits take minutes. Each is refused where it begins, in time that grows with the text only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from nanoengine.api.errors import ConfigError

LOADER: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_DEPTH = 64
"""Lists and mappings within each other, and parts of a dotted key."""
MAX_NODES = 20_000
"""Keys and values of one file."""
MAX_KEY = 200
"""Characters of a key."""

_MAX_ALIASED = 10_000  # values that aliases repeat
_MAX_NUMBER = 100  # characters of a number
_TEXT_OF_A_NODE = 100  # so many characters of a repeated text count as a value of their own
LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
"""YAML 1.1's."""
_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NUMBER = re.compile(r"[-+]?\.?\d[\da-fxobA-FXOB_:.+-]*")
_PLAIN_TAGS = {
    None,
    "!",
    *(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")),
}


@dataclass(slots=True)
class _Open:
    """A list or mapping that has begun. Of what is in it so far, aliases included: `weight`, and how deep it is."""

    mapping: bool
    anchor: str | None = None
    weight: int = 1
    height: int = 1
    at_key: bool = False


@dataclass
class _Check:
    """One walk over the events. `place` says where a line (from 0) is."""

    place: Callable[[int], str]
    open: list[_Open] = field(default_factory=list)
    known: dict[str, tuple[int, int]] = field(default_factory=dict)  # weight and height by anchor
    nodes: int = 0
    aliased: int = 0

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._begin(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = self.open.pop()
            self._child(ended.weight, ended.height, ended.anchor)

    def _refuse(self, event: yaml.Event, why: str) -> ConfigError:
        return ConfigError(f"{self.place(event.start_mark.line if event.start_mark else 0)}: {why}")

    def _node(self, event: Any) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self._refuse(event, f"more than {MAX_NODES:,} values; put prompts into a file of their own")
        if event.tag not in _PLAIN_TAGS:
            raise self._refuse(event, f"the tag {event.tag[:100]!r} is not supported: YAML holds plain values here")

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        self._node(event)
        if self._at_key():
            self._key(event)
        number = event.style in (None, "") or (event.tag or "").endswith((":int", ":float"))
        if number and len(event.value) > _MAX_NUMBER and _NUMBER.fullmatch(event.value):
            raise self._refuse(event, f"a number of {len(event.value)} characters; a text of digits goes in quotes")
        self._child(1 + len(event.value) // _TEXT_OF_A_NODE, 0, event.anchor)

    def _key(self, event: yaml.ScalarEvent) -> None:
        if len(event.value) > MAX_KEY:
            raise self._refuse(event, f"a key of {len(event.value)} characters, {event.value[:40]!r}…")

    def _alias(self, event: Any) -> None:
        if any(each.anchor == event.anchor for each in self.open):
            raise self._refuse(event, f"*{event.anchor} stands within &{event.anchor}: it would hold itself")
        if self._at_key():
            raise self._refuse(event, f"*{event.anchor} is no key; write the key itself")
        weight, height = self.known.get(event.anchor, (1, 0))
        self.aliased += weight
        if self.aliased > _MAX_ALIASED:
            raise self._refuse(event, f"aliases repeat more than {_MAX_ALIASED:,} values (up to *{event.anchor})")
        self._check_depth(event, len(self.open) + height)
        self._child(weight, height, None)

    def _begin(self, event: yaml.CollectionStartEvent) -> None:
        self._node(event)
        if self._at_key():
            raise self._refuse(event, "a list or mapping cannot be a key")
        mapping = isinstance(event, yaml.MappingStartEvent)
        self.open.append(_Open(mapping, event.anchor, at_key=mapping))
        self._check_depth(event, len(self.open))

    def _check_depth(self, event: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._refuse(event, f"lists and mappings within each other more than {MAX_DEPTH} deep")

    def _at_key(self) -> bool:
        return bool(self.open) and self.open[-1].at_key

    def _child(self, weight: int, height: int, anchor: str | None) -> None:
        """A whole value, or key, has been read."""
        if anchor is not None:
            self.known[anchor] = (weight, height)
        if self.open:
            self.open[-1].weight += weight
            self.open[-1].height = max(self.open[-1].height, height + 1)
            self.open[-1].at_key = self.open[-1].mapping and not self.open[-1].at_key


def check_yaml(text: str, place: Callable[[int], str]) -> None:
    """Raises `ConfigError` for what is out of bounds; what is no YAML, whatever PyYAML raises (`YAMLError`)."""
    if found := _NOT_YAML.search(text):
        code, line = ord(found[0]), len(LINE_BREAK.findall(text, 0, found.start()))
        half = "bytes that are not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half of a surrogate pair"
        kind = half if 0xD800 <= code <= 0xDFFF else "a NUL byte" if code == 0 else "a control character"
        raise ConfigError(f"{place(line)}: not YAML: it holds {kind} (U+{code:04X}); save it as UTF-8 text")
    check = _Check(place)
    events: Iterable[yaml.Event] = yaml.parse(text, Loader=LOADER)
    for event in events:
        check.take(event)
