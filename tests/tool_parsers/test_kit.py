"""The conformance kit of tool parsers: the built-in ones pass, each mistake is caught, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from nanoengine.api import Content, ParserEvent, Tool, ToolCallArguments, ToolCallBegin, ToolParser
from nanoengine.plugins.tool_parsers.hermes import Hermes
from nanoengine.testing.conformance import ConformanceError, ParserExample, check_tool_parser

from .goldens import GOLDENS, TOOLS
from .support import PARSERS

SOME = {
    *(
        "one",
        "text",
        "text only",
        "no closing tag",
        "malformed",
        "several",
        "cut",
        "bare",
        "object",
        "text first",
        "new",
    ),
    *("tag", "code"),
}
CALL = ParserExample(
    text='a <tool_call>{"name": "f", "arguments": {"x": [1]}}</tool_call> b',
    calls=[("f", {"x": [1]})],
    content="a  b",
)
MALFORMED = ParserExample(text="<tool_call>{]</tool_call>", content="<tool_call>{]</tool_call>")


@pytest.mark.parametrize("name", sorted(set(PARSERS) - {"mistral_list"}))
def test_the_built_in_parsers_conform(name: str) -> None:
    examples = [
        ParserExample(text=golden.text, calls=golden.calls, content=golden.content)
        for key, golden in GOLDENS.items()
        if golden.parser == name and key.split(": ")[1] in SOME
    ]
    check_tool_parser(PARSERS[name], *examples, tools=TOOLS)


def test_templates_are_tried() -> None:
    check_tool_parser(Hermes, CALL, MALFORMED, templates=["<tool_call>"])
    with pytest.raises(ConformanceError, match=r"matches\('{{ x }}'\) is not True"):
        check_tool_parser(Hermes, CALL, MALFORMED, templates=["{{ x }}"])


class LosesSpace(Hermes):
    def feed(self, text: str) -> list[ParserEvent]:
        return super().feed(text.lstrip())


class DropsTheRest(Hermes):
    def finish(self) -> list[ParserEvent]:
        return []


class EmptyPieces(Hermes):
    def feed(self, text: str) -> list[ParserEvent]:
        return [*super().feed(text), Content("")]


class CountsFromOne(Hermes):
    def feed(self, text: str) -> list[ParserEvent]:
        return [ToolCallBegin(e.index + 1, e.name) if isinstance(e, ToolCallBegin) else e for e in super().feed(text)]


class ReturnsNone(Hermes):
    def feed(self, text: str) -> list[ParserEvent]:
        super().feed(text)
        return None  # type: ignore[return-value]


class ReturnsTuples(Hermes):
    def feed(self, text: str) -> list[ParserEvent]:
        return [(event,) for event in super().feed(text)]  # type: ignore[misc]


class Raises(Hermes):
    def feed(self, text: str) -> list[ParserEvent]:
        return super().feed(text[:-1] + {}[text[-1]]) if text.endswith("]") else super().feed(text)


class Cuts(Hermes):
    def feed(self, text: str) -> list[ParserEvent]:
        return [
            ToolCallArguments(e.index, e.text.removesuffix("}")) if isinstance(e, ToolCallArguments) else e
            for e in super().feed(text)
            if getattr(e, "text", "") != "}"
        ]


class WrongConstraint(Hermes):
    @classmethod
    def constraint(cls, tools: Sequence[Tool], *, required: bool, parallel: bool) -> Mapping[str, Any] | None:
        return {"schema": {}}


@pytest.mark.parametrize(
    ("parser", "message"),
    [
        (LosesSpace, r"cut into \['.*"),
        (DropsTheRest, r"of the beginning 'a <', the content is 'a '"),
        (EmptyPieces, r"its text is empty"),
        (CountsFromOne, r"began call 1, expected 0"),
        (ReturnsNone, r"feed\('.*'\) returned None, not a list"),
        (ReturnsTuples, r"which is no event"),
        (Raises, r"raised KeyError"),
        (Cuts, r"are no JSON"),
        (WrongConstraint, r"constraint\(tools, required=True, parallel=True\) raised TypeError.*schema"),
    ],
)
def test_each_mistake_is_named(parser: type[ToolParser], message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        check_tool_parser(parser, CALL, MALFORMED, tools=TOOLS)


def test_examples_that_test_nothing_are_refused() -> None:
    with pytest.raises(ConformanceError, match="give at least one example with a call"):
        check_tool_parser(Hermes, MALFORMED)
    with pytest.raises(ConformanceError, match="give an example whose call is malformed"):
        check_tool_parser(Hermes, CALL)
    with pytest.raises(ConformanceError, match=r"its calls are \[\('f', '{\"x\": \[1\]}'\)\], not \[\]"):
        check_tool_parser(Hermes, CALL, ParserExample(text=CALL.text, content="a  b"))
