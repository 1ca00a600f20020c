"""Bodies in which values are exchanged for others: each is answered or refused, and none is a failure of the server."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nanoengine.server.field_names import Renames
from nanoengine.server.protocol.base import RequestModel
from nanoengine.server.protocol.chat import ChatRequest
from nanoengine.server.protocol.messages import CountRequest, MessagesRequest
from nanoengine.server.protocol.responses import ResponsesRequest
from server.support import Server
from server.test_messages import CONVERSATION, HARD_CALL, PARSERS
from server.test_messages import TOOLS as MESSAGE_TOOLS
from server.test_responses import TOOLS as RESPONSE_TOOLS

MESSAGE: dict[str, Any] = {
    "messages": CONVERSATION,
    "system": [{"type": "text", "text": "x"}],
    "tools": MESSAGE_TOOLS,
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 3},
    "output_config": {"effort": "low"},
}
SAMPLING = {"max_tokens": 20, "stop_sequences": ["a"], "metadata": {"user_id": "u"}, "temperature": 0.5, "stream": True}
RESPONSE: dict[str, Any] = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "s"}]},
    ],
    "instructions": "x",
    "tools": RESPONSE_TOOLS,
    "tool_choice": {"type": "function", "name": "time"},
    "reasoning": {"effort": "low"},
    "include": [],
    "metadata": {"a": "b"},
    "stream": True,
    "max_output_tokens": 10,
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "y"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "text"},
    "stop": ["x"],
    "logit_bias": {"3": 1},
    "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"mood": "m"},
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "max_tokens": 20,
}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/messages": {**MESSAGE, **SAMPLING},
    "/v1/messages/count_tokens": MESSAGE,
    "/v1/responses": RESPONSE,
}
MODELS: dict[str, type[RequestModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/v1/responses": ResponsesRequest,
}
ODD: list[Any] = [
    *(None, True, 0, -1, 1e308, 10**30, "", "x", "\ud800", [], {}, [[]], [{}], [None], [1], "a" * 3000),
    *({"type": "x"}, {"type": None}, {"a": {"b": [1]}}, [{"type": "text", "text": 5}], {"type": "text"}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in a body."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*path, key)
        yield from places(each, (*path, key))


def changed(body: Any, draw: random.Random) -> Any:
    body = copy.deepcopy(body)
    for _ in range(draw.choice([1, 1, 2])):
        *path, last = draw.choice(list(places(body)))
        inside = body
        for key in path:
            inside = inside[key]
        kind = draw.random()
        if kind < 0.7:
            inside[last] = copy.deepcopy(draw.choice(ODD))
        elif kind < 0.85:
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw.choice(["x", "type", "role", "content", "id", "name"])] = copy.deepcopy(draw.choice(ODD))
    return body


def check_words(path: str, response: httpx.Response) -> None:
    """An error speaks of the fields that this request has, not of those that it became."""
    if response.status_code == 200:
        return
    error, known = response.json()["error"], {*MODELS[path].model_fields}
    if error.get("param") is not None and error["code"] != "unknown_field":
        assert re.split(r"[.\[]", error["param"])[0] in known, error
    foreign = "|".join({*ChatRequest.model_fields} - known)
    assert not foreign or re.match(rf"({foreign})[.:\[ ]", error["message"]) is None, error


@pytest.mark.parametrize("path", BODIES)
def test_an_odd_body_is_answered_or_refused(path: str) -> None:
    server, draw, seen = Server(f"<think>a</think>b{HARD_CALL}", parsers=PARSERS), random.Random(path), set[int]()

    async def ask(client: httpx.AsyncClient) -> None:
        for _ in range(150):
            body = changed(BODIES[path], draw)
            response = await client.post(path, content=json.dumps(body).encode())
            assert response.status_code in (200, 400, 404), (body, response.text)
            assert response.status_code == 200 or len(response.content) <= 4096
            seen.add(response.status_code)
            check_words(path, response)

    server.run(ask)
    assert seen >= {200, 400}


def test_a_server_that_does_not_give_the_names_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Renames, "__call__", lambda self, name: name)
    with pytest.raises(AssertionError):
        test_an_odd_body_is_answered_or_refused("/v1/messages")
