"""/v1/chat/completions: messages, templates, log-probs, usage and ends, streamed and whole."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from nanoengine.server.parsing import Parsers
from nanoengine.text.sample_parser import REASONING_TAGS
from server.support import Server, choices, error_of, events, joined


@pytest.fixture(scope="module")
def server() -> Server:
    return Server("Hello world", cached=3)


def prompt_of(server: Server) -> str:
    return server.tokenizer.decode([*server.last.prompt_token_ids], skip_special_tokens=False)


def test_an_answer_is_openais(server: Server) -> None:
    response = server.chat(model="fake")
    assert prompt_of(server) == "<user>hi\n<assistant>"
    found = response.json()
    assert (found["object"], found["model"]) == ("chat.completion", "fake")
    assert found["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    [choice] = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello world", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    usage = {"prompt_tokens": 20, "completion_tokens": 12, "total_tokens": 32}
    assert found["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 3}}


def test_a18_the_usage_comes_once_if_asked_for_and_equals_the_whole_answers(server: Server) -> None:
    usage = server.chat(n=2).json()["usage"]
    plain = events(server.chat(n=2, stream=True))
    assert not any("usage" in chunk for chunk in plain)
    *others, last = events(server.chat(n=2, stream=True, stream_options={"include_usage": True}))
    assert (last["choices"], last["usage"]) == ([], usage)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in others)


def test_a18_continuous_usage_grows_to_the_whole(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(server.chat(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], chunks[-1]["choices"]) == (1, 12, [])
    without = events(server.chat(stream=True, stream_options={"continuous_usage_stats": True}))
    assert all(chunk["usage"] and chunk["choices"] for chunk in without)


def test_a19_the_end_has_a_chunk_of_its_own_behind_the_last_text(server: Server) -> None:
    for fields in ({}, {"max_tokens": 4}, {"stop": "wor"}):
        for path in (server.chat, server.complete):
            parts = choices(events(path(stream=True, **fields)))
            assert all(part["finish_reason"] is None for part in parts[:-1])
            assert parts[-1]["finish_reason"] == ("length" if "max_tokens" in fields else "stop")
            assert parts[-1].get("delta", {}) == {}
            assert parts[-1].get("text", "") == ""
    assert choices(events(server.chat(stream=True)))[0]["delta"] == {"role": "assistant", "content": ""}


def test_log_probs_have_openais_shape_and_stream_as_a_whole(server: Server) -> None:
    whole = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    parts = choices(events(server.chat(logprobs=True, top_logprobs=2, stream=True)))
    assert [each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]] == whole
    assert len(whole) == 12
    assert whole[0]["token"] == "H"
    assert whole[0]["bytes"] == [72]
    assert whole[0]["logprob"] == pytest.approx(-0.72)
    assert [each["bytes"] for each in whole[0]["top_logprobs"]] == [[0], [1]]


def test_log_probs_of_text_that_is_held_back_are_not_lost() -> None:
    server = Server("é!")
    parts = choices(events(server.chat(logprobs=True, stream=True, stop="!x")))
    tokens = [each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]]
    assert [each["bytes"] for each in tokens] == [[0xC3], [0xA9], [0x21], [*b"<end>"]]
    assert joined(events(server.chat(stream=True, stop="!x"))) == "é!"


def test_prompt_log_probs_and_token_ids(server: Server) -> None:
    found = server.chat(prompt_logprobs=0, return_token_ids=True).json()
    assert found["prompt_token_ids"] == [*server.last.prompt_token_ids]
    assert len(found["prompt_logprobs"]) == len(found["prompt_token_ids"])
    assert found["choices"][0]["token_ids"] == server.ids("Hello world")
    first, *rest = choices(events(server.chat(prompt_logprobs=0, return_token_ids=True, stream=True)))
    assert (first["prompt_logprobs"], first["prompt_token_ids"]) == (
        found["prompt_logprobs"],
        found["prompt_token_ids"],
    )
    assert [i for part in rest for i in part.get("token_ids", ())] == server.ids("Hello world")


@pytest.mark.parametrize(
    ("messages", "fields", "prompt"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {},
         "<user>a\nb\n<assistant>"),
        ([{"role": "developer", "content": "be"}, {"role": "user", "content": "a", "name": None}], {},
         "<system>be\n<user>a\n<assistant>"),
        ([{"role": "user", "content": "a"}], {"add_generation_prompt": False}, "<user>a\n"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         {"continue_final_message": True, "add_generation_prompt": False}, "<user>a\n<assistant>b"),
        ([{"role": "user", "content": "a"}], {"chat_template_kwargs": {"mood": "sad"}}, "<user>a\n[sad]<assistant>"),
    ],
)  # fmt: skip
def test_messages_and_the_templates_variables(server: Server, messages: Any, fields: Any, prompt: str) -> None:
    assert server.post("/v1/chat/completions", {"messages": messages, **fields}).status_code == 200
    assert prompt_of(server) == prompt


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        ([{"content": "a"}], "messages[0]"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 3}], "messages[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text"),
        ([{"role": "assistant", "content": "a", "function_call": {"name": "f"}}], "tool_calls"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        (None, "messages"),
    ],
)
def test_wrong_messages_are_named(server: Server, messages: Any, words: str) -> None:
    assert words in error_of(server.post("/v1/chat/completions", {"messages": messages}))["message"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "input_image", "file", "audio_url"])
def test_a9_no_url_is_ever_fetched(server: Server, kind: str) -> None:
    part = {"type": kind, kind: {"url": "http://169.254.169.254/latest"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    error = error_of(server.post("/v1/chat/completions", {"messages": messages}))
    assert kind in error["message"]
    assert "fetched" in error["message"]
    assert error["param"] == "messages[0].content[1]"


URL = "http://169.254.169.254/latest"
USER = {"role": "user"}
PARTS: dict[str, Any] = {
    "/v1/chat/completions": [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": URL}],
    "/tokenize": [{"type": "input_audio", "input_audio": {"url": URL}}, {"type": "text", "text": URL}],
    "/v1/responses": [{"type": "input_file", "file_url": URL}, {"type": "input_text", "text": URL}],
    "/v1/messages": [{"type": "image", "source": {"type": "url", "url": URL}}, {"type": "text", "text": URL}],
    "/v1/messages/count_tokens": [{"type": "document", "source": {"type": "url", "url": URL}},
                                  {"type": "text", "text": URL}],
}  # fmt: skip


@pytest.mark.parametrize("path", PARTS)
def test_a9_no_endpoint_opens_a_connection(server: Server, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def refuse(*args: Any, **more: Any) -> Any:
        opened.append(args)
        raise OSError("a connection is opened")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    for part, status in zip(PARTS[path], (400, 200), strict=True):
        name = "input" if path == "/v1/responses" else "messages"
        body = {name: [{**USER, "content": [part]}], **({"max_tokens": 3} if path == "/v1/messages" else {})}
        response = server.post(path, body)
        assert response.status_code == status, response.text
        assert (status == 200) or "fetched" in response.json()["error"]["message"]
    assert opened == []


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_dict", "messages", "tools", "padding", "a b"])
def test_a10_template_arguments_that_choose_the_result_are_refused(server: Server, name: str) -> None:
    before = len(server.engine.added)
    assert name in error_of(server.chat(chat_template_kwargs={name: "{{ 1 }}"}))["message"]
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {name: 1}}
    error_of(server.post("/tokenize", body))
    assert len(server.engine.added) == before


def test_a10_a_template_in_a_request_is_refused(server: Server) -> None:
    assert "chat_template" in error_of(server.chat(chat_template="{{ range(9) }}"))["message"]


@pytest.mark.parametrize("option", ["text", "tokens"])
def test_a11_control_tokens_in_content_are_text_unless_the_server_says_otherwise(option: str) -> None:
    server = Server(config={"special_tokens_in_content": option})
    server.chat("a<end>b")
    ids = [*server.last.prompt_token_ids]
    assert (server.tokenizer.eos_token_id in ids) == (option == "tokens")
    assert server.tokenizer.decode(ids, skip_special_tokens=False) == "<user>a<end>b\n<assistant>"


def test_max_completion_tokens_is_max_tokens(server: Server) -> None:
    assert server.chat(max_completion_tokens=3).json()["choices"][0]["finish_reason"] == "length"
    assert server.last.params.max_tokens == 3
    assert "two names" in error_of(server.chat(max_completion_tokens=3, max_tokens=4))["message"]
    for path, name in ((server.chat, "max_tokens"), (server.complete, "max_tokens"), (server.chat, "n")):
        error_of(path(**{name: -1}))


@pytest.mark.parametrize("shown", [None, True, False])
def test_reasoning_has_both_names(shown: bool | None) -> None:
    server = Server("<think>why</think>so", parsers=Parsers(tags=REASONING_TAGS["think"]))
    message = server.chat(include_reasoning=shown).json()["choices"][0]["message"]
    chunks = events(server.chat(stream=True, include_reasoning=shown))
    assert message["content"] == "so" == joined(chunks)
    reasoning = "" if shown is False else "why"
    for key in ("reasoning", "reasoning_content"):
        assert message.get(key, "") == reasoning == joined(chunks, key=key)
