"""Conversations: prompts are those of transformers' own rendering; tool calls; what cannot be right is refused."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from jinja2 import TemplateError
from text_zoo import byte_level, wrap
from transformers import PreTrainedTokenizerFast

from nanoengine.api.errors import RequestError
from nanoengine.text import TemplateProcesses, Tokenizer

HELLO = [{"role": "user", "content": "hello"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"where": "<up>", "n": 2}}}
CALLED = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "é ok"}]


def said(**more: Any) -> list[dict[str, Any]]:
    return [*HELLO, {"role": "assistant", "content": " yes ", **more}]


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    hf = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="</s>", bos_token="<s>", extra_special_tokens={"image_token": "<s>"}
    )
    made = Tokenizer(hf, processes=TemplateProcesses(seconds=30.0))
    yield made
    made.close()


CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOOLS = """{%- if tools is defined and tools %}
    {{- tools | tojson(indent=2) }}
{%- endif %}
{% for m in messages %}
  {% if loop.first %}{% continue %}{% endif %}
{% if m.tool_calls %}{% for c in m.tool_calls %}
{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }};{% endfor %}){% endfor %}
{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"""
ODDS = """{% set ns = namespace(self=1, n=0) %}{% set d = dict(a=1) %}{{ d }}{{ dict.fromkeys(['k'], 2) }}
{% for m in messages %}{% set ns.n = ns.n + loop.index %}{% if ns.n > 3 %}{% break %}{% endif %}{% endfor %}
{{ ns.n }}{{ ns.self }} {{ strftime_now('%Y') }} {{ messages | tojson(ensure_ascii=True, sort_keys=True) }}
{{ (extra or 0) | tojson(separators=(',', ':')) }}{{ image_token }}{{ unknown }}{{ documents }}{{ tools }}
{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(extra) }}{{ messages[::-1] | length }}{{ messages[-1].content.upper() }}"""
REASONING = "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }}/{{ m.content }};{% endfor %}"
NULLS = "{% for m in messages %}{{ m.name is defined }}{{ 'name' in m }}{{ m.content }}{% endfor %}"


def look(where: str) -> str:
    """Looks somewhere.

    Args:
        where: The place, in words.
    """
    return where


class Colour(enum.StrEnum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: Any


RICH = {
    "a": np.float32(0.5),
    "b": np.int64(3),
    "c": (1, 2),
    "d": Colour.RED,
    "e": Point(1, Point(2, True)),
    "f": {1: 2},
}


@pytest.mark.parametrize("template", [CHATML, TOOLS, ODDS, REASONING, NULLS])
@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (HELLO, {}),
        (said(), {"add_generation_prompt": True}),
        (CALLED, {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"é": "<"}}}]}),
        (HELLO, {"tools": [look]}),
        (said(reasoning="hm"), {"extra": RICH}),
        (said(thinking="hm", name=None), {"extra": [datetime(2020, 1, 1), object]}),
        (HELLO, {"documents": [{"title": "t", "text": "x"}], "bos_token": "other", "extra": None}),
        (said(), {"continue_final_message": True}),
        (said(reasoning_content="so "), {"continue_final_message": "reasoning_content"}),
        ([*HELLO, {"role": "assistant", "content": ""}], {"continue_final_message": True}),
    ],
)
def test_prompts_are_transformers(
    tokenizer: Tokenizer, template: str, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    given = {"add_generation_prompt": False, **options, "chat_template": template}
    try:
        expected = tokenizer._hf.apply_chat_template(messages, tokenize=False, **given)
    except (ValueError, TypeError, TemplateError):
        expected = "CONTINUE_FINAL_MESSAGE_TAG"
    if "CONTINUE_FINAL_MESSAGE_TAG" in expected:  # where a template shows the message twice, transformers leaves one in
        with pytest.raises(RequestError):
            tokenizer.render_chat(messages, **given)
    else:
        assert tokenizer.render_chat(messages, **given) == expected


def test_the_table_above_compares_prompts(tokenizer: Tokenizer) -> None:
    """Not refusals: each template makes a prompt of the first conversations."""
    for template in (CHATML, TOOLS, ODDS, REASONING, NULLS):
        assert isinstance(tokenizer.render_chat(HELLO, chat_template=template), str)


# -- tool calls -------------------------------------------------------------------------------------------------------

ARGUMENTS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in (c.function or c).arguments.items() %}"
)
ARGUMENTS += "{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"


def calling(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL, call], **more}]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"where": "<down>"}', "where=<down>;"),
        ({"where": "<down>"}, "where=<down>;"),
        (' {"a": {"b": [1, null, 1e3]}} ', "a={'b': [1, None, 1000.0]};"),
        ("", ""),
        (None, ""),
        ("{}", ""),
        ('{"big": 123456789012345678901234567890}', "big=123456789012345678901234567890;"),
    ],
)
def test_arguments_given_as_json_text_reach_the_template_as_an_object(
    tokenizer: Tokenizer, arguments: Any, shown: str
) -> None:
    messages = calling(arguments)
    before = json.dumps(messages)
    assert tokenizer.render_chat(messages, chat_template=ARGUMENTS) == f"where=<up>;n=2;{shown}"
    assert json.dumps(messages) == before, "the caller's messages are as they were"


def test_arguments_of_a_call_without_the_key_function(tokenizer: Tokenizer) -> None:
    flat = [*HELLO, {"role": "assistant", "tool_calls": [{"name": "look", "arguments": '{"a": 1}'}, {"name": "x"}]}]
    template = "{% for c in messages[1].tool_calls %}{{ c }}{% endfor %}"
    shown = "{'name': 'look', 'arguments': {'a': 1}}{'name': 'x'}"
    assert tokenizer.render_chat(flat, chat_template=template) == shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{where: 1}", "is not JSON"),
        ('{"a": 1', "is not JSON"),
        ('{"a": NaN}', "is not JSON .*NaN"),
        ('{"a": ' + "[" * 100_000, "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ("[1]", "must be an object or its JSON text, not list"),
        ('"text"', "must be an object or its JSON text, not str"),
        (7, "must be an object or its JSON text, not int"),
    ],
)
def test_malformed_arguments_name_the_message(tokenizer: Tokenizer, arguments: Any, words: str) -> None:
    where = r"messages\[1\]\['tool_calls'\]\[1\]\['function'\]\['arguments'\] "
    with pytest.raises(RequestError, match=where + words) as caught:
        tokenizer.render_chat(calling(arguments), chat_template=ARGUMENTS)
    assert caught.value.code == "invalid_prompt"


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ("look", r"\['tool_calls'\] must be a list"),
        (["look"], r"\['tool_calls'\]\[0\] must be a dict"),
        ([{"function": "look"}], r"\['tool_calls'\]\[0\]\['function'\] must be a dict"),
        ([], "needs 'content'"),
    ],
)
def test_malformed_tool_calls_name_the_message(tokenizer: Tokenizer, calls: Any, words: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": calls}]
    with pytest.raises(RequestError, match=r"messages\[1\]" + (words if words[0] == "\\" else f" {words}")):
        tokenizer.render_chat(messages, chat_template=ARGUMENTS)


@pytest.mark.parametrize(
    "test",
    [
        "m.content is not defined",  # as transformers says it
        "m.content is defined and m.content is none",  # DeepSeek's
        "m.content == ''",  # vLLM's
        "not m.content",
    ],
)
def test_tool_calls_without_content_are_in_the_prompt_however_a_template_asks(tokenizer: Tokenizer, test: str) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% elif " + test + " %}"
    template += "{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    for null in ({"content": None}, {}):
        messages = [*HELLO, {"role": "assistant", "tool_calls": [CALL], **null}]
        assert tokenizer.render_chat(messages, chat_template=template) == "hellolook"
    chat = [*HELLO, {"role": "assistant", "content": "I look", "tool_calls": [CALL]}]
    assert tokenizer.render_chat(chat, chat_template=template) == "helloI look"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": "look"}, "tools must be a list"),
        ({"tools": ["look"]}, r"tools\[0\] must be a JSON schema or a function, not str"),
        ({"tools": [lambda: 1]}, r"tools\[0\]: cannot make a JSON schema"),
        ({"documents": ["text"]}, "documents must be a list of dicts"),
        ({"chat_template": 3}, "chat_template must be a template"),
        ({"messages": []}, r"\['messages'\] cannot be set"),
        ({"continue_final_message": "nothing"}, r"messages\[0\] has no 'nothing'"),
        ({"sanitize_control_tokens": 1}, "not a bool"),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused(tokenizer: Tokenizer, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tokenizer.chat(HELLO, **{"chat_template": CHATML, **options})


def test_messages_that_hold_themselves_or_cannot_be_read_are_refused(tokenizer: Tokenizer) -> None:
    circle: dict[str, Any] = {"role": "user", "content": "x"}
    circle["self"] = circle

    class Broken:
        def model_dump(self) -> Any:
            raise SystemExit("no")

    for message, words in ((circle, "nested too deeply"), ({**HELLO[0], "x": Broken()}, "SystemExit: no")):
        with pytest.raises(RequestError, match=rf"messages\[1\].*{words}"):
            tokenizer.render_chat([*HELLO, message], chat_template=CHATML)


def test_a_template_of_the_model_s_that_is_no_text_is_refused() -> None:
    broken = wrap(byte_level())
    broken._hf.chat_template = {"default": 3}
    with pytest.raises(RequestError, match="must be text, not int"):
        broken.render_chat(HELLO)
    broken._hf.chat_template = {"one": "a", "other": "b"}
    with pytest.raises(RequestError, match=r"one.*other"):
        broken.render_chat(HELLO)
    assert broken.render_chat(HELLO, chat_template="one") == "a"
