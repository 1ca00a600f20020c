"""Which parsers read the output of a request, and what its tools demand of the output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanoengine.api.plugin_calls import name_of, plugin_call
from nanoengine.api.structured_outputs import StructuredOutputsParams
from nanoengine.api.tool_parsers import Tool, ToolParser
from nanoengine.server.config import ServerConfig
from nanoengine.server.errors import invalid
from nanoengine.setup.plugins.registry import Registry
from nanoengine.setup.plugins.tool_parsers import choose_tool_parser
from nanoengine.text import Tokenizer
from nanoengine.text.sample_parser import ReasoningTags, SampleParser, reasoning_tags

_FALLBACK = "json"  # the parser for calls that must come, where the model's own form is not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsers:
    """The parsers of one server.

    Attributes:
        tool: of the model's own form of calls; None: it is not known. fallback: for calls that must come, where the
            model's form is not known or cannot be demanded.
        tags: those of the reasoning; None: all text is content.
    """

    tool: type[ToolParser] | None = None
    fallback: type[ToolParser] | None = None
    tags: ReasoningTags | None = None


def load_parsers(registry: Registry, config: ServerConfig, tokenizer: Tokenizer | None) -> Parsers:
    """The parsers that the configuration names, or the model's chat template shows.

    Raises `PluginError` or `ConfigError` for a name that does not exist.
    """
    template = "" if tokenizer is None else tokenizer.template_text
    return Parsers(
        tool=choose_tool_parser(registry, config.tool_parser, template),
        fallback=choose_tool_parser(registry, _FALLBACK if _FALLBACK in registry.tool_parsers else None, template),
        tags=reasoning_tags(config.reasoning_parser, template),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsing:
    """How one request is parsed.

    Attributes:
        tool: makes the parser of its calls; None: they are not looked for. parallel: several calls may come.
        tags: of the reasoning. hidden: special tokens that the text has for the parsers, and an answer has not.
        constraint: what the output must match because of its tools; None: anything.
    """

    tool: Callable[[], ToolParser] | None = None
    parallel: bool = True
    tags: ReasoningTags | None = None
    hidden: Collection[str] = ()
    constraint: StructuredOutputsParams | None = None

    def opened(self, prompt: str, continued: bool) -> bool:
        """Whether the prompt has begun the reasoning, with which the output then goes on."""
        return self.tags is not None and self.tags.opened(prompt, continued=continued)

    def parser(self, opened: bool, show_special: bool) -> Callable[[], SampleParser] | None:
        """Makes the parser of a sample; None: all text is content."""
        if self.tool is None and self.tags is None:
            return None
        tool, hidden = self.tool, () if show_special else self.hidden
        return lambda: SampleParser(
            tags=self.tags,
            opened=opened,
            tool_parser=None if tool is None else tool(),
            parallel=self.parallel,
            hidden=hidden,
        )

    def behind_reasoning(self, constraint: StructuredOutputsParams, opened: bool) -> StructuredOutputsParams:
        """The constraint; it begins behind the reasoning if the prompt has begun that."""
        if self.tags is None or not opened or constraint.reasoning is not None:
            return constraint
        return replace(constraint, reasoning=self.tags.end)


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
        tools, choice, parallel = [tool for tool in tools if tool.name == named], "required", False
    if choice == "required" and not tools:
        raise invalid("tool_choice is 'required', and there are no tools: give some", "tool_choice")
    if not tools or choice == "none":
        return _parsing(parsers, tokenizer)
    if choice != "required":
        if parsers.tool is None:
            raise invalid(
                "tool_choice 'auto' needs to know how this model writes calls: start the server with "
                "server.tool_parser=NAME, or ask for tool_choice 'required' or a function",
                "tool_choice",
                "not_supported",
            )
        return _parsing(parsers, tokenizer, parsers.tool, tools, parallel)
    for parser in (parsers.tool, parsers.fallback):
        constraint = None if parser is None else _demanded(parser, tools, parallel)
        if constraint is not None:
            return replace(_parsing(parsers, tokenizer, parser, tools, parallel), constraint=constraint)
    raise invalid("this server has no tool parser that can demand a call", "tool_choice", "not_supported")


def _demanded(parser: type[ToolParser], tools: Sequence[Tool], parallel: bool) -> StructuredOutputsParams | None:
    with plugin_call(f"{name_of(parser)}.constraint failed", parser):
        found = parser.constraint(tools, required=True, parallel=parallel)
        return None if found is None else StructuredOutputsParams(**found)


def _made(parser: type[ToolParser], tools: Sequence[Tool]) -> ToolParser:
    with plugin_call(f"{name_of(parser)} failed", parser):
        return parser(tools)


def _parsing(
    parsers: Parsers,
    tokenizer: Tokenizer | None,
    tool: type[ToolParser] | None = None,
    tools: Sequence[Tool] = (),
    parallel: bool = True,
) -> Parsing:
    tags = parsers.tags
    wanted = [*(tool.special_tokens if tool else ()), *((tags.begin, tags.end) if tags else ())]
    special = tokenizer is not None and any(map(tokenizer.has_special, wanted))
    return Parsing(
        tool=None if tool is None else lambda: _made(tool, tools),
        parallel=parallel,
        tags=tags,
        hidden=tokenizer.special_texts if tokenizer is not None and special else (),
    )


def tools_of(definitions: Sequence[Mapping[str, Any]] | None) -> list[Tool]:
    """The functions of `tools`, in OpenAI's shape. Raises `ApiError` for two of one name."""
    tools, names = list[Tool](), set[str]()
    for index, each in enumerate(definitions or ()):
        function = each["function"]
        if function["name"] in names:
            raise invalid(f"tools[{index}]: there are two functions {function['name']!r}", f"tools[{index}]")
        names.add(function["name"])
        tools.append(Tool(name=function["name"], parameters=function.get("parameters") or {}))
    return tools
