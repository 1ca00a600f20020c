"""/v1/embeddings and /v1/score, over an engine whose vectors are a plain function of the prompt."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest

from nanoengine.api.errors import EngineUnavailable, RequestError
from nanoengine.params.pooling import PoolingDefaults
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.server.auth import Keys
from nanoengine.service.client import ClientRequest
from nanoengine.testing.fake_engine import Answer
from server.support import Server, error_of

SIZE = 4


def vector(ids: tuple[int, ...]) -> list[float]:
    return [float(sum(ids) % 11), float(len(ids)), float(ids[0] % 7), 1.5]


def says(request: ClientRequest) -> Answer:
    return Answer(samples=[[]], pooled=vector(request.prompt_token_ids), cached=len(request.prompt_token_ids) // 2)


def make(defaults: Mapping[str, Any] | None = None, answer: Any = says, **options: Any) -> Server:
    return Server(answer, info={"pooling": PoolingDefaults(size=SIZE, **(defaults or {}))}, **options)


@pytest.fixture
def server() -> Server:
    return make()


def embed(server: Server, given: Any, **fields: Any) -> httpx.Response:
    return server.post("/v1/embeddings", {"input": given, **fields})


def found(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["object"] == "list"
    assert [each["index"] for each in body["data"]] == list(range(len(body["data"])))
    return [each["embedding"] for each in body["data"]]


def unit(values: list[float]) -> Any:
    return pytest.approx((np.array(values) / np.linalg.norm(values)).tolist(), abs=1e-6)


def test_a_text_and_a_list_of_texts(server: Server) -> None:
    one, two = tuple(server.tokenizer.encode("hello")), tuple(server.tokenizer.encode("goodbye"))
    assert found(embed(server, "hello")) == [unit(vector(one))]
    assert found(embed(server, ["hello", "goodbye"])) == [unit(vector(one)), unit(vector(two))]
    assert [request.prompt_token_ids for request in server.engine.added] == [one, one, two]
    assert all((each.pooling, each.params) == ("last", SamplingParams()) for each in server.engine.added)


def test_token_ids_and_a_list_of_them(server: Server) -> None:
    assert found(embed(server, [1, 2, 3])) == [unit(vector((1, 2, 3)))]
    assert found(embed(server, [[1, 2, 3], [4]])) == [unit(vector((1, 2, 3))), unit(vector((4,)))]


def test_the_answer_is_openais(server: Server) -> None:
    response = embed(server, [[1, 2, 3], [4, 5]], model="fake", user="me")
    body = response.json()
    assert set(body) == {"id", "object", "created", "model", "data", "usage"}
    assert body["model"] == "fake"
    assert body["id"] == f"embd-{response.headers['x-request-id']}"
    assert set(body["data"][0]) == {"object", "index", "embedding"}
    assert body["data"][0]["object"] == "embedding"
    assert body["usage"] == {
        "prompt_tokens": 5, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip


def test_the_engine_counts_what_the_answer_says(server: Server) -> None:
    embed(server, [[1, 2, 3], [4, 5]], user="me")
    [usage] = server.engine.usages
    assert (usage.endpoint, usage.status) == ("/v1/embeddings", 200)
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (5, 2, 0)
    assert usage.ttft is None, "a vector is no first token"
    assert usage.duration is not None


def test_base64_is_of_little_endian_float32(server: Server) -> None:
    numbers = found(embed(server, [[1, 2], [3]], encoding_format="float"))
    texts = found(embed(server, [[1, 2], [3]], encoding_format="base64"))
    for text, values in zip(texts, numbers, strict=True):
        assert np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").tolist() == values


def test_fields_go_to_the_engine(server: Server) -> None:
    embed(server, [1, 2], pooling="mean", cache_salt="own", timeout=3.0, user="me", request_id="mine")
    request = server.last
    assert (request.pooling, request.params, request.timeout, request.client) == (
        "mean", SamplingParams(cache_salt="own"), 3.0, "me",
    )  # fmt: skip
    assert request.request_id.startswith("mine ")


def test_without_normalising_it_is_the_vector_itself(server: Server) -> None:
    assert found(embed(server, [1, 2], normalize=False)) == [vector((1, 2))]
    assert found(embed(make({"normalize": False}), [1, 2])) == [vector((1, 2))]


def test_special_tokens_are_added_unless_refused() -> None:
    server = make()
    calls = []
    encode = server.tokenizer.encode
    server.tokenizer.encode = lambda text, **options: calls.append(options) or encode(text)  # type: ignore
    try:
        embed(server, "a")
        embed(server, "a", add_special_tokens=False)
    finally:
        del server.tokenizer.encode
    assert [each["add_special_tokens"] for each in calls] == [True, False]


def test_a_prompt_may_be_as_long_as_max_model_len(server: Server) -> None:
    assert len(found(embed(server, [1] * 4096))) == 1
    error = error_of(embed(server, [1] * 4097))
    assert error["code"] == "context_length_exceeded"
    assert "4097 tokens and max_model_len is 4096: shorten the prompt to 4096 tokens" in error["message"]


@pytest.mark.parametrize(("trained", "asked"), [((), 2), ((2, 3), 3), (None, 4)])
def test_dimensions_that_the_model_was_trained_for(trained: Any, asked: int) -> None:
    [values] = found(embed(make({"dimensions": trained}), [1, 2], dimensions=asked))
    assert values == unit(vector((1, 2))[:asked])


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "input", "input is missing: give text, token ids, or a list of these"),
    ({"input": []}, "input", "input has 0 entries, and must have 1 to"),
    ({"input": 3}, "input", "input must be text, token ids, or a list of these, not 3"),
    ({"input": [1, "a"]}, "input[1]", "input[1] is 'a', not a token id"),
    ({"input": ["a", 1]}, "input", "input must be text, token ids, or a list of these"),
    ({"input": [[1], []]}, "input[1]", "the prompt is empty"),
    ({"input": [1_000_000]}, "input[0]", "outside the vocabulary"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    ({"input": "a", "dimensions": 2}, "dimensions", "dimensions is 2, and this model's embeddings have 4"),
    ({"input": "a", "dimensions": "2"}, "dimensions", "integer"),
    ({"input": "a", "pooling": "cls"}, "pooling", "'mean' or 'last'"),
    ({"input": "a", "normalise": True}, "normalise", "did you mean 'normalize'"),
    ({"input": "a", "temperature": 1}, "temperature", "unknown field 'temperature'"),
    ({"input": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens", "it is not supported: a prompt that is"),
    ({"input": "a", "use_activation": True}, "use_activation", "here it is called normalize"),
    ({"input": "a", "priority": 3}, "priority", "priority has no effect"),
    ({"input": "a", "timeout": -1}, "timeout", "timeout must be a number of seconds above 0"),
    ({"input": "a", "cache_salt": ""}, "cache_salt", "cache_salt must be a string that is not empty"),
]


@pytest.mark.parametrize(("body", "param", "said"), REFUSED, ids=[str(body) for body, _, _ in REFUSED])
def test_what_is_wrong_is_refused_by_name(server: Server, body: Any, param: str, said: str) -> None:
    error = error_of(server.post("/v1/embeddings", body))
    assert said in error["message"]
    assert error["param"] == param
    assert not server.engine.added


def test_another_model_is_not_found(server: Server) -> None:
    assert "there is no model 'other'" in error_of(embed(server, "a", model="other"), 404)["message"]


def test_what_the_models_files_ask_for_and_is_not_supported_must_be_named() -> None:
    server = make({"unsupported": "1_Pooling/config.json: pooling cls is not supported"})
    error = error_of(embed(server, "a"))
    assert "pooling cls is not supported; give pooling: 'mean' or 'last'" in error["message"]
    assert found(embed(server, "a", pooling="mean"))


def test_an_engine_that_cannot_pool_says_so() -> None:
    server = Server(says)
    error = error_of(embed(server, "a"))
    assert (error["code"], error["message"]) == ("not_supported", "this engine makes no embeddings")


def test_a_failed_input_fails_the_request_and_aborts_the_others() -> None:
    def answer(request: ClientRequest) -> Answer:
        if request.prompt_token_ids == (2,):
            return Answer(samples=[[]], error=RequestError("bad_logits", "not finite"))
        return Answer(samples=[[]], pooled=[1.0] * SIZE, delay=30.0)

    server = make(answer=answer)
    assert error_of(embed(server, [[1], [2], [3]]), 500)["code"] == "bad_logits"
    assert len({request_id for request_id, _ in server.engine.aborted}) == 2
    [usage] = server.engine.usages
    assert usage.status == 500


def test_an_engine_that_is_gone_is_503() -> None:
    def answer(request: ClientRequest) -> Answer:
        raise EngineUnavailable("the engine is starting")

    assert error_of(embed(make(answer=answer), "a"), 503)["code"] == "unavailable"


def test_an_aborted_request_is_no_vector() -> None:
    server = make(answer=lambda request: Answer(samples=[[]]))  # as if an operator had aborted it
    assert error_of(embed(server, "a"), 503)["code"] == "aborted"


def test_a_keys_secret_salts_the_cache_and_names_the_client() -> None:
    server = make(keys=Keys({hashlib.sha256(b"a-secret-key").digest(): "alice"}))
    for path, body in (("/v1/embeddings", {"input": [1]}), ("/v1/score", {"text_1": [1], "text_2": [2]})):
        assert error_of(server.post(path, body), 401)["code"] == "invalid_api_key"
        assert (
            server.post(path, {**body, "cache_salt": "own"}, headers={"x-api-key": "a-secret-key"}).status_code == 200
        )
        assert server.last.client == "alice"
        assert server.last.params.core.cache_salt not in (None, "own")


# Scores


def scores(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    body = response.json()
    assert set(body) == {"id", "object", "created", "model", "data", "usage"}
    assert all(set(each) == {"object", "index", "score"} and each["object"] == "score" for each in body["data"])
    assert [each["index"] for each in body["data"]] == list(range(len(body["data"])))
    return [each["score"] for each in body["data"]]


def cosine(a: tuple[int, ...], b: tuple[int, ...]) -> Any:
    x, y = np.array(vector(a)), np.array(vector(b))
    return pytest.approx(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)), abs=1e-6)


@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
def test_one_with_one_one_with_each_and_each_with_its_own(server: Server, names: tuple[str, str]) -> None:
    first, second = names
    ids = {text: tuple(server.tokenizer.encode(text)) for text in ("apple", "bean", "corn")}
    a, b, c = ids.values()

    def score(one: Any, other: Any) -> list[float]:
        return scores(server.post("/v1/score", {first: one, second: other}))

    assert score("apple", "bean") == [cosine(a, b)]
    assert score("apple", ["bean", "corn"]) == [cosine(a, b), cosine(a, c)]
    assert score(["apple", "bean"], ["bean", "corn"]) == [cosine(a, b), cosine(b, c)]
    assert score([*a], [[*b], [*c]]) == [cosine(a, b), cosine(a, c)]


def test_each_text_is_computed_and_counted_once(server: Server) -> None:
    response = server.post("/v1/score", {"text_1": [1, 2, 3], "text_2": [[4], [5, 6]], "pooling": "mean"})
    assert response.json()["usage"]["prompt_tokens"] == 6
    assert [(request.prompt_token_ids, request.pooling) for request in server.engine.added] == [
        ((1, 2, 3), "mean"), ((4,), "mean"), ((5, 6), "mean"),
    ]  # fmt: skip
    assert server.engine.usages[0].endpoint == "/v1/score"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "text_1", "give one pair of fields (text_1 and text_2; queries and documents"),
        ({"text_1": "a"}, "text_1", "not text_1"),
        ({"text_1": "a", "documents": "b"}, "documents", "not documents, text_1"),
        ({"text_1": "a", "text_2": "b", "queries": "c"}, "queries", "not queries, text_1, text_2"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "text_1 has 2 entries and text_2 has 3"),
        ({"text_1": "a", "text_2": []}, "text_2", "text_2 has 0 entries"),
        ({"text_1": "a", "text_2": {"content": []}}, "text_2", "text_2 must be text, token ids, or a list of these"),
        ({"text1": "a"}, "text1", "did you mean 'text_1'"),
        ({"text_1": "a", "text_2": "b", "dimensions": 2}, "dimensions", "unknown field 'dimensions'"),
    ],
)
def test_a_wrong_pair_is_refused(server: Server, body: Any, param: str, said: str) -> None:
    error = error_of(server.post("/v1/score", body))
    assert said in error["message"]
    assert error["param"] == param
    assert not server.engine.added


def test_ids_say_what_was_asked_for(server: Server) -> None:
    assert server.post("/v1/embeddings", {"input": "a"}).json()["id"].startswith("embd-")
    assert server.post("/v1/score", {"text_1": "a", "text_2": "b"}).json()["id"].startswith("score-")


def test_the_openapi_page_has_both(server: Server) -> None:
    page = json.loads(server.request("GET", "/openapi.json").text)
    for path, model in (("/v1/embeddings", "EmbeddingRequest"), ("/v1/score", "ScoreRequest")):
        body = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{model}"}
        assert model in page["components"]["schemas"]
