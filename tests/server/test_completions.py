"""/v1/completions: fields, forms of prompts, echo and log-probs, streamed and whole."""

from __future__ import annotations

from typing import Any

import pytest

from server.support import Server, choices, error_of, events, joined


@pytest.fixture(scope="module")
def server() -> Server:
    return Server("Hello world")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("hi", ["hi"]), ([104, 105], ["hi"]), (["hi", "you"], ["hi", "you"]), ([[104, 105], [121]], ["hi", "y"]),
     (["hi", [121]], ["hi", "y"])],
)  # fmt: skip
def test_prompts_are_text_ids_or_lists_of_them(server: Server, prompt: Any, texts: list[str], stream: bool) -> None:
    before = len(server.engine.added)
    response = server.complete(prompt, n=2, echo=True, stream=stream)
    assert [server.tokenizer.decode([*r.prompt_token_ids]) for r in server.engine.added[before:]] == texts
    found = (
        [joined(events(response), index) for index in range(2 * len(texts))]
        if stream
        else [choice["text"] for choice in response.json()["choices"]]
    )
    assert found == [text + "Hello world" for text in texts for _ in range(2)]


@pytest.mark.parametrize(
    "prompt", [None, [], 7, {"a": 1}, [True], [1.5], [["a"]], [[104, "i"]], ["hi", 3], [[]], "", [-1], [10**9], [2**70]]
)
def test_a13_what_is_no_prompt_is_refused(server: Server, prompt: Any) -> None:
    before = len(server.engine.added)
    error_of(server.complete(prompt))
    assert len(server.engine.added) == before


def test_a13_an_id_outside_the_vocabulary_is_named(server: Server) -> None:
    assert "999999" in error_of(server.complete([1, 999999]))["message"]


def test_a17_echo_with_max_tokens_0_gives_the_prompt_and_its_log_probs(server: Server) -> None:
    for stream in (False, True):
        response = server.complete("hey", max_tokens=0, echo=True, logprobs=2, stream=stream)
        assert server.last.params.core.max_tokens == 1
        if stream:
            parts = choices(events(response))
            assert joined(events(response)) == "hey"
            assert parts[-1]["finish_reason"] == "length"
            logprobs = next(part["logprobs"] for part in parts if part["logprobs"])
        else:
            [choice] = response.json()["choices"]
            assert (choice["text"], choice["finish_reason"]) == ("hey", "length")
            assert response.json()["usage"]["completion_tokens"] == 0
            logprobs = choice["logprobs"]
        assert logprobs["tokens"] == ["h", "e", "y"]
        assert logprobs["token_logprobs"] == [None, *(pytest.approx(-ord(c) / 100) for c in "ey")]
        assert logprobs["text_offset"] == [0, 1, 2]
        assert logprobs["top_logprobs"][0] is None
        assert [len(each) for each in logprobs["top_logprobs"][1:]] == [3, 3]


def test_a17_echo_gives_log_probs_of_prompt_and_output_in_one_list(server: Server) -> None:
    whole = server.complete("hey", echo=True, logprobs=1).json()["choices"][0]["logprobs"]
    parts = [part["logprobs"] for part in choices(events(server.complete("hey", echo=True, logprobs=1, stream=True)))]
    streamed = {key: [each for part in parts if part for each in part[key]] for key in whole}
    assert streamed == whole
    assert "".join(whole["tokens"]) == "heyHello world<end>"
    assert whole["text_offset"] == [*range(15)]


def test_logprobs_0_are_those_of_the_tokens_alone(server: Server) -> None:
    [choice] = server.complete(logprobs=0).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] is None
    assert len(choice["logprobs"]["token_logprobs"]) == 12


def test_token_ids_and_prompt_log_probs_are_returned_if_asked_for(server: Server) -> None:
    fields = {"return_token_ids": True, "prompt_logprobs": 1, "return_tokens_as_token_ids": True, "logprobs": 0}
    [whole] = server.complete("hey", **fields).json()["choices"]
    parts = choices(events(server.complete("hey", stream=True, **fields)))
    assert whole["prompt_token_ids"] == [104, 101, 121] == parts[0]["prompt_token_ids"]
    assert whole["token_ids"] == server.ids("Hello world") == [i for p in parts for i in p.get("token_ids", [])]
    assert whole["prompt_logprobs"] == parts[0]["prompt_logprobs"]
    assert whole["prompt_logprobs"][0] is None
    assert set(whole["prompt_logprobs"][1]) == {"0", "101"}
    assert whole["logprobs"]["tokens"][0] == "token_id:72"


def test_sampling_parameters_reach_the_engine(server: Server) -> None:
    server.complete(
        temperature=0.5, top_k=4, seed=7, stop=["x"], stop_token_ids=[5], ignore_eos=True, min_tokens=1, max_tokens=9,
        logit_bias={"5": -100, "6": 1.5}, acme_strength=3, priority=None, bad_words=["b"],
    )  # fmt: skip
    params = server.last.params
    assert (params.temperature, params.top_k, params.seed, params.stop) == (0.5, 4, 7, ["x"])
    assert (params.stop_token_ids, params.ignore_eos, params.min_tokens, params.max_tokens) == ([5], True, 1, 9)
    assert (params.logit_bias, params.acme_strength, params.bad_words) == ({5: -100, 6: 1.5}, 3, ["b"])


def test_defaults_are_those_of_the_configuration_or_of_openai() -> None:
    server = Server(info={"default_sampling": {"temperature": 0.2, "top_p": 0.9}})
    server.complete(top_p=0.5)
    assert (server.last.params.temperature, server.last.params.top_p, server.last.params.max_tokens) == (0.2, 0.5, 16)
    server.chat()
    assert server.last.params.max_tokens is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_its_sample(stream: bool) -> None:
    server = Server(["one STOP two", "three"], chunk=3)
    response = server.complete(n=2, stop="STOP", stream=stream)
    if stream:
        parts = events(response)
        assert [joined(parts, index) for index in range(2)] == ["one ", "three"]
        ends = [choices(parts, index)[-1] for index in range(2)]
    else:
        ends = response.json()["choices"]
        assert [each["text"] for each in ends] == ["one ", "three"]
        assert response.json()["usage"]["completion_tokens"] == len("one STOP") + len("three") + 1
    assert [(each["finish_reason"], each["stop_reason"]) for each in ends] == [("stop", "STOP"), ("stop", None)]
    assert (server.last.request_id, 0) in server.engine.aborted


@pytest.mark.parametrize("include", [False, True])
def test_a39_text_is_whole_characters_however_tokens_split_them(include: bool) -> None:
    text = "Grüße 😀!"
    server = Server(text)
    response = server.complete(stream=True, stop="!" if include else None, include_stop_str_in_output=include or None)
    parts = [choice["text"] for choice in choices(events(response))]
    assert "".join(parts) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert len(parts) > 6
