"""What the server refuses, by name and small: unknown fields, values beyond limits, bodies that are no requests."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
from typing import Any

import httpx
import pytest

from nanoengine.api.errors import EngineUnavailable, ParamsError, RequestError
from nanoengine.server import context
from nanoengine.server.auth import VARIABLE, configured_keys
from nanoengine.server.config import ServerConfig
from nanoengine.server.errors import ApiError
from nanoengine.server.lifecycle import Lifecycle
from nanoengine.server.protocol.base import checked
from nanoengine.server.protocol.chat import ChatRequest
from nanoengine.service.client import ClientRequest
from nanoengine.testing.fake_engine import Answer
from server.support import Server, error_of, events
from server.test_gate import routes


@pytest.fixture(scope="module")
def server() -> Server:
    return Server()


PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/admin/abort", "/admin/drain"]


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_field_is_refused_by_name_with_the_nearest(server: Server, path: str) -> None:
    near = {"/v1/completions": ("temperture", "temperature"), "/v1/chat/completions": ("mesages", "messages"),
            "/tokenize": ("promt", "prompt"), "/detokenize": ("token", "tokens"), "/admin/drain": ("second", "seconds"),
            "/admin/abort": ("request", "request_id")}  # fmt: skip
    wrong, right = near[path]
    error = error_of(server.post(path, {wrong: 1}))
    assert (error["param"], error["code"]) == (wrong, "unknown_field")
    assert f"did you mean '{right}'" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
         "response_format.json_schema.shema"),
        ({"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, "tools[0].function.params"),
        ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx"),
        ({"stream": "yes"}, "stream"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"timeout": 0}, "timeout"),
        ({"return_progress": True}, "return_progress"),
        ({"store": True}, "store"),
        ({"request_id": "a\nb"}, "request_id"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    before = len(server.engine.added)
    error = error_of(server.chat(**fields))
    assert (error["param"] or "").startswith(param), error
    assert param.split(".")[-1].split("[")[0] in error["message"]
    assert len(server.engine.added) == before


@pytest.mark.parametrize(
    ("path", "field", "advice"),
    [
        ("chat", "use_beam_search", "no beam search"),
        ("chat", "functions", "tools"),
        ("chat", "function_call", "tool_choice"),
        ("chat", "chat_template", "chat_template_kwargs"),
        ("chat", "logits_processors", "plugin"),
        ("chat", "prompt", "/v1/completions"),
        ("complete", "suffix", "continues"),
        ("complete", "messages", "/v1/chat/completions"),
        ("complete", "max_completion_tokens", "max_tokens"),
    ],
)
def test_a_field_of_other_servers_is_refused_with_advice(server: Server, path: str, field: str, advice: str) -> None:
    error = error_of(getattr(server, path)(**{field: 1}))
    assert error["param"] == field
    assert "not supported" in error["message"]
    assert advice in error["message"]


def test_null_is_no_value(server: Server) -> None:
    nothing = dict.fromkeys(
        ("stop", "tools", "n", "seed", "temperature", "response_format", "logit_bias", "tool_choice")
    )
    others = dict.fromkeys(("functions", "function_call", "audio", "verbosity"))  # that are not supported
    assert server.chat(**nothing, **others, top_logprobs=0).status_code == 200
    assert server.complete(suffix=None, messages=None).status_code == 200
    assert error_of(server.chat(temprature=None))["param"] == "temprature"
    assert "temperature" not in server.last.params.processor_fields


@pytest.mark.parametrize("key", ["a", "1.5", "", "９", "1" * 30, "--1"])
def test_a12_a_key_of_logit_bias_that_is_no_id_is_named(server: Server, key: str) -> None:
    error = error_of(server.chat(logit_bias={key: 1}))
    assert error["param"] == "logit_bias"
    assert key in error["message"] or len(key) > 20


HUGE: list[Any] = [
    {"messages": [{"role": "user", "content": "x" * 100_000}], "x" * 50_000: 1},
    {"messages": [{"role": "x" * 100_000, "content": [{"type": "y" * 100_000}]}]},
    {"messages": [{"role": 1}] * 5_000},
    {"messages": [1] * 50_000},
    {"messages": [], "stop": [1] * 50_000},
    {"messages": [], "stop": "\U0001f600\\\"" * 30_000, "n": "\U0001f600" * 30_000},
    {"messages": [], "tools": [{"a": 1}] * 5_000},
    {"messages": [], "tool_choice": {"x" * 9000: {}}},
    {"messages": [], "structured_outputs": {"x" * 9000: {}}},
    {"messages": [], "logit_bias": {"x" * 9000: 1}},
    {"messages": [], "model": "x" * 100_000},
    {"messages": [], "chat_template_kwargs": {"x " * 9000: 1}},
    {"messages": [], "guided_regex": "(" * 9000, "guided_choice": ["a"]},
    {"prompt": ["a"] * 5_000},
    {"prompt": [1] * 4_000 + ["\x00\x1f" * 9_000]},
    {"prompt": [{}] * 50_000},
]  # fmt: skip


ANY = [
    *({"max_tokens": 3, "messages": [], char * 3000: 1, "model": char * 3000, "input": [{"type": char * 3000}],
       "prompt": [char * 3000, {}], "tokens": [char * 3000], "text_1": char * 3000} for char in "\U0001f600\x01\\"),
    {"input": [{"role": "y" * 9000, "content": [{"type": "z" * 9000}]}], "x" * 9000: 1},
    {"input": [{"type": "y" * 9000}] * 300, "tools": [{"type": "x" * 9000}] * 300},
    {"input": "a", "model": "x" * 100_000, "max_tokens": 3, "messages": [{"role": "user", "content": "a"}],
     "text_1": "a", "text_2": "b", "tokens": [1]},
    {"max_tokens": 3, "messages": [{"role": "user", "content": [{"type": "y" * 9000, "text": 3}]}] * 300},
    {"max_tokens": 3, "messages": [{"role": "user", "content": "a"}], "tools": [{"name": "x" * 9000}] * 300},
    {"text_1": ["a"] * 900, "text_2": [{"b": "x" * 9000}] * 99, "tokens": ["x" * 9000] * 99, "seconds": "x" * 9000},
    {"input": [{"x" * 9000: 1}] * 300, "encoding_format": "y" * 9000, "dimensions": "z" * 9000, "prompt": ["x"] * 900},
]  # fmt: skip


def posts(server: Server) -> list[str]:
    return sorted({path for method, path in routes(server) if method == "POST"})


@pytest.mark.parametrize("number", range(len(HUGE) + len(ANY)))
def test_a14_error_bodies_are_small_on_every_route(server: Server, number: int) -> None:
    paths = posts(server)
    assert {*PATHS, "/v1/messages", "/v1/responses", "/v1/embeddings", "/v1/score", "/admin/trace"} <= {*paths}
    for path in paths:
        response = server.post(path, [*HUGE, *ANY][number])
        assert response.status_code in (400, 404), (path, response.text[:300])
        assert len(response.content) <= 4096
        assert response.json()["error"]["message"]
        if path in PATHS:
            error_of(response, response.status_code)


def test_a14_error_bodies_of_random_requests_are_small(server: Server) -> None:
    rng = random.Random(14)
    values = [None, True, -1, 10**30, 1.5, "x" * 5000, [], {}, [{}] * 99, {"type": "y" * 5000}, [["\x01" * 999]]]
    names = ["messages", "prompt", "n", "stop", "tools", "response_format", "stream", "logprobs", "timeout", "user"]
    for _ in range(150):
        body = {name: rng.choice(values) for name in rng.sample(names, 4)}
        response = server.post(rng.choice(PATHS[:2]), body)
        if response.status_code != 200:
            error_of(response, response.status_code)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"a"', b"\xff{}", b'{"n": NaN}', b"[" * 100_000, b'{"a":' * 50_000, b'{"stop": "\\ud800"}'],
)
def test_what_is_no_json_object_is_refused(server: Server, body: bytes) -> None:
    error_of(server.request("POST", "/v1/completions", content=body))


def test_an_unknown_path_or_method_has_the_same_shape(server: Server) -> None:
    assert error_of(server.request("GET", "/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(server.request("POST", "/v1/completions/"), 404)["code"] == "not_found"  # and no redirect
    assert error_of(server.request("GET", "/v1/completions"), 405)["code"] == "method_not_allowed"
    assert "no model 'gpt'" in error_of(server.chat(model="gpt"), 404)["message"]


@pytest.mark.parametrize("path", ["/live", "/ready", "/health", "/load", "/metrics", "/v1/models"])
def test_head_is_answered_as_get_is(server: Server, path: str) -> None:
    assert server.request("HEAD", path).status_code == server.request("GET", path).status_code == 200
    assert error_of(server.request("GET", "/v1/completions"), 405)["code"] == "method_not_allowed"


def test_an_unknown_path_or_method_is_answered_with_the_right_one() -> None:
    server = Server()
    without_v1 = error_of(server.post("/chat/completions", {}), 404)["message"]
    assert "no path '/chat/completions' here: did you mean '/v1/chat/completions'? Valid: /admin/abort," in without_v1
    assert "/openapi.json" not in without_v1
    wrong = error_of(server.request("GET", "/v1/completions"), 405)["message"]
    assert wrong == "/v1/completions does not take GET, but POST"


@pytest.mark.parametrize(
    ("path", "name", "value", "param", "said"),
    [
        ("/v1/chat/completions", "stop", ["a"] * 65, "stop", "at most 64 items"),
        ("/v1/chat/completions", "stop", ["a" * 5000], "stop[0]", "at most 4096 characters"),
        ("/v1/chat/completions", "stop", [1], "stop[0]", "valid string"),
        ("/v1/chat/completions", "tool_choice", "maybe", "tool_choice", "'none', 'auto' or 'required'"),
        ("/v1/chat/completions", "tool_choice", {"type": "function"}, "tool_choice.function", "required"),
        ("/v1/responses", "input", 5, "input", "valid string"),
        ("/v1/responses", "input", [5], "input[0]", "valid dictionary"),
    ],
)
def test_a_value_that_fits_no_type_of_its_field_is_named_by_what_is_wrong_with_it(
    server: Server, path: str, name: str, value: Any, param: str, said: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"input": "x"}
    error = error_of(server.post(path, {**body, name: value}))
    assert (error["param"], said in error["message"]) == (param, True), error


LONG = "u" * 257


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/completions", {"prompt": "x", "user": LONG}, "user"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "user": LONG}, "user"),
        ("/v1/responses", {"input": "x", "user": LONG}, "user"),
        ("/v1/embeddings", {"input": "x", "user": LONG}, "user"),
    ],
)
def test_who_asks_has_a_length_on_every_endpoint(server: Server, path: str, body: dict[str, Any], where: str) -> None:
    error = error_of(server.post(path, body))
    assert error["param"] == where
    assert "at most 256 characters" in error["message"]


def test_a_name_of_a_message_has_a_length_too(server: Server) -> None:
    body = {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "metadata": {"user_id": LONG}}
    response = server.post("/v1/messages", body)
    assert response.status_code == 400
    assert "metadata.user_id: String should have at most 256" in response.json()["error"]["message"]


def test_what_a_converted_request_may_not_have_is_refused_and_no_failure_of_the_server() -> None:
    with pytest.raises(ApiError, match="user: String should have at most 256 characters") as raised:
        checked(ChatRequest, {"messages": [], "user": LONG})
    assert raised.value.status == 400


@pytest.mark.parametrize(
    ("path", "shape"),
    [("/v1/chat/completions", {"message", "type", "param", "code"}), ("/v1/messages", {"message", "type"})],
)
@pytest.mark.parametrize("phase", ["starting", "draining before it served", "draining"])
def test_a_server_that_starts_or_ends_refuses_as_one_that_serves(
    phase: str, path: str, shape: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """With the shape of the path, all headers, the question for a key, and a line in the log; and probes are true."""
    options = ServerConfig(cors_origins=("https://chat.example",))
    server, lifecycle = Server(config={"cors_origins": options.cors_origins}), Lifecycle(0.0)
    if phase == "draining":
        lifecycle.install(server.routes)
        lifecycle.ready()
    if phase != "starting":
        lifecycle.drain(lambda: None)
    headers = {"origin": "https://chat.example", "x-request-id": "mine", "x-api-key": "sk-alice-123456"}
    keys = configured_keys(ServerConfig(), {VARIABLE: "alice:sk-alice-123456"})

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(server.gate(lifecycle, options, keys))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            found = [await client.post(path, json={"prompt": "a"}, headers=headers)]
            found.append(await client.post(path, json={"prompt": "a"}))
            return [*found, *[await client.get(each, headers=headers) for each in ("/live", "/ready", "/health")]]

    with caplog.at_level(logging.INFO, "nanoengine.access"):
        refused, unknown, live, ready, health = asyncio.run(ask())
    assert refused.status_code == 503
    assert refused.headers["connection"] == "close"
    assert refused.headers["retry-after"] == ("5" if phase == "starting" else "1")
    assert refused.headers["x-request-id"] == "mine"
    assert refused.headers["access-control-allow-origin"] == "https://chat.example"
    assert set(refused.json()["error"]) == shape
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert unknown.status_code == 401
    lines = [record for record in caplog.records if record.name == "nanoengine.access"]
    assert [record.getMessage() for record in lines] == [f"POST {path} 503", f"POST {path} 401"]
    assert lines[0].fields["request_id"] == "mine"
    assert lines[0].fields["client"] == "alice"
    assert (live.status_code, ready.status_code) == (200, 503)
    assert ready.json()["status"] == phase.split()[0]
    if phase == "draining":
        found = health.json()
        assert (health.status_code, found["status"], found["ready"], found["draining"]) == (200, phase, False, True)
    else:
        assert (health.status_code, health.json()["status"]) == (503, "starting")


def test_a34_n_has_a_limit_and_best_of_is_n() -> None:
    server = Server(info={"max_n": 4}, config={"max_n": 3})
    assert "from 1 to 3" in error_of(server.chat(n=4))["message"]
    assert "from 1 to 3" in error_of(server.complete(n=512))["message"]
    assert server.complete(n=2, best_of=2).status_code == 200
    assert error_of(server.complete(n=2, best_of=3))["param"] == "best_of"
    assert error_of(server.complete(best_of=2))["param"] == "best_of"
    assert "max_prompts" in error_of(Server(config={"max_prompts": 2}).complete(["a"] * 3))["message"]


@pytest.mark.parametrize("char", ["a", "\x01", "\\", "\U0001f600", "\ud800"])
def test_a14_a_message_of_any_characters_fits(char: str) -> None:
    def refuse(request: ClientRequest) -> Answer:
        raise RequestError("invalid_grammar", f"begin {char * 100_000} end")

    for stream in (False, True):
        message = error_of(Server(refuse).chat(stream=stream))["message"]
        assert message.startswith("begin ")
        assert message.endswith(" end")
        assert len(message) > 300


@pytest.mark.parametrize("value", [-1, 21, 10**9, -(10**9)])
def test_a43_log_probs_have_a_cap_and_no_word_for_all(server: Server, value: int) -> None:
    for response in (
        server.complete(logprobs=value),
        server.chat(logprobs=True, top_logprobs=value),
        server.chat(prompt_logprobs=value),
        server.complete(prompt_logprobs=value),
    ):
        assert "from 0 to 20" in error_of(response)["message"]
    wide = Server(info={"max_logprobs": -1}, config={"max_logprobs": 30})
    assert wide.complete(logprobs=30).status_code == 200
    error_of(wide.complete(logprobs=31))


def test_priority_that_has_no_effect_is_refused(server: Server) -> None:
    assert "scheduling_policy" in error_of(server.chat(priority=1))["message"]
    assert server.chat(priority=0).status_code == 200
    other = Server(info={"scheduling_policy": "priority"})
    assert other.chat(priority=-3).status_code == 200
    assert other.last.priority == -3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("overloaded", "256 requests wait", 2.2), 429, "rate_limit_exceeded"),
        (RequestError("deadline", "it waited 3 s"), 408, "deadline"),
        (RequestError("too_long", "9 tokens"), 400, "context_length_exceeded"),
        (RequestError("step_failed", "boom"), 500, "step_failed"),
        (RequestError("bad_logits", "nan"), 500, "bad_logits"),
        (EngineUnavailable("it is draining"), 503, "unavailable"),
        (ParamsError("top_p must be above 0, not 7"), 400, "invalid_value"),
    ],
)
def test_a29_what_the_engine_refuses_has_its_status_streamed_or_not(
    error: Exception, status: int, code: str, stream: bool
) -> None:
    def refuse(request: ClientRequest) -> Answer:
        raise error

    server = Server(refuse)
    response = server.chat(stream=stream)
    found = error_of(response, status)
    assert (found["code"], found["message"]) == (code, str(error))
    assert response.headers.get("retry-after") == {429: "3", 503: "1"}.get(status)
    assert [usage.status for usage in server.engine.usages] == [status]


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_its_status_and_a_later_one_an_event(stream: bool) -> None:
    error = RequestError("deadline", "it waited too long")
    early = Server("", error=error, chunk=9)
    error_of(early.chat(stream=stream), 408)
    late = Server("Hello", error=error)
    response = late.chat(stream=stream)
    if not stream:
        error_of(response, 408)
        return
    *chunks, last = events(response)
    assert last["error"]["code"] == "deadline"
    assert "finish_reason" not in str(last)
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])
    assert late.engine.usages[-1].status == 408


def test_an_error_of_the_server_says_nothing_of_its_cause() -> None:
    def broken(request: ClientRequest) -> Answer:
        raise ZeroDivisionError("secret")

    server = Server(broken)

    async def use(_: Any) -> Any:
        async with server.client(raise_app_exceptions=False) as client:
            body = {"messages": [{"role": "user", "content": "a"}]}
            return await client.post("/v1/chat/completions", content=json.dumps(body))

    error = error_of(server.run(use), 500)
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"stop": ["ab"] * 65}, "stop"),
        ({"stop": "a" * 4097}, "stop"),
        ({"stop": ["a" * 4097]}, "stop"),
        ({"stop_token_ids": [1] * 4097}, "stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(16_385)}}, "logit_bias"),
        ({"bad_words": ["a"] * 1025}, "bad_words"),
        ({"allowed_token_ids": [1] * 16_385}, "allowed_token_ids"),
        ({"user": "u" * 257}, "user"),
        ({"tools": [{"function": {"name": f"f{i}"}} for i in range(1025)]}, "tools"),
    ],
)
def test_a43_what_costs_time_for_each_entry_has_a_cap(server: Server, fields: dict[str, Any], name: str) -> None:
    for path in (server.chat,) if name == "tools" else (server.chat, server.complete):
        before = len(server.engine.added)
        error = error_of(path(**fields))
        assert (error["param"] or "").startswith(name)
        assert len(server.engine.added) == before


@pytest.mark.parametrize("path", ["/metrics", "/health", "/v1/models", "/live"])
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    found, whole = server.request("HEAD", path), server.request("GET", path)
    assert (found.status_code, found.content) == (200, b"")
    assert found.headers["content-type"] == whole.headers["content-type"]
    assert found.headers.get("content-length") == whole.headers.get("content-length")


def test_no_path_answers_with_a_redirect(server: Server) -> None:
    for path in ("/v1/completions/", "/health/", "//health"):
        error_of(server.request("POST" if "v1" in path else "GET", path), 404)


@pytest.mark.parametrize(
    ("path", "name", "body"),
    [
        ("/v1/completions", "max_tokens", {"prompt": "abc"}),
        ("/v1/chat/completions", "max_tokens", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/chat/completions", "max_completion_tokens", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", "max_output_tokens", {"input": "a"}),
    ],
)
def test_more_tokens_than_have_room_are_refused_with_the_numbers(path: str, name: str, body: dict[str, Any]) -> None:
    """As vLLM does, where the client asks for them; a default of the configuration ends with the context instead."""
    server = Server(info={"default_sampling": {"max_tokens": 10**6}})
    assert server.post(path, body).status_code == 200
    tokens = len(server.last.prompt_token_ids)
    room = 4096 - tokens
    assert server.post(path, {**body, name: room}).status_code == 200
    error = error_of(server.post(path, {**body, name: room + 1, "stream": True}))
    assert (error["param"], error["code"]) == (name, "context_length_exceeded")
    assert error["message"].startswith(f"{name} is {room + 1} and the prompt has {tokens} tokens, together 4097")
    assert f"at most {room}" in error["message"]


def test_messages_take_more_tokens_than_have_room(server: Server) -> None:
    """Anthropic has a reason for that end: model_context_window_exceeded."""
    body = {"max_tokens": 10**6, "messages": [{"role": "user", "content": "a"}]}
    assert server.post("/v1/messages", body).status_code == 200


@pytest.mark.parametrize("key", [" 1", "1 ", "+1", "01", "1_0", "1.0", "", "x", "\u0661", "9" * 30, "-0"])
def test_a_token_id_has_one_spelling(server: Server, key: str) -> None:
    """Or two keys of logit_bias could be one id, and the last would win."""
    assert error_of(server.complete(logit_bias={key: 1}))["param"] == "logit_bias"


def test_a_body_that_is_coded_is_refused_by_the_name_of_its_coding(server: Server) -> None:
    response = server.request("POST", "/v1/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert "Content-Encoding 'gzip'" in error_of(response, 415)["message"]
    headers = {"content-encoding": "identity"}
    assert server.request("POST", "/v1/completions", content=b'{"prompt": "a"}', headers=headers).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "TRACE"])
def test_live_takes_get_alone_while_the_server_serves(server: Server, method: str) -> None:
    lifecycle = Lifecycle(0.0)
    lifecycle.install(server.routes)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(server.gate(lifecycle, ServerConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return [await client.request(each, "/live") for each in (method, "GET", "HEAD")]

    assert [response.status_code for response in asyncio.run(ask())] == [405, 200, 200]


def test_a_body_of_a_million_lists_is_refused_before_it_is_decoded(server: Server) -> None:
    """Decoding keeps the event loop from running, by the number of objects."""
    body = b'{"prompt": [' + b"[]," * (1 << 20) + b"[]]}"
    response = server.request("POST", "/v1/completions", content=body)
    assert f"the body has {(1 << 20) + 3} brackets" in error_of(response)["message"]


def test_a_long_body_is_decoded_without_collections_of_garbage(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would look at all objects so far, with every thread stopped."""
    enabled, own = list[bool](), context.parsed
    monkeypatch.setattr(context, "parsed", lambda *given: (enabled.append(gc.isenabled()), own(*given))[1])
    for body in ({"prompt": "a"}, {"prompt": ["a " * 20] * 1000}, {"prompt": 3, "x": "a" * 40_000}):
        server.post("/v1/completions", body)
        assert gc.isenabled()
    assert enabled == [True, False, False]


@pytest.mark.parametrize(("n", "said"), [(1, "stop"), (8, ",".join(["stop"] * 8)), (9, "stop x 9")])
def test_the_line_in_the_log_has_the_reasons_of_few_samples_and_counts_those_of_many(
    server: Server, n: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nanoengine.access"):
        server.complete(n=n)
    assert caplog.records[-1].fields["finish_reasons"] == said  # type: ignore[attr-defined]


@pytest.mark.parametrize(("code", "traceback"), [("unavailable", False), ("step_failed", True)])
def test_a_traceback_is_logged_where_it_says_something(
    code: str, traceback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand streams that a drain ends are a thousand lines, not a thousand tracebacks."""
    server = Server(lambda request: Answer(samples=[[97, 98]], error=RequestError(code, "as a test")))
    with caplog.at_level(logging.ERROR, "nanoengine.server"):
        server.complete(stream=True)
    [line] = [record for record in caplog.records if record.name == "nanoengine.server"]
    assert "as a test" in line.getMessage()
    assert bool(line.exc_info and line.exc_info[1]) == traceback
