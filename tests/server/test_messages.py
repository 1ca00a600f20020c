"""/v1/messages: Anthropic's shapes, streamed and whole; what is not supported is refused by name."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import httpx
import pytest

from nanoengine.api.errors import RequestError
from nanoengine.plugins.tool_parsers.hermes import Hermes
from nanoengine.plugins.tool_parsers.json_calls import JsonCalls
from nanoengine.server.auth import Keys
from nanoengine.server.items import Item
from nanoengine.server.parsing import Parsers
from nanoengine.server.render_messages import arguments_of
from nanoengine.text.sample_parser import REASONING_TAGS
from server.support import Server, make_tokenizer
from server.test_tools import CALL, SECOND

PARSERS = Parsers(tool=Hermes, fallback=JsonCalls, tags=REASONING_TAGS["think"])
TOOLS: list[dict[str, Any]] = [
    {"name": "weather", "description": "d", "input_schema": {"type": "object"}},
    {"name": "time", "input_schema": {}},
]
HARD: dict[str, Any] = {"a": ['"}\\ \n', {"b": None}], "☃": 1.5}
HARD_CALL = f'<tool_call>{{"name": "weather", "arguments": {json.dumps(HARD)}}}</tool_call>'


def ask(server: Server, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    return server.post(path, {"max_tokens": 400, "messages": [{"role": "user", "content": "hi"}], **fields})


def said(server: Server, **fields: Any) -> dict[str, Any]:
    """The message, whole, which a stream must give as well."""
    response = ask(server, **fields)
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()
    streamed = assembled(ask(server, stream=True, **fields))
    assert without_ids(streamed) == without_ids(whole)
    return whole


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    blocks = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    return {**message, "id": "", "content": blocks}


def assembled(response: httpx.Response) -> dict[str, Any]:
    """The message that a client makes of the events, whose order is checked."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    parts = [part.split("\n") for part in response.text.split("\n\n") if part and not part.startswith(":")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [name for name, _ in parts] == [f"event: {event['type']}" for event in events]
    first, *between, delta, last = events
    assert (first["type"], delta["type"], last["type"]) == ("message_start", "message_delta", "message_stop")
    message: dict[str, Any] = first["message"]
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
    opened: int | None = None
    inputs: dict[int, str] = {}
    for event in between:
        if event["type"] == "content_block_start":
            assert (opened, event["index"]) == (None, len(message["content"]))
            opened = event["index"]
            message["content"].append(event["content_block"])
            continue
        assert event["index"] == opened
        if event["type"] == "content_block_stop":
            opened = None
            continue
        kind, block = event["delta"]["type"], message["content"][-1]
        if kind == "input_json_delta":
            assert block["type"] == "tool_use"
            inputs[event["index"]] = inputs.get(event["index"], "") + event["delta"]["partial_json"]
        else:
            key = kind.removesuffix("_delta")
            assert block["type"] == key
            block[key] += event["delta"][key]
    assert opened is None
    for index, text in inputs.items():
        assert message["content"][index]["input"] == {}
        try:
            message["content"][index]["input"] = json.loads(text)
        except ValueError:
            assert delta["delta"]["stop_reason"] == "max_tokens"
            message["content"][index]["input"] = {"cut": text}
    return {**message, **delta["delta"], "usage": delta["usage"]}


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_a22_the_parts_of_an_input_are_json_equal_to_the_whole_one(chunk: int) -> None:
    server = Server(f"<think>hm</think>\n\nI look.{HARD_CALL}\n{SECOND}", parsers=PARSERS, chunk=chunk)
    message = said(server, tools=TOOLS)
    assert [{**block, "id": ""} for block in message["content"]] == [
        {"type": "thinking", "thinking": "hm", "signature": "", "id": ""},
        {"type": "text", "text": "\n\nI look.", "id": ""},
        {"type": "tool_use", "name": "weather", "input": HARD, "id": ""},
        {"type": "tool_use", "name": "time", "input": {}, "id": ""},
    ]
    assert [block["id"][:6] for block in message["content"][2:]] == ["toolu_", "toolu_"]
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "fake")


def test_usage_counts_cached_tokens_apart() -> None:
    server = Server("Hello", cached=3)
    usage = said(server)["usage"]
    prompt = len(server.last.prompt_token_ids)
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (prompt - 3, 3)
    assert (usage["output_tokens"], usage["cache_creation_input_tokens"]) == (6, 0)


