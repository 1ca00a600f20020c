"""The conformance kit of tool parsers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoengine.api import (
    Content,
    ParserEvent,
    Reasoning,
    Tool,
    ToolCallArguments,
    ToolCallBegin,
    ToolParser,
)
from nanoengine.api.plugin_calls import name_of
from nanoengine.api.structured_outputs import StructuredOutputsParams
from nanoengine.setup.plugins.choose import check_class
from nanoengine.testing.conformance.failure import ConformanceError, during, require

_PLAIN = ("", " ", 'Hello.\n\nIt is 1 < 2, [a](b) and {x: "y"}; so say I.', "☃ 😀\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParserExample:
    """An output of a model, and what the parser must find in it.

    Attributes:
        text: the output.
        calls: name and arguments of each call: a value; or a text, where the arguments are cut off or malformed.
        content: all content, joined. reasoning: all reasoning, joined.
    """

    text: str
    calls: Sequence[tuple[str, Any]] = ()
    content: str = ""
    reasoning: str = ""


def check_tool_parser(
    parser: type[ToolParser], *examples: ParserExample, tools: Sequence[Tool] = (), templates: Sequence[str] = ()
) -> None:
    """Tests a tool parser: on the examples, on each split of an example in two, char by char, and on each beginning.

    Args:
        parser: the class.
        examples: at least one with a call and one with a malformed call.
        tools: those that the parser gets.
        templates: chat templates that it matches.

    Raises `ConformanceError` that says what was wrong.
    """
    check_class(parser, ToolParser, name_of(parser))
    require(any(each.calls for each in examples), "give at least one example with a call, or nothing is tested")
    require(any(not each.calls and each.text for each in examples), "give an example whose call is malformed")
    trial = _Trial(parser, tools)
    for example in (*examples, *(ParserExample(text=text, content=text) for text in _PLAIN)):
        with during(f"parsing {example.text!r}"):
            trial.finds(example)
            trial.is_the_same_however_cut(example.text)
            trial.keeps_what_is_cut_off(example.text)
    for template in templates:
        _check_matches(parser, template)
    if tools:
        _check_constraints(parser, tools)


def _check_matches(parser: type[ToolParser], template: str) -> None:
    with during("matches"):
        require(parser.matches(template) is True, f"matches({template!r:.80}) is not True")
        require(parser.matches("{{ messages }}") is False, "matches is not False for a template without calls")


def _check_constraints(parser: type[ToolParser], tools: Sequence[Tool]) -> None:
    for required in (True, False):
        for parallel in (True, False):
            with during(f"constraint(tools, required={required}, parallel={parallel})"):
                found = parser.constraint(tools, required=required, parallel=parallel)
                require(
                    found is None or isinstance(found, Mapping), f"it returned {found!r:.80}, not a mapping or None"
                )
                if found is not None:
                    StructuredOutputsParams(**found)  # raises for what structured_outputs would not take


class _Trial:
    def __init__(self, parser: type[ToolParser], tools: Sequence[Tool]) -> None:
        self._parser, self._tools = parser, tools

    def finds(self, example: ParserExample) -> None:
        events = self._parse([example.text])
        calls = calls_in(events)
        same = len(calls) == len(example.calls) and all(
            name == wanted and (arguments == value if isinstance(value, str) else _value(arguments) == value)
            for (name, arguments), (wanted, value) in zip(calls, example.calls, strict=True)
        )
        require(same, f"its calls are {calls}, not {list(example.calls)}")
        for kind, wanted in ((Content, example.content), (Reasoning, example.reasoning)):
            found = "".join(event.text for event in events if isinstance(event, kind))
            require(found == wanted, f"its {kind.__name__.lower()} is {found!r}, not {wanted!r}")

    def is_the_same_however_cut(self, text: str) -> None:
        whole = self._parse([text])
        for pieces in ([text[:at], text[at:]] for at in range(1, len(text))):
            found = self._parse(pieces)
            require(found == whole, f"cut into {pieces}, the events are {found}, not {whole}")
        found = self._parse(text)
        require(found == whole, f"character by character, the events are {found}, not {whole}")

    def keeps_what_is_cut_off(self, text: str) -> None:
        """An output that ends anywhere before a call is reported is content."""
        for end in range(len(text)):
            events = self._parse([text[:end]])
            if not any(isinstance(event, ToolCallBegin) for event in events) and not self._parser.reads_reasoning:
                found = "".join(event.text for event in events if isinstance(event, Content))
                require(found == text[:end], f"of the beginning {text[:end]!r}, the content is {found!r}")

    def _parse(self, pieces: Iterable[str]) -> list[ParserEvent]:
        """The events, in which neighbours of one kind are joined."""
        parser = self._parser(self._tools)
        found: list[ParserEvent] = []
        for piece in pieces:
            _join(found, parser.feed(piece), f"feed({piece!r})")
        _join(found, parser.finish(), "finish()")
        return found


def _join(found: list[ParserEvent], events: Any, call: str) -> None:
    require(isinstance(events, list), f"{call} returned {events!r:.80}, not a list")
    for event in events:
        require(isinstance(event, ParserEvent), f"{call} returned a list with {event!r:.80}, which is no event")
        begun = sum(isinstance(each, ToolCallBegin) for each in found)
        if isinstance(event, ToolCallBegin):
            require(event.index == begun, f"{call} began call {event.index}, expected {begun}")
            found.append(event)
            continue
        require(isinstance(event.text, str) and bool(event.text), f"{call} returned {event!r}: its text is empty")
        index = getattr(event, "index", begun - 1)
        require(index == begun - 1, f"{call} returned {event!r:.80} when call {begun - 1} was the last to begin")
        last = found[-1] if found else None
        if isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            found[-1] = ToolCallArguments(index, last.text + event.text)
        elif isinstance(event, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + event.text)
        else:
            found.append(event)


def calls_in(events: Sequence[ParserEvent]) -> list[tuple[str, str]]:
    """Name and arguments of each call."""
    names = [event.name for event in events if isinstance(event, ToolCallBegin)]
    arguments = [""] * len(names)
    for event in events:
        if isinstance(event, ToolCallArguments):
            arguments[event.index] += event.text
    return list(zip(names, arguments, strict=True))


def _value(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError as error:
        raise ConformanceError(f"the arguments {arguments!r} are no JSON: {error}") from error
