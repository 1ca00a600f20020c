"""/tokenize, /detokenize, /tokenizer_info, /v1/models, health and admin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from nanoengine.service.client import Health, ServiceStats
from nanoengine.testing.byte_tokenizer import END
from nanoengine.testing.fake_engine import FakeEngine
from nanoengine.text import Tokenizer
from server.support import Server, error_of

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Server:
    return Server(config={"served_model_name": ("main", "alias")})


def test_tokenize_and_detokenize_undo_each_other(server: Server) -> None:
    found = server.post("/tokenize", {"prompt": "Grüße <end>", "return_token_strs": True}).json()
    assert found["tokens"] == server.tokenizer.encode("Grüße <end>")
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 4096)
    assert found["token_strs"][0] == "G"
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "Grüße <end>"}
    skipped = server.post("/detokenize", {"tokens": found["tokens"], "skip_special_tokens": True}).json()
    assert skipped == {"prompt": "Grüße "}
    assert server.post("/tokenize", {"prompt": ""}).json()["tokens"] == []


def test_a_conversation_has_the_tokens_of_its_prompt(server: Server) -> None:
    found = server.post("/tokenize", {"messages": MESSAGES, "model": "alias"}).json()
    server.chat()
    assert found["tokens"] == [*server.last.prompt_token_ids]
    shorter = server.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json()
    assert shorter["count"] < found["count"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "give prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "give prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/detokenize", {"tokens": [1, 99999]}, "99999"),
        ("/detokenize", {"tokens": [-1]}, "-1"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_wrong_requests_are_named(server: Server, path: str, body: Any, words: str) -> None:
    assert words in error_of(server.post(path, body))["message"]


def test_the_tokenizers_description_has_what_clients_need(server: Server) -> None:
    found = server.request("GET", "/tokenizer_info").json()
    assert (found["eos_token"], found["bos_token"], found["max_model_len"]) == (END, None, 4096)
    assert "messages" in found["chat_template"]
    assert found["vocab_size"] == server.tokenizer.vocab_size


def test_models_are_listed_under_each_name(server: Server) -> None:
    listed = server.request("GET", "/v1/models").json()
    assert [each["id"] for each in listed["data"]] == ["main", "alias"]
    assert all(each["max_model_len"] == 4096 and each["object"] == "model" for each in listed["data"])
    assert server.request("GET", "/v1/models/alias").json()["id"] == "alias"
    error_of(server.request("GET", "/v1/models/other"), 404)
    assert server.chat(model="alias").json()["model"] == "main"
    assert error_of(server.chat(model="fake"), 404)["code"] == "model_not_found"
    slash = Server(config={"served_model_name": ("owner/name",)})
    assert slash.request("GET", "/v1/models/owner/name").status_code == 200


class Stated(FakeEngine):
    """Its health is what the test says."""

    state = Health(alive=True, ready=True)

    @property
    def health(self) -> Health:
        return self.state


@pytest.mark.parametrize(
    ("health", "ready", "alive"),
    [
        (Health(alive=True, ready=True), 200, 200),
        (Health(alive=True, ready=False, draining=True, reason="it drains"), 503, 200),
        (Health(alive=False, ready=False, reason="no step for 11 s"), 503, 503),
    ],
)
def test_a4_health_is_what_the_engine_client_says(health: Health, ready: int, alive: int) -> None:
    server = Server()
    server.engine.__class__ = Stated
    server.engine.state = health  # type: ignore[attr-defined]
    for path, status in (("/live", 200), ("/ready", ready), ("/health", alive)):
        response = server.request("GET", path)
        assert response.status_code == status
        if status == 503:
            assert error_of(response, 503)["message"] == health.reason
            assert response.headers["retry-after"] == "1"


def test_load_and_metrics_are_the_engines() -> None:
    server = Server()
    server.engine.service_stats = replace(ServiceStats(), running=3, num_blocks=10, free_blocks=4)
    server.engine.prometheus = b"nanoengine_requests 3\n"
    load = server.request("GET", "/load").json()
    assert (load["running"], load["kv_usage"]) == (3, 0.6)
    response = server.request("GET", "/metrics")
    assert response.content == b"nanoengine_requests 3\n"
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_drain_and_trace() -> None:
    server = Server()
    assert server.post("/admin/trace", {"seconds": 0.01}).content == b"[]"
    assert server.post("/admin/drain", {"seconds": 1}).json() == {"drained": True}
    error_of(server.request("GET", "/ready"), 503)
    assert server.request("GET", "/health").json()["status"] == "draining"
    error_of(server.chat(), 503)
    error_of(server.post("/admin/trace", {"seconds": 0}))


def test_a36_the_usage_that_is_counted_is_the_one_that_is_answered() -> None:
    server = Server("Hello", cached=1)
    server.chat(n=3)
    server.complete(["a", "bc"], stream=True)
    server.chat(temprature=1)
    first, second, refused = server.engine.usages
    assert (refused.status, refused.prompt_tokens, refused.finish_reasons) == (400, 0, ())
    assert (first.endpoint, first.status, first.completion_tokens) == ("/v1/chat/completions", 200, 18)
    assert (second.prompt_tokens, second.cached_tokens, second.completion_tokens) == (3, 2, 12)
    assert second.finish_reasons == ("stop", "stop")
    assert second.ttft is not None
    assert second.duration is not None
    assert 0 <= second.ttft <= second.duration


@pytest.mark.parametrize(
    ("token", "raw"), [("<0x0A>", b"\n"), ("<0xC3>", b"\xc3"), ("ab", b"ab"), ("<0xZZ>", b"<0xZZ>")]
)
def test_the_bytes_of_a_token_are_those_that_it_stands_for(token: str, raw: bytes) -> None:
    backend = Backend(models.BPE(vocab={"a": 0, token: 1}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.token_bytes(1) == raw
    assert tokenizer.token_bytes(99) == b""