@pytest.mark.parametrize(
    ("text", "fields", "stop"),
    [
        ("Hello", {}, ("end_turn", None)),
        ("Hello", {"max_tokens": 3}, ("max_tokens", None)),
        ("Hello", {"stop_sequences": ["x", "lo"]}, ("stop_sequence", "lo")),
        (CALL, {"tools": TOOLS}, ("tool_use", None)),
        (CALL, {"tools": TOOLS, "tool_choice": {"type": "none"}}, ("end_turn", None)),
    ],
)
def test_why_it_stopped(text: str, fields: dict[str, Any], stop: tuple[str, str | None]) -> None:
    message = said(Server(text, parsers=PARSERS), **fields)
    assert (message["stop_reason"], message["stop_sequence"]) == stop
    shown = {"max_tokens": "Hel", "stop_sequence": "Hel"}.get(stop[0], text)
    assert stop[0] == "tool_use" or message["content"] == [{"type": "text", "text": shown}]


def test_a_context_that_is_full_and_an_answer_that_is_given_up_have_reasons_of_their_own() -> None:
    full = said(Server("Hello", finish_reason="length"), max_tokens=50)
    assert full["stop_reason"] == "model_context_window_exceeded"
    assert said(Server("Hello", finish_reason="abort"))["stop_reason"] == "pause_turn"


def test_an_answer_without_text_has_no_content() -> None:
    assert said(Server(""))["content"] == []


def test_a_call_that_is_cut_off_has_what_came_of_it() -> None:
    server = Server(HARD_CALL, parsers=PARSERS)
    whole = ask(server, tools=TOOLS, max_tokens=45).json()
    assert whole["stop_reason"] == "max_tokens"
    [begun] = whole["content"][0]["input"]["a"]
    assert HARD["a"][0].startswith(begun)
    assert assembled(ask(server, tools=TOOLS, max_tokens=45, stream=True))["content"][0]["input"].keys() == {"cut"}


def test_each_beginning_of_arguments_is_an_object() -> None:
    text = json.dumps({**HARD, "half": "\ud83d x", "pair": "😀", "deep": [[[{}]]], "n": [-1.5e3, 10]})
    for end in range(len(text) + 1):
        value = arguments_of(Item(0, "call", "f", [text[:end]]))
        assert isinstance(value, dict), text[:end]
        json.dumps(value, ensure_ascii=False).encode()
    assert value["half"] == "\N{REPLACEMENT CHARACTER} x"
    assert value["pair"] == "😀"


@pytest.mark.parametrize(
    ("choice", "required", "parallel"),
    [
        ({"type": "auto"}, False, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, False),
        ({"type": "any"}, True, True),
        ({"type": "tool", "name": "weather"}, True, False),
    ],
)
def test_tool_choice(choice: dict[str, Any], required: bool, parallel: bool) -> None:
    server = Server(CALL + SECOND, parsers=PARSERS)
    message = said(server, tools=TOOLS, tool_choice=choice)
    assert len(message["content"]) == (2 if parallel else 1)
    assert hasattr(server.last.params, "structured_outputs") == required


@pytest.mark.parametrize("edits", [None, [], [{"type": "clear_thinking_20251015", "keep": "all"}]])
def test_what_claude_code_sends_by_itself_is_accepted_where_it_changes_nothing(edits: Any) -> None:
    mark = {"type": "ephemeral", "ttl": "1h", "scope": "global"}
    system = [{"type": "text", "text": "Be brief", "cache_control": mark}]
    fields = {"system": system, "container": None, "context_management": {"edits": edits} if edits != [] else None}
    said(Server(), **fields)


CONVERSATION = [
    {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "so", "signature": "s"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}},
            {"type": "tool_use", "id": "t2", "name": "time", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "noon"}]},
            {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True},
            {"type": "text", "text": "And?"},
        ],
    },
]
SEEN = (
    "{% for m in messages %}<{{ m.role }}{{ ' ' ~ m.name if m.name }}>{{ m.reasoning_content }}|"
    "{{ m.content if m.content is string else m.content[0].text }}|"
    "{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}{{ enable_thinking }} {{ reasoning_effort }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def prompt_of(server: Server) -> str:
    return server.tokenizer.decode(list(server.last.prompt_token_ids), skip_special_tokens=False)


def test_a_conversation_with_results_of_tools_reaches_the_template() -> None:
    server = Server("ok", tokenizer=make_tokenizer(template=SEEN))
    system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]
    said(server, messages=CONVERSATION, system=system, thinking={"type": "enabled", "budget_tokens": 1024},
         output_config={"effort": "max"})  # fmt: skip
    lines = prompt_of(server).split("\n")
    assert lines[:2] == ["<system>|Be", "brief|"]
    assert lines[2] == "<user>|Weather?|"
    assert lines[3].startswith("<assistant>so|I look.|[{")
    calls = json.loads(lines[3].split("|")[2])
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("t1", {"city": "Paris"}), ("t2", {})]
    assert lines[4:7] == ["<tool time>|noon|", "<tool weather>|Error: no|", "<user>|And?|"]
    assert lines[7] == "True xhigh<assistant>"


def test_a_last_message_of_the_assistant_is_continued() -> None:
    server = Server(
        " fine", tokenizer=make_tokenizer(template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    )
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "I am"}]
    assert said(server, messages=messages)["content"] == [{"type": "text", "text": " fine"}]
    assert prompt_of(server) == "<user>How?<assistant>I am"


