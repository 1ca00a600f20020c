"""Reasoning, tool calls and special tokens in the text of a sample, however it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from nanoengine.api import (
    ConfigError,
    Content,
    ParserEvent,
    PluginError,
    Reasoning,
    ToolCallArguments,
    ToolCallBegin,
    ToolParser,
    ToolParserSpec,
    hookimpl,
)
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.tool_parsers import choose_tool_parser
from nanoengine.text.sample_parser import REASONING_TAGS, ReasoningTags, SampleParser, reasoning_tags

from .support import PARSERS, events_of, joined

THINK = REASONING_TAGS["think"]
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
F = [ToolCallBegin(0, "f"), ToolCallArguments(0, "{}")]


def made(**options: Any) -> SampleParser:
    tools = PARSERS["hermes"]() if options.pop("tools", False) else None
    return SampleParser(tool_parser=tools, **options)


def parsed(text: str, **options: Any) -> list[ParserEvent]:
    """The events, which are the same however the text is cut."""
    whole = joined(events_of(made(**options), [text]))
    for pieces in [list(text), *([text[:at], text[at:]] for at in range(1, len(text)))]:
        assert joined(events_of(made(**options), pieces)) == whole, pieces
    return whole


@pytest.mark.parametrize(
    ("text", "options", "events"),
    [
        ("<think>a < b</think>\n\nso", {}, [Reasoning("a < b"), Content("\n\nso")]),
        ("\n <think>a", {}, [Reasoning("a")]),
        ("a</think>b", {"opened": True}, [Reasoning("a"), Content("b")]),
        ("</think>b</think>", {"opened": True}, [Content("b</think>")]),
        ("a</thin", {"opened": True}, [Reasoning("a</thin")]),
        ("b <think>a</think>", {}, [Content("b <think>a</think>")]),
        (" <thin", {}, [Content(" <thin")]),
        ("", {}, []),
        ("", {"opened": True}, []),
        ("<think>a</think>", {"tags": None}, [Content("<think>a</think>")]),
        (f"<think>{CALL}</think>{CALL}", {"tools": True}, [Reasoning(CALL), *F]),
        (f"{CALL}</think>b", {"tools": True, "opened": True}, [Reasoning(CALL), Content("b")]),
        (f"a{CALL}", {"tools": True}, [Content("a"), *F]),
        (f"a{CALL}\n{CALL} b", {"tools": True, "parallel": False}, [Content("a"), *F, Content("\n")]),
    ],
)
def test_reasoning_comes_before_calls(text: str, options: dict[str, Any], events: list[ParserEvent]) -> None:
    assert parsed(text, **{"tags": THINK, **options}) == events


def test_a_second_call_that_is_not_wanted_ends_the_sample() -> None:
    parser = made(tools=True, parallel=False)
    assert parser.feed(CALL) == F
    assert not parser.ended
    assert parser.feed(CALL) == []
    assert parser.ended
    assert parser.feed("more") == parser.finish() == []


def test_special_tokens_are_left_out() -> None:
    hidden = ("<tool_call>", "</tool_call>", "<|im_end|>", "<|x|>", "<think>")
    text = f"<|x|><think>a<|x|></think>b<|im_end|>{CALL}<|x|> <|<|x|> <tool_call>c</tool_call>"
    assert parsed(text, tags=THINK, tools=True, hidden=hidden) == [
        *(Reasoning("a"), Content("b"), *F, Content(" <| c")),
    ]
    assert parsed("a<|im_en", hidden=hidden) == [Content("a<|im_en")]
    assert parsed("a<tool_call>b", hidden=hidden) == [Content("ab")]


@pytest.mark.parametrize(
    ("prompt", "continued", "opened"),
    [
        ("...assistant\n<think>\n", False, True),
        ("...assistant\n<think>\n\n</think>\n\n", False, False),
        ("what is <think>?assistant\n", False, False),
        ("...assistant\n<think>\nI am", True, True),
        ("...assistant\n<think>\nI am</think> so", True, False),
    ],
)
def test_a_template_or_a_continued_message_has_opened_the_reasoning(prompt: str, continued: bool, opened: bool) -> None:
    assert THINK.opened(prompt, continued=continued) is opened


def test_reasoning_tags_are_chosen_by_name_or_by_the_template() -> None:
    assert reasoning_tags("auto", "{{ content.split('</think>') }}") == THINK
    assert reasoning_tags("auto", "{{ content }}") is None
    assert reasoning_tags(None, "<think>") is None
    assert reasoning_tags("mistral", "") == ReasoningTags("[THINK]", "[/THINK]")
    assert reasoning_tags("<a> </a>", "") == ReasoningTags("<a>", "</a>")
    with pytest.raises(ConfigError, match=r"reasoning_parser 'thnk': did you mean 'think'.*'<think> </think>'"):
        reasoning_tags("thnk", "")


# -- which tool parser ------------------------------------------------------------------------------------------------

TEMPLATES = {
    "hermes": '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=example>\n<parameter=p>\nv\n</parameter>\n</function>\n</tool_call>",
    "llama3": '<|start_header_id|>...Respond in the format {"name": function name, "parameters": dictionary ...}',
    "mistral": "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}",
    "mistral_list": "{{ '[TOOL_CALLS] [' }}",
    "pythonic": "[func_name1(params_name1=params_value1)]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_auto_takes_the_parser_of_the_template(name: str) -> None:
    assert choose_tool_parser(discover(), "auto", TEMPLATES[name]) is PARSERS[name]


OTHERS = (
    "{{ messages }}",
    "<tool_call>{name}<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>",
    "<|start_header_id|> <TOOLCALL>[{'name': n, \"parameters\": p}]</TOOLCALL>",
)


@pytest.mark.parametrize("template", OTHERS)
def test_auto_takes_no_parser_of_another_form(template: str) -> None:
    assert choose_tool_parser(discover(), "auto", template) is None


def test_a_template_of_llama_may_ask_for_pythons_notation() -> None:
    template = "<|start_header_id|> <|python_tag|> [func_name1(params_name1=params_value1)]"
    assert choose_tool_parser(discover(), "auto", template) is PARSERS["pythonic"]


def test_none_and_names() -> None:
    assert choose_tool_parser(discover(), None, TEMPLATES["hermes"]) is None
    assert choose_tool_parser(discover(), "json", TEMPLATES["hermes"]) is PARSERS["json"]
    with pytest.raises(PluginError, match="no tool parser 'herms' is installed; did you mean 'hermes'"):
        choose_tool_parser(discover(), "herms", "")


class Fails(ToolParser):
    def feed(self, text: str) -> list[ParserEvent]:
        raise KeyError(text)

    def finish(self) -> list[ParserEvent]:
        return [Content(1 // 0)]

    @classmethod
    def matches(cls, template: str) -> bool:
        return bool(template["x"])


class ThinksItself(ToolParser):
    reads_reasoning = True

    def feed(self, text: str) -> list[ParserEvent]:
        return [Reasoning(text)]

    def finish(self) -> list[ParserEvent]:
        return []


def holder(name: str, parser: type[ToolParser], **more: Any) -> Any:
    def register_tool_parsers() -> Sequence[ToolParserSpec]:
        return [ToolParserSpec(name=name, target=f"{__name__}:{parser.__name__}", api=1, **more)]

    return type(name, (), {"register_tool_parsers": staticmethod(hookimpl(register_tool_parsers))})


def test_a_parser_that_fails_is_named() -> None:
    parser = SampleParser(tool_parser=Fails())
    with pytest.raises(PluginError, match=r"Fails\.feed failed: KeyError: 'a'"):
        parser.feed("a")
    with pytest.raises(PluginError, match=r"Fails\.finish failed: ZeroDivisionError"):
        parser.finish()


def test_a_parser_that_fails_to_match_is_an_error_only_if_no_other_matches() -> None:
    registry = discover(extra=[("broken", holder("broken", Fails, preference=9))])
    assert choose_tool_parser(registry, "auto", TEMPLATES["hermes"]) is PARSERS["hermes"]
    with pytest.raises(PluginError, match=r"Fails\.matches failed"):
        choose_tool_parser(registry, "auto", "{{ messages }}")


def test_a_parser_may_read_the_reasoning_itself() -> None:
    parser = SampleParser(tags=THINK, tool_parser=ThinksItself())
    assert parser.feed("<think>a") == [Reasoning("<think>a")]
