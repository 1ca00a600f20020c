"""The events of a sample as a row of items: pieces of reasoning, of content, and calls of tools."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from nanoengine.server.events import Content, Ended, Event, Reasoning, SampleUpdate, ToolCallArguments, ToolCallBegin

Kind = Literal["reasoning", "content", "call"]


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex[:24]}"


@dataclass(slots=True)
class Item:
    """One item. index: among the items. name: of a call's function. pieces: of its text, or of a call's arguments."""

    index: int
    kind: Kind
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    id: str = field(default_factory=lambda: new_id("item"))

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(slots=True)
class Items:
    """Those of one sample. Events of one kind that follow each other are one item.

    Attributes:
        found: in order; only the last one may still grow. ended: how the sample ended.
    """

    reasoning: bool = True  # whether reasoning is shown
    found: list[Item] = field(default_factory=list)
    ended: Ended | None = None

    def take(self, update: SampleUpdate) -> Iterable[tuple[Item, bool, str]]:
        """For each event: its item, whether it is new, and the next piece of it."""
        for event in update.events:
            if isinstance(event, Ended):
                self.ended = event
            elif self.reasoning or not isinstance(event, Reasoning):
                yield self._add(event)

    def _add(self, event: Event) -> tuple[Item, bool, str]:
        last = self.found[-1] if self.found else None
        if isinstance(event, ToolCallBegin):
            return self._new("call", event.name), True, ""
        kind: Kind = "content" if isinstance(event, Content) else "reasoning"
        if isinstance(event, ToolCallArguments):
            kind = "call"
        new = last is None or last.kind != kind
        item = self._new(kind) if last is None or new else last
        text = "" if isinstance(event, Ended) else event.text
        item.pieces.append(text)
        return item, new, text

    def _new(self, kind: Kind, name: str = "") -> Item:
        self.found.append(Item(len(self.found), kind, name))
        return self.found[-1]
