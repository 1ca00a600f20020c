"""Parses texts in pieces, and joins events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from nanoengine.api import Content, ParserEvent, Reasoning, Tool, ToolCallArguments, ToolCallBegin, ToolParser
from nanoengine.plugins.tool_parsers import register_tool_parsers
from nanoengine.setup.plugins.targets import TargetLoader

PARSERS: dict[str, type[ToolParser]] = {spec.name: TargetLoader().load(spec.target) for spec in register_tool_parsers()}


class Parser(Protocol):
    def feed(self, text: str) -> list[ParserEvent]: ...
    def finish(self) -> list[ParserEvent]: ...


def events_of(parser: Parser, pieces: Iterable[str]) -> list[ParserEvent]:
    return [*(event for piece in pieces for event in parser.feed(piece)), *parser.finish()]


def joined(events: Sequence[ParserEvent]) -> list[ParserEvent]:
    """The events with neighbours of one kind as one event. None of them is empty."""
    found: list[ParserEvent] = []
    for event in events:
        assert isinstance(event, ToolCallBegin) or event.text, events
        last = found[-1] if found else None
        if isinstance(event, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments) and last.index == event.index:
            found[-1] = ToolCallArguments(last.index, last.text + event.text)
        else:
            found.append(event)
    return found


def parsed(parser: str, pieces: Iterable[str], tools: Sequence[Tool] = ()) -> list[ParserEvent]:
    return joined(events_of(PARSERS[parser](tools), pieces))


def calls_of(events: Sequence[ParserEvent]) -> list[tuple[str, str]]:
    """Names and arguments of the calls, whose numbers must be 0, 1, ... in this order."""
    names = [event.name for event in events if isinstance(event, ToolCallBegin)]
    assert [event.index for event in events if isinstance(event, ToolCallBegin)] == list(range(len(names)))
    arguments = [""] * len(names)
    for event in events:
        if isinstance(event, ToolCallArguments):
            arguments[event.index] += event.text
    return list(zip(names, arguments, strict=True))


def content_of(events: Sequence[ParserEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def values(calls: Sequence[tuple[str, str]], wanted: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The calls, with their arguments as values, except where text is wanted."""
    texts = [isinstance(arguments, str) for _, arguments in wanted] + [True] * len(calls)
    return [(name, a if text else json.loads(a)) for (name, a), text in zip(calls, texts, strict=False)]
