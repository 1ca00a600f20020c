"""/v1/responses: items and numbered events; the same streamed or whole; nothing is stored."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from nanoengine.api.errors import RequestError
from nanoengine.plugins.tool_parsers.hermes import Hermes
from nanoengine.plugins.tool_parsers.json_calls import JsonCalls
from nanoengine.server.parsing import Parsers
from nanoengine.text.sample_parser import REASONING_TAGS
from server.support import Server, error_of, make_tokenizer
from server.test_messages import HARD, HARD_CALL, SEEN, prompt_of
from server.test_tools import SECOND

PARSERS = Parsers(tool=Hermes, fallback=JsonCalls, tags=REASONING_TAGS["think"])
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True},
    {"type": "function", "name": "time", "description": "now", "parameters": None},
]


def ask(server: Server, **fields: Any) -> httpx.Response:
    return server.post("/v1/responses", {"input": "hi", **fields})


def said(server: Server, **fields: Any) -> dict[str, Any]:
    """The response, whole, which a stream must give as well."""
    response = ask(server, **fields)
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()
    assert stable(assembled(ask(server, stream=True, **fields))) == stable(whole)
    return whole


def stable(response: dict[str, Any]) -> dict[str, Any]:
    """Without ids and times."""
    output = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    return {
        **response,
        "id": "",
        "created_at": 0,
        "completed_at": response["completed_at"] is not None,
        "output": output,
    }


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    parts = [part.split("\n") for part in response.text.split("\n\n") if part and not part.startswith(":")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [name for name, _ in parts] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def assembled(response: httpx.Response) -> dict[str, Any]:
    """The last response, which must be what the events before it make."""
    first, second, *between, last = events_of(response)
    assert [first["type"], second["type"]] == ["response.created", "response.in_progress"]
    assert first["response"]["status"] == "in_progress"
    found: dict[str, Any] = last["response"]
    assert last["type"] == f"response.{found['status']}"
    items: list[dict[str, Any]] = []
    while between:
        added = between.pop(0)
        assert (added["type"], added["output_index"]) == ("response.output_item.added", len(items))
        items.append(_item(added["item"], between))
    assert items == found["output"]
    return found


def _item(item: dict[str, Any], events: list[dict[str, Any]]) -> dict[str, Any]:
    """Reads the events of one item, and returns it as it is at its end."""
    assert item["status"] == "in_progress"
    call, text = item["type"] == "function_call", ""
    kind = "function_call_arguments" if call else "reasoning_text" if item["type"] == "reasoning" else "output_text"
    if call:
        assert item["arguments"] == ""
    else:
        added = events.pop(0)
        assert (added["type"], added["part"]["type"], added["part"]["text"]) == (
            "response.content_part.added",
            kind,
            "",
        )
    while events[0]["type"] == f"response.{kind}.delta":
        delta = events.pop(0)
        assert delta["item_id"] == item["id"]
        assert delta["delta"]
        text += delta["delta"]
    done = events.pop(0)
    assert (done["type"], done["arguments" if call else "text"]) == (f"response.{kind}.done", text)
    if not call:
        part = events.pop(0)
        assert (part["type"], part["part"]["text"]) == ("response.content_part.done", text)
    last = events.pop(0)
    assert last["type"] == "response.output_item.done"
    found: dict[str, Any] = last["item"]
    assert (found["id"], found["arguments"] if call else found["content"][0]["text"]) == (item["id"], text)
    return found


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_items_are_the_same_streamed_or_whole(chunk: int) -> None:
    server = Server(f"<think>hm</think>\n\nI look.{HARD_CALL}\n{SECOND}", parsers=PARSERS, chunk=chunk)
    response = said(server, tools=TOOLS)
    reasoning, message, call, second = response["output"]
    assert (reasoning["type"], reasoning["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "hm"}])
    assert (message["role"], message["content"][0]["text"]) == ("assistant", "\n\nI look.")
    assert (call["name"], json.loads(call["arguments"]), second["name"]) == ("weather", HARD, "time")
    assert all(item["status"] == "completed" for item in response["output"])
    assert (response["status"], response["object"], response["store"]) == ("completed", "response", False)
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens"] == len(server.last.prompt_token_ids)
    # <think> and </think> are a token each.
    assert usage["output_tokens_details"]["reasoning_tokens"] == len(server.tokenizer.encode("<think>hm</think>")) == 4


def test_what_was_asked_for_is_repeated() -> None:
    fields = {
        "instructions": "Be brief",
        "max_output_tokens": 50,
        "temperature": 0.5,
        "metadata": {"a": "b"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}},
        "include": ["reasoning.encrypted_content"],
        "store": False,
        "previous_response_id": None,
        "truncation": "disabled",
        "top_logprobs": 0,
        "client_metadata": {"x-codex-installation-id": "a"},
    }
    response = said(Server("{}", parsers=PARSERS), **fields)
    same = ("instructions", "max_output_tokens", "temperature", "metadata", "reasoning", "text", "parallel_tool_calls")
    assert {name: response[name] for name in same} == {name: fields[name] for name in same}
    assert response["tools"][0] == TOOLS[0]
    assert response["top_p"] == 1.0


def test_an_answer_that_is_cut_off_is_incomplete() -> None:
    response = said(Server(HARD_CALL, parsers=PARSERS), tools=TOOLS, max_output_tokens=60)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    [call] = response["output"]
    assert call["status"] == "incomplete"
    assert json.dumps(HARD).startswith(call["arguments"])
    assert said(Server("Hello"), max_output_tokens=2)["output"][0]["content"][0]["text"] == "He"


def test_an_answer_that_is_given_up_is_incomplete_for_no_reason_of_the_clients() -> None:
    response = said(Server("Hello", finish_reason="abort"))
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": None})


def test_an_empty_answer_has_no_items() -> None:
    assert said(Server(""))["output"] == []


@pytest.mark.parametrize(
    ("choice", "required"),
    [("auto", False), ("required", True), ({"type": "function", "name": "weather"}, True), ("none", False)],
)
def test_tool_choice(choice: Any, required: bool) -> None:
    server = Server(HARD_CALL, parsers=PARSERS)
    response = said(server, tools=TOOLS, tool_choice=choice)
    assert response["output"][0]["type"] == ("message" if choice == "none" else "function_call")
    assert response["tool_choice"] == choice
    assert hasattr(server.last.params, "structured_outputs") == required


def test_items_of_a_turn_become_one_message() -> None:
    server = Server("ok", tokenizer=make_tokenizer(template=SEEN), parsers=PARSERS)
    items = [
        {"role": "developer", "content": "Be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c2", "output": "noon"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sun"}]},
        {"role": "user", "content": "And?"},
    ]
    said(server, input=items, instructions="In all.", reasoning={"effort": "high"})
    lines = prompt_of(server).split("\n")
    assert lines[:3] == ["<system>|In all.|", "<system>|Be brief|", "<user>|Weather?|"]
    assert lines[3].startswith("<assistant>so|I look.|[{")
    calls = json.loads(lines[3].split("|")[2])
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("c1", {"city": "Paris"}), ("c2", {})]
    assert lines[4:8] == ["<tool time>|noon|", "<tool weather>|sun|", "<user>|And?|", " high<assistant>"]


def test_the_items_of_an_answer_can_be_sent_back() -> None:
    server = Server(f"<think>hm</think>I look.{HARD_CALL}", parsers=PARSERS)
    output = said(server, tools=TOOLS)["output"]
    result = {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "sun"}
    assert (
        said(server, tools=TOOLS, input=[{"role": "user", "content": "hi"}, *output, result])["status"] == "completed"
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"store": True}, "store is not supported: responses are not stored"),
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported: responses are not stored"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"prompt": {"id": "p"}}, "prompt is not supported"),
        ({"background": True}, "background is not supported"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"max_tool_calls": 3}, "max_tool_calls is not supported"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"max_tokens": 3}, "its name is max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: Input should be 'function'"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema is missing"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": []}, "input is empty"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "items are not stored"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "web_search_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}, "fetched"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}]}]}, "content[0].x"),
        ({"input": [{"role": "user", "content": "a", "name": "x"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": "c9", "output": ""}]}, "'c9'"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "needs 'arguments'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    assert words in error_of(ask(Server(parsers=PARSERS), **fields))["message"]


def test_a_stream_that_fails_ends_with_a_failed_response() -> None:
    server = Server("Hello", error=RequestError("out_of_memory", "no memory is left"))
    *_, error, failed = events_of(ask(server, stream=True))
    assert (error["type"], error["message"], error["code"]) == ("error", "no memory is left", "out_of_memory")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"code": "server_error", "message": "no memory is left"}
