"""Tools and reasoning: what parsers find is what the answer has, whatever the choice, streamed or whole."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from nanoengine.plugins.tool_parsers.hermes import Hermes
from nanoengine.plugins.tool_parsers.json_calls import JsonCalls
from nanoengine.server.config import ServerConfig
from nanoengine.server.parsing import Parsers, load_parsers
from nanoengine.setup.plugins.discover import discover
from nanoengine.text.sample_parser import REASONING_TAGS
from server.support import Server, choices, error_of, events, joined, make_tokenizer

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "time", "description": "now", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}
PARSERS = Parsers(tool=Hermes, fallback=JsonCalls)


def whole(response: Any) -> dict[str, Any]:
    """The only choice, with calls as (name, arguments)."""
    [choice] = response.json()["choices"]
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in choice["message"].get("tool_calls", ())
    ]
    return {"content": choice["message"]["content"] or "", "calls": calls, "reason": choice["finish_reason"]}


def streamed(response: Any) -> dict[str, Any]:
    """The same, of a stream."""
    chunks = events(response)
    calls: list[tuple[str, str]] = []
    for choice in choices(chunks):
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                assert call["type"] == "function"
                calls.append((call["function"]["name"], ""))
            name, arguments = calls[call["index"]]
            calls[call["index"]] = (name, arguments + call["function"].get("arguments", ""))
    return {
        "content": joined(chunks),
        "calls": [(name, json.loads(arguments)) for name, arguments in calls],
        "reason": choices(chunks)[-1]["finish_reason"],
    }


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("choice", [None, "auto", "required", NAMED, "none"])
@pytest.mark.parametrize("text", [CALL, f"Let me see. {CALL}", f"{CALL}\n{SECOND}", "No call."])
def test_a21_the_calls_and_the_reason_are_the_same_streamed_or_whole(text: str, choice: Any, chunk: int) -> None:
    server = Server(text, parsers=PARSERS, chunk=chunk)
    fields = {"tools": [WEATHER, TIME], "tool_choice": choice}
    found = whole(server.chat(**fields))
    assert streamed(server.chat(stream=True, **fields)) == found
    wanted = min(text.count("<tool_call>"), 1 if choice == NAMED else 2)  # a named function is called once
    calls = [("weather", {"city": "Zürich"}), ("time", {})][:wanted]
    if choice == "none":
        assert found == {"content": text, "calls": [], "reason": "stop"}
    else:
        content = {CALL: "", f"Let me see. {CALL}": "Let me see.", "No call.": "No call."}.get(text, "")
        assert found == {"content": content, "calls": calls, "reason": "tool_calls" if calls else "stop"}


@pytest.mark.parametrize(("choice", "count"), [(None, 1), (None, 2), ("required", 2), (NAMED, 1)])
@pytest.mark.parametrize("stream", [False, True])
def test_a21_a_call_that_is_cut_by_the_length_says_so(stream: bool, count: int, choice: Any) -> None:
    """The reason is the only place where a client can see it: a cut in the second call, too."""
    text = "\n".join([CALL] * count)
    server = Server(text, parsers=PARSERS)
    cut = len(server.ids(text)) - 20  # within the arguments of the last call
    response = server.chat(tools=[WEATHER, TIME], tool_choice=choice, max_tokens=cut, stream=stream)
    last = choices(events(response))[-1] if stream else response.json()["choices"][0]
    assert last["finish_reason"] == "length"
    if not stream:
        arguments = [call["function"]["arguments"] for call in last["message"]["tool_calls"]]
        assert len(arguments) == count
        with pytest.raises(json.JSONDecodeError):
            json.loads(arguments[-1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "reason"), [("Zür", "stop"), ("city", "stop"), ("</tool_call>", "tool_calls")])
def test_a21_a_call_that_is_cut_by_a_stop_string_is_no_call_to_make(stop: str, reason: str, stream: bool) -> None:
    """Streamed and whole, in OpenAI's words and in Anthropic's."""
    server = Server(CALL, parsers=PARSERS)
    response = server.chat(tools=[WEATHER], stop=[stop], stream=stream)
    last = choices(events(response))[-1] if stream else response.json()["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == (reason, stop)
    if not stream:
        tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}
        messages = [{"role": "user", "content": "x"}]
        body = {"messages": messages, "max_tokens": 100, "tools": [tool], "stop_sequences": [stop]}
        found = server.post("/v1/messages", body).json()
        assert found["stop_reason"] == ("tool_use" if reason == "tool_calls" else "stop_sequence")


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_tool_calls_false_ends_before_the_second_call(stream: bool) -> None:
    server = Server(f"{CALL}\n{SECOND}", parsers=PARSERS)
    response = server.chat(tools=[WEATHER, TIME], parallel_tool_calls=False, stream=stream)
    found = streamed(response) if stream else whole(response)
    assert found == {"content": "", "calls": [("weather", {"city": "Zürich"})], "reason": "tool_calls"}
    assert (server.last.request_id, 0) in server.engine.aborted


def test_the_template_gets_the_tools_except_with_none() -> None:
    server = Server("x", parsers=PARSERS)
    for choice in (None, "auto", "required", NAMED, "none"):
        server.chat(tools=[WEATHER, TIME], tool_choice=choice)
        prompt = server.tokenizer.decode([*server.last.prompt_token_ids])
        assert ('"weather"' in prompt and '"time"' in prompt) == (choice != "none")


@pytest.mark.parametrize(("choice", "names"), [("required", {"weather", "time"}), (NAMED, {"weather"})])
def test_a_call_that_must_come_is_demanded_by_a_grammar(choice: Any, names: set[str]) -> None:
    for parsers, call in ((PARSERS, CALL), (Parsers(fallback=JsonCalls), '[{"name": "weather", "arguments": {}}]')):
        server = Server(call, parsers=parsers)
        assert whole(server.chat(tools=[WEATHER, TIME], tool_choice=choice))["calls"][0][0] == "weather"
        text = server.last.params.structured_outputs.constraint().text
        assert {name for name in ("weather", "time") if f'"{name}' in text.replace("\\", "")} == names
    server.chat(tools=[WEATHER, TIME], tool_choice="none")
    assert "structured_outputs" not in server.last.params.processor_fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "tim"}}}, "'tim'"),
        ({"tool_choice": "required"}, "no"),
        ({"tools": [], "tool_choice": NAMED}, "none"),
        ({"tools": [WEATHER, WEATHER]}, "two functions"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"}, "must be called"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex and guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "give one"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        ({"structured_outputs": {}}, "exactly one"),
    ],
)
def test_choices_that_do_not_fit_are_refused(fields: dict[str, Any], words: str) -> None:
    server = Server(parsers=PARSERS)
    assert words in error_of(server.chat(**fields))["message"]
    assert server.engine.added == []


def test_without_a_parser_auto_is_refused() -> None:
    assert "server.tool_parser" in error_of(Server().chat(tools=[WEATHER]))["message"]


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json", '{"type": "object"}'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string"}}}},
         "json", '{"type": "string"}'),
        ({"structured_outputs": {"json": {"type": "string"}}}, "json", '{"type": "string"}'),
        ({"structured_outputs": {"json": '{"type": "string"}'}}, "json", '{"type": "string"}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]'),
        ({"structured_outputs": {"grammar": "start: \"a\""}}, "grammar", 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, "json", '{"type": "object"}'),
        ({"guided_json": {"type": "string"}}, "json", '{"type": "string"}'),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "choice", '["a"]'),
        ({"guided_grammar": "start: \"a\""}, "grammar", 'start: "a"'),
        ({"response_format": {"type": "structural_tag", "structures": [], "triggers": ["<a"]}}, "structural_tag", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["chat", "complete"])
def test_structured_outputs_in_every_form(path: str, fields: dict[str, Any], kind: str, text: str | None) -> None:
    server = Server()
    assert getattr(server, path)(**fields).status_code == 200
    constraint = server.last.params.structured_outputs.constraint()
    assert constraint.kind == kind
    if text is not None:
        assert constraint.text == text
    assert getattr(server, path)(response_format={"type": "text"}).status_code == 200
    assert "structured_outputs" not in server.last.params.processor_fields


THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_that_the_prompt_begins_comes_before_calls_and_constraints(stream: bool) -> None:
    parsers = Parsers(tool=Hermes, fallback=JsonCalls, tags=REASONING_TAGS["think"])
    tokenizer = make_tokenizer(template=THINKS)
    server = Server(f"Let me.</think>\n{CALL}", parsers=parsers, tokenizer=tokenizer)
    response = server.chat(tools=[WEATHER], stream=stream, tool_choice="required")
    assert (streamed if stream else whole)(response)["calls"] == [("weather", {"city": "Zürich"})]
    if stream:
        assert joined(events(response), key="reasoning") == "Let me."
    else:
        assert response.json()["choices"][0]["message"]["reasoning_content"] == "Let me."
    assert server.last.params.structured_outputs.reasoning == "</think>"
    server.chat(response_format={"type": "json_object"})
    assert server.last.params.structured_outputs.reasoning == "</think>"
    server.chat(response_format={"type": "json_object"}, add_generation_prompt=False)
    assert server.last.params.structured_outputs.reasoning is None


def test_special_tokens_that_only_a_parser_needs_are_not_in_the_answer() -> None:
    class Special(Hermes):
        special_tokens = ("<end>",)

    server = Server("a<end>b", parsers=Parsers(tool=Special))
    assert whole(server.chat(tools=[WEATHER]))["content"] == "ab"
    assert server.last.params.skip_special_tokens is False
    assert whole(server.chat(tools=[WEATHER], skip_special_tokens=False))["content"] == "a<end>b"
    assert whole(server.chat())["content"] == "ab"


@pytest.mark.parametrize(
    ("template", "tool", "tags"),
    [("{{ '<tool_call>' }}", "Hermes", None), ("no", None, None), ("<think></think>", None, "think")],
)
def test_parsers_are_chosen_by_the_template(template: str, tool: str | None, tags: str | None) -> None:
    found = load_parsers(discover(), ServerConfig(), make_tokenizer(template=template))
    assert (found.tool and found.tool.__name__, found.fallback) == (tool, JsonCalls)
    assert found.tags == (None if tags is None else REASONING_TAGS[tags])
    assert load_parsers(discover(), ServerConfig(tool_parser=None, reasoning_parser=None), None).tool is None


STRICT_IDS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% if c.id is not defined or c.id|length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "<{{ c.id }}>{% endfor %}{% if m.role == 'tool' %}<{{ m.tool_call_id }}>{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("call", ["call_0123456789abcdef01234567", "toolu_01", "short", "a b c d e", "abcdef123"])
def test_ids_of_calls_have_the_length_that_a_template_demands(call: str) -> None:
    server = Server("ok", tokenizer=make_tokenizer(template=STRICT_IDS), parsers=PARSERS)
    made = {"id": call, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [made, {**made, "id": "another"}]},
        {"role": "tool", "tool_call_id": call, "content": "done"},
    ]
    response = server.post("/v1/chat/completions", {"messages": messages})
    assert response.status_code == 200, response.text
    prompt = server.tokenizer.decode(list(server.last.prompt_token_ids), skip_special_tokens=False)
    [first, second, result] = re.findall("<([a-z0-9]{9})>", prompt)
    assert first == result != second
    assert first == call or call != "abcdef123"
