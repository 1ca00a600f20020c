"""Which parsers read the output of a request, and what its tools demand of the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoengine.api.structured_outputs import StructuredOutputsParams
from nanoengine.api.tool_parsers import Tool, ToolParser
from nanoengine.server.errors import invalid
from nanoengine.server.events import OutputParser
from nanoengine.text import Tokenizer

ReasoningFactory = Callable[[OutputParser | None], OutputParser]
"""Makes what separates the reasoning of one sample; the rest goes to the given parser, or is content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsers:
    """The parsers of one server.

    Attributes:
        tool: of the model's own form of calls; None: it is not known. fallback: for calls that must come, where the
            model's form is not known or cannot be demanded.
        reasoning: None: all text is content.
        special: texts of special tokens that the reasoning parser looks for.
    """

    tool: type[ToolParser] | None = None
    fallback: type[ToolParser] | None = None
    reasoning: ReasoningFactory | None = None
    special: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsing:
    """How one request is parsed.

    Attributes:
        make: the parser of a sample; None: all text is content. constraint: what the output must match; None: anything.
        keep_special: special tokens must be in the text. one_call: a sample ends before its second call.
    """

    make: Callable[[], OutputParser] | None = None
    constraint: StructuredOutputsParams | None = None
    keep_special: bool = False
    one_call: bool = False


def parsing_of(
    parsers: Parsers,
    tokenizer: Tokenizer | None,
    tools: Sequence[Tool],
    choice: str | None,
    named: str | None = None,
    parallel: bool = True,
) -> Parsing:
    """How a request with these tools is parsed.

    Args:
        choice: "none", "auto", "required"; None: "auto" if there are tools. named: the function that must be called.

    Raises `ApiError` if the choice and the tools do not fit, or this server cannot do it.
    """
    if named is not None:
        if named not in [tool.name for tool in tools]:
            names = ", ".join(tool.name for tool in tools) or "(none)"
            raise invalid(f"tool_choice names the function {named!r}; tools has: {names}", "tool_choice")
        tools, choice = [tool for tool in tools if tool.name == named], "required"
    if choice == "required" and not tools:
        raise invalid("tool_choice is 'required', and there are no tools: give some", "tool_choice")
    if not tools or choice == "none":
        return _parsing(parsers, tokenizer, None)
    if choice != "required":
        if parsers.tool is None:
            raise invalid(
                "tool_choice 'auto' needs to know how this model writes calls: start the server with "
                "server.tool_parser=NAME, or ask for tool_choice 'required' or a function",
                "tool_choice",
                "not_supported",
            )
        return _parsing(parsers, tokenizer, _maker(parsers.tool, tools), parsers.tool.special_tokens, one=not parallel)
    for parser in (parsers.tool, parsers.fallback):
        demanded = None if parser is None else parser.constraint(tools, required=True, parallel=parallel)
        if parser is not None and demanded is not None:
            made = _maker(parser, tools)
            constraint = StructuredOutputsParams(**demanded)
            return _parsing(parsers, tokenizer, made, parser.special_tokens, constraint, one=not parallel)
    raise invalid("this server has no tool parser that can demand a call", "tool_choice", "not_supported")


def _maker(parser: type[ToolParser], tools: Sequence[Tool]) -> Callable[[], ToolParser]:
    return lambda: parser(tools)


def _parsing(
    parsers: Parsers,
    tokenizer: Tokenizer | None,
    tool: Callable[[], ToolParser] | None,
    special: Sequence[str] = (),
    constraint: StructuredOutputsParams | None = None,
    one: bool = False,
) -> Parsing:
    make: Callable[[], OutputParser] | None = tool
    reasoning = parsers.reasoning
    if reasoning is not None:
        special = (*special, *parsers.special)

        def both() -> OutputParser:
            return reasoning(None if tool is None else tool())

        make = both
    keep = tokenizer is not None and any(tokenizer.has_special(text) for text in special)
    return Parsing(make=make, constraint=constraint, keep_special=keep, one_call=one)


def tools_of(definitions: Sequence[Mapping[str, Any]] | None) -> list[Tool]:
    """The functions of `tools`, in OpenAI's shape. Raises `ApiError` for two of one name."""
    tools = list[Tool]()
    for index, each in enumerate(definitions or ()):
        function = each["function"]
        if any(tool.name == function["name"] for tool in tools):
            raise invalid(f"tools[{index}]: there are two functions {function['name']!r}", f"tools[{index}]")
        tools.append(Tool(name=function["name"], parameters=function.get("parameters") or {}))
    return tools
