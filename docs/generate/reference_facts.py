"""What the reference needs of docstrings and of the built-in logits processors, besides `nanoengine.lab.facts`."""

from __future__ import annotations

import re

from nanoengine.lab.facts import Fact, facts
from nanoengine.params.sampling_fields import CoreFields
from nanoengine.plugins.samplers import register_samplers


def sampling_facts() -> list[tuple[str, list[Fact]]]:
    """(owner, fields): the engine's own, and those of each built-in logits processor."""
    own = [("", facts(CoreFields))]
    return own + [(spec.name, facts(spec.params)) for spec in register_samplers()]


def sections(doc: str) -> dict[str, str]:
    """The text of a docstring, as "", and its sections by name ("Args"), each entry one line."""
    found, current = {"": ""}, ""
    for line in doc.splitlines():
        if head := re.fullmatch(r"(Args|Attributes|Raises|Returns):", line):
            current = head[1]
            found[current] = ""
        elif current and line and not line.startswith(" "):
            current = ""
            found[""] += "\n" + line + "\n"
        elif current and line.startswith(" " * 8):
            found[current] += " " + line.strip()
        else:
            found[current] += "\n" + line.strip() if current else line + "\n"
    return {name: text.strip() for name, text in found.items()}
