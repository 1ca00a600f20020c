"""Errors speak of the fields that the client sent; and no value of a field is read as one of another kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from nanoengine.api.errors import GrammarError, ParamsError, RequestError
from nanoengine.params.pooling import PoolingDefaults
from nanoengine.server.protocol.base import RequestModel
from nanoengine.service.client import ClientRequest
from nanoengine.testing.fake_engine import Answer
from server.support import Server, error_of

WRONG = [True, 0, 1, 1.0, 0.0, "1", "false", "", [], {}]
"""Values of JSON's kinds."""
CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
TURN: Mapping[str, Any] = {"role": "user", "content": "a"}
ASKED: Mapping[str, Mapping[str, Any]] = {
    CHAT: {"messages": [TURN]},
    COMPLETIONS: {"prompt": "a"},
    MESSAGES: {"messages": [TURN], "max_tokens": 9},
    RESPONSES: {"input": "a"},
}
SCHEMA = {"type": "object"}
TOOL = {"name": "f", "description": "d"}


@pytest.fixture(scope="module")
def server() -> Server:
    return Server(info={"pooling": PoolingDefaults(size=4)})


def kinds_of(annotation: Any) -> set[Any]:
    """The kinds of values that a field of this type takes."""
    if annotation is Any:
        return {bool, int, float, str, list, dict}
    if isinstance(annotation, type) and issubclass(annotation, RequestModel):
        return {dict}
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {*parts}  # only these values
    if origin is Annotated:
        return kinds_of(parts[0])
    if origin in (list, dict):
        return {origin}
    return set().union(*map(kinds_of, parts)) if parts else {annotation}


def request_models(model: type[RequestModel] = RequestModel) -> Iterator[type[RequestModel]]:
    for each in model.__subclasses__():
        yield each
        yield from request_models(each)


@pytest.mark.parametrize("model", list(dict.fromkeys(request_models())), ids=lambda model: model.__name__)
def test_no_value_is_read_as_one_of_another_kind(model: type[RequestModel]) -> None:
    """0 is not false, "1" is no number and true no 1; a whole number may be given where a fraction may."""
    blank, checks = model.model_construct(), model.__pydantic_validator__
    for name, field in model.model_fields.items():
        kinds = kinds_of(field.annotation)
        for value in WRONG:
            try:
                checks.validate_assignment(blank, name, value)
            except ValidationError:
                continue
            allowed = type(value) in kinds or (type(value) is int and float in kinds)
            assert allowed or (isinstance(value, str) and value in kinds), (name, value)