def test_thinking_that_is_disabled_is_not_shown() -> None:
    server = Server("<think>a</think>b", parsers=PARSERS)
    assert [block["type"] for block in said(server)["content"]] == ["thinking", "text"]
    assert [block["type"] for block in said(server, thinking={"type": "disabled"})["content"]] == ["text"]


def test_an_answer_may_have_to_match_a_schema() -> None:
    server = Server("{}")
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    for fields in ({"output_format": schema}, {"output_config": {"format": schema}}):
        said(server, **fields)
        assert '"type": "object"' in str(server.last.params) or "'type': 'object'" in str(server.last.params)


def test_tokens_are_counted_as_the_prompt_of_a_message_has_them() -> None:
    server = Server("ok", parsers=PARSERS)
    fields = {"system": "Be brief", "tools": TOOLS, "messages": CONVERSATION}
    said(server, **fields)
    counted = server.post("/v1/messages/count_tokens", fields)
    assert counted.json() == {"input_tokens": len(server.last.prompt_token_ids)}
    assert server.post("/v1/messages/count_tokens", {**fields, "stream": True}).status_code == 400


def error_of(response: httpx.Response, status: int, kind: str) -> str:
    assert response.status_code == status, response.text[:500]
    found = response.json()
    assert found == {"type": "error", "error": {"type": kind, "message": found["error"]["message"]}}
    return str(found["error"]["message"])


BLOCKS = {
    "image": ({"type": "image", "source": {"type": "url", "url": "http://x"}}, "nothing is fetched"),
    "document": ({"type": "document", "source": {}}, "nothing is fetched"),
    "redacted": ({"type": "redacted_thinking", "data": "x"}, "redacted_thinking"),
    "result": ({"type": "tool_result", "tool_use_id": "t9"}, "no earlier message has a tool_use with the id 't9'"),
    "key": ({"type": "text", "text": "a", "txt": 1}, r"unknown field 'messages[0].content[0].txt'"),
    "text": ({"type": "text"}, "messages[0].content[0] needs 'text': a string"),
    "none": ("text", "messages[0].content[0] must be an object with 'type'"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_are_not_supported_are_refused_by_name(name: str) -> None:
    block, words = BLOCKS[name]
    message = error_of(ask(Server(), messages=[{"role": "user", "content": [block]}]), 400, "invalid_request_error")
    assert words in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role must be"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content must be text or a list"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "unknown field 'messages[0].name'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "weather, time"),
        ({"mcp_servers": []}, "nothing is fetched"),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "1"}]}}, "edits[0].keep"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "edits[0].type"),
        ({"stop": ["x"]}, "its name is stop_sequences"),
        ({"thinking": {"type": "enabled", "budget": 3}}, "thinking.budget"),
    ],
)
def test_fields_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    assert words in error_of(ask(Server(parsers=PARSERS), **fields), 400, "invalid_request_error")


def test_a_body_that_is_nested_too_deeply_is_refused() -> None:
    def schema(depth: int) -> str:
        return '{"items":' * depth + "{}" + "}" * depth

    def ask_with(depth: int) -> httpx.Response:
        tools = f'[{{"name": "f", "input_schema": {schema(depth)}}}]'
        body = f'{{"max_tokens": 5, "messages": [{{"role": "user", "content": "x"}}], "tools": {tools}}}'
        return Server(parsers=PARSERS).request("POST", "/v1/messages", content=body.encode())

    assert ask_with(100).status_code == 200
    for depth in (130, 400, 100_000):
        assert ("nested" if depth < 400 else "") in error_of(ask_with(depth), 400, "invalid_request_error")


def test_errors_have_anthropics_shape_on_every_way() -> None:
    keyed = Server(keys=Keys({hashlib.sha256(b"secret-key").digest(): "someone"}))
    error_of(ask(keyed), 401, "authentication_error")
    assert keyed.post(
        "/v1/messages",
        {"max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]},
        headers={"x-api-key": "secret-key", "anthropic-version": "2023-06-01"},
    ).status_code == 200  # fmt: skip
    error_of(ask(Server(), model="other"), 404, "not_found_error")
    error_of(Server().request("GET", "/v1/messages"), 405, "invalid_request_error")
    error_of(ask(Server(config={"max_body_bytes": 1024}), system="x" * 2000), 413, "request_too_large")
    error_of(Server().request("POST", "/v1/messages", content=b"{"), 400, "invalid_request_error")


def test_a_stream_that_fails_ends_with_an_error_event() -> None:
    server = Server("Hello", error=RequestError("out_of_memory", "no memory is left"))
    text = ask(server, stream=True).text
    assert text.startswith("event: message_start\n")
    assert text.endswith(
        'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"no memory is left"}}\n\n'
    )
    assert "message_stop" not in text
