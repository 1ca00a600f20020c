"""What YAML may hold, checked on the parser's events, before anything is built of it.

With aliases a few lines can mean more than memory holds, and lists can be nested deeper than a parser's stack. Both are
refused at their line, in time that grows with the text only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import yaml

from nanoengine.api.errors import ConfigError, shown

LOADER: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_DEPTH = 64
"""Lists and mappings within each other, and parts of a dotted key."""
MAX_NODES = 20_000
"""Keys and values of one file."""
MAX_KEY = 200
"""Characters of a key."""
MAX_NUMBER = 100
"""Characters of a number."""
LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
"""YAML 1.1's."""
_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def check_yaml(text: str, place: Callable[[int], str]) -> None:
    """Refuses what is out of bounds, and what is not supported of YAML: anchors, aliases and tags.

    Raises `ConfigError` with the `place` of the line (0 is the first); for what is not YAML, PyYAML's `YAMLError`.
    """
    if found := _NOT_YAML.search(text):
        code, line = ord(found[0]), len(LINE_BREAK.findall(text, 0, found.start()))
        half = "bytes that are not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half of a surrogate pair"
        kind = half if 0xD800 <= code <= 0xDFFF else "a NUL byte" if code == 0 else "a control character"
        raise ConfigError(f"{place(line)}: not YAML: it holds {kind} (U+{code:04X}); save it as UTF-8 text")
    nodes = depth = 0
    events: Iterable[Any] = yaml.parse(text, Loader=LOADER)
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            depth += isinstance(event, yaml.CollectionStartEvent)
            if why := _refused(event, nodes, depth):
                raise ConfigError(f"{place(getattr(event.start_mark, 'line', 0))}: {why}")


def _refused(event: Any, nodes: int, depth: int) -> str:
    """Why this value, the `nodes`-th of the text and `depth` lists and mappings deep, may not be there; or ""."""
    if event.anchor is not None:
        return (
            f"anchors and aliases (&x, *x), here of {shown(event.anchor)}, are not supported: write the value again, "
            "or refer to its key by ${key}; a text that begins with & or * goes in quotes"
        )
    if event.tag is not None:
        return (
            f"the tag {shown(event.tag)} is not supported: write plain values; a text that begins with ! goes in quotes"
        )
    if nodes > MAX_NODES:
        return f"more than {MAX_NODES:,} values; put prompts into a file of their own"
    if depth > MAX_DEPTH:
        return f"lists and mappings within each other more than {MAX_DEPTH} deep"
    return ""