def tool_result(**fields: Any) -> list[dict[str, Any]]:
    called = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    found = {"type": "tool_result", "tool_use_id": "t", **fields}
    return [TURN, {"role": "assistant", "content": [called]}, {"role": "user", "content": [found]}]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"store": 0}, "store"),
        (CHAT, {"store": True}, "store"),
        (CHAT, {"add_special_tokens": 0}, "add_special_tokens"),
        (CHAT, {"stream": True, "stream_options": {"include_obfuscation": 0}}, "stream_options.include_obfuscation"),
        (CHAT, {"messages": [{"role": "user", "content": 0}]}, "messages[0].content"),
        (CHAT, {"messages": [TURN, {"role": "user"}]}, "messages[1]"),
        (RESPONSES, {"store": 0}, "store"),
        (RESPONSES, {"input": [{"type": "reasoning", "content": 0}]}, "input[0].content"),
        (COMPLETIONS, {"prompt": [1, 10**6]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [[1], [2, -1]]}, "prompt[1][1]"),
        (COMPLETIONS, {"prompt": [[1], []]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": ["a", "b" * 5000]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": "b" * 5000}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "b" * 5000}]}, "messages"),
        (RESPONSES, {"input": "b" * 5000}, "input"),
        ("/v1/embeddings", {"input": [[1], [2, -1]]}, "input[1][1]"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", "b" * 5000]}, "text_2[1]"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (CHAT, {"guided_choice": []}, "guided_choice"),
        (CHAT, {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        (CHAT, {"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens"),
        (RESPONSES, {"max_output_tokens": 4096}, "max_output_tokens"),
        (RESPONSES, {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        (RESPONSES, {"tools": [{"type": "function", **TOOL}] * 2}, "tools[1]"),
        (RESPONSES, {"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_is_wrong_is_named_as_the_client_calls_it(
    server: Server, path: str, fields: Mapping[str, Any], param: str
) -> None:
    error = error_of(server.post(path, {**ASKED.get(path, {}), **fields}))
    assert error["param"] == param, error
    if "structured_outputs" in fields and "response_format" in fields:
        assert error["message"].startswith("response_format and structured_outputs say")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"stop_sequences": [""]}, "stop_sequences must be"),
        ({"messages": tool_result(is_error="false")}, "messages[2].content[0].is_error must be"),
        ({"messages": tool_result(content=0)}, "messages[2].content[0].content must be"),
        ({"tools": [{**TOOL, "input_schema": {}}] * 2}, "tools[1]: there are two"),
    ],
)
def test_messages_have_no_param_so_the_words_name_the_field(
    server: Server, fields: Mapping[str, Any], words: str
) -> None:
    response = server.post(MESSAGES, {**ASKED[MESSAGES], **fields})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields", "raised", "param"),
    [
        (COMPLETIONS, {"acme_strength": -1}, "acme_strength must be 0 or more, not -1", "acme_strength"),
        (CHAT, {"bad_words": ["x"]}, "bad_words: the tokenizer makes no tokens of 'x'", "bad_words"),
        (CHAT, {"top_k": 1, "top_p": 2}, "top_k, top_p: they contradict", "top_k"),
        (CHAT, {}, "the model said no", None),
        (CHAT, {}, "some_word is no field", None),
        (RESPONSES, {"top_p": 2}, "top_p must be from 0 to 1, not 2", "top_p"),
        (RESPONSES, {"max_output_tokens": 5}, "max_tokens is 5, too many", "max_output_tokens"),
        (RESPONSES, {"reasoning": {"effort": "low"}}, "reasoning_effort: no", "reasoning.effort"),
        (CHAT, {"guided_regex": "a"}, "structured_outputs.regex is wrong", "guided_regex"),
        (CHAT, {"structured_outputs": {"regex": "a"}}, "structured_outputs.regex is wrong", "structured_outputs.regex"),
        (
            RESPONSES,
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}},
            "structured_outputs.json is wrong",
            "text.format.schema",
        ),
        (
            RESPONSES,
            {"instructions": "i", "input": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "messages[2]['content'] is wrong",
            "input[1].content",
        ),
        (RESPONSES, {"instructions": "i"}, "messages[0] is wrong", "instructions"),
    ],
)
def test_a_refusal_of_the_engine_names_the_clients_field(
    path: str, fields: Mapping[str, Any], raised: str, param: str | None
) -> None:
    def says(request: ClientRequest) -> Answer:
        raise ParamsError(raised)

    error = error_of(Server(says).post(path, {**ASKED[path], **fields}))
    assert error["param"] == param
    if param is not None:
        assert error["message"].startswith(param), error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"guided_grammar": "a"}, "guided_grammar"),
        (CHAT, {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (RESPONSES, {"text": {"format": {"type": "json_object"}}}, "text.format"),
    ],
)
def test_a_constraint_that_cannot_be_made_is_a_mistake_in_its_field(
    path: str, fields: Mapping[str, Any], param: str
) -> None:
    def says(request: ClientRequest) -> Answer:
        return Answer(samples=[[1]], error=GrammarError("llguidance: something is not supported"))

    error = error_of(Server(says).post(path, {**ASKED[path], **fields}))
    assert (error["param"], error["code"]) == (param, "invalid_grammar")


def test_an_error_that_is_not_the_clients_has_no_param() -> None:
    def says(request: ClientRequest) -> Answer:
        raise RequestError("out_of_memory", "prompt computing ran out of memory")

    assert error_of(Server(says).complete(), 500)["param"] is None
