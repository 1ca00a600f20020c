"""`StructuredOutputsParams` and the engine's options: what is checked before a request runs, and how it is reported."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nanoengine import ConfigError, ParamsError, SamplingParams, StructuredOutputsParams
from nanoengine.api.json_schema import close_objects, map_schemas
from nanoengine.params.engine_options import StructuredOutputsOptions
from nanoengine.params.field_types import conform
from nanoengine.setup.config.engine_options import engine_options


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, structural_tag: none is given"),
        ({"json": {}, "regex": "a"}, "json and regex are given"),
        ({"json_object": False}, "none is given"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": [1]}, "must be a JSON schema: a mapping"),
        ({"json": "12"}, "must be a JSON schema: an object"),
        ({"json": {"const": {1, 2}}}, "pydantic"),
        ({"json": {"const": float("nan")}}, "json is no JSON"),
        ({"json": {"const": "\ud800"}}, "json is no JSON"),
        ({"choice": []}, "at least one text"),
        ({"grammar": "  "}, "grammar is empty"),
        ({"structural_tag": "[]"}, "structural_tag must be a JSON object"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace is for JSON"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "whitespace_pattern is for JSON"),
        ({"grammar": "a", "disable_additional_properties": True}, "disable_additional_properties is for JSON"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "contradict"),
    ],
)
def test_what_cannot_be_right_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        StructuredOutputsParams(**fields)


def test_each_kind_becomes_a_constraint() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    for json_ in (schema, json.dumps(schema)):
        constraint = StructuredOutputsParams(json=json_, whitespace_pattern=" ").constraint()
        assert (constraint.kind, json.loads(constraint.text)) == ("json", schema)
        assert list(json.loads(constraint.text)["properties"]) == ["b", "a"], "the order of properties is kept"
        assert (constraint.any_whitespace, constraint.whitespace_pattern) == (True, " ")
    assert json.loads(StructuredOutputsParams(json_object=True).constraint().text) == {"type": "object"}
    assert not StructuredOutputsParams(json_object=True, disable_any_whitespace=True).constraint().any_whitespace
    assert StructuredOutputsParams(choice=["a", "é"]).constraint().text == '["a", "é"]'
    assert StructuredOutputsParams(regex="").constraint().kind == "regex"
    assert StructuredOutputsParams(grammar="start: x").constraint().text == "start: x"


def test_additional_properties_are_closed_where_the_schema_says_nothing() -> None:
    schema = {
        "properties": {"properties": {"type": "object", "properties": {"x": {}}}, "open": {"properties": {}}},
        "anyOf": [{"properties": {"y": {}}, "additionalProperties": {"type": "string"}}, {"type": "string"}],
        "enum": [{"properties": {}}],
        "$defs": {"d": {"items": {"properties": {}}}},
    }
    closed = close_objects(schema)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["properties"]["additionalProperties"] is False
    assert closed["anyOf"][0]["additionalProperties"] == {"type": "string"}
    assert "additionalProperties" not in closed["anyOf"][1]
    assert closed["enum"] == schema["enum"]
    assert closed["$defs"]["d"]["items"]["additionalProperties"] is False
    assert "additionalProperties" not in schema, "the caller's schema is not changed"
    constraint = StructuredOutputsParams(json=schema, disable_additional_properties=True).constraint()
    assert json.loads(constraint.text) == closed
    tag = {"structures": [{"begin": "<", "schema": {"properties": {}}, "end": ""}], "triggers": ["<"]}
    tags = StructuredOutputsParams(structural_tag=tag, disable_additional_properties=True).constraint()
    assert json.loads(tags.text)["structures"][0]["schema"]["additionalProperties"] is False


def test_every_place_of_a_schema_is_visited() -> None:
    keys = ["not", "if", "then", "else", "contains", "propertyNames", "items", "additionalProperties"]
    schema: dict[str, Any] = {key: {"mark": 0} for key in keys}
    schema |= {key: [{"mark": 0}, True] for key in ("allOf", "anyOf", "oneOf", "prefixItems")}
    schema |= {key: {"n": {"mark": 0}} for key in ("$defs", "definitions", "patternProperties", "dependentSchemas")}
    schema |= {"const": {"mark": 0}, "default": {"mark": 0}, "examples": [{"mark": 0}]}
    seen = map_schemas(schema, lambda each: {**each, "mark": 1} if "mark" in each else each)
    text = json.dumps(seen)
    assert text.count('"mark": 1') == len(keys) + 8
    assert text.count('"mark": 0') == 3


def test_equal_parameters_are_equal_and_hashable() -> None:
    one, other = ({"json": {"properties": {"a": {}}}, "reasoning": "</think>"} for _ in range(2))
    assert StructuredOutputsParams(**one) == StructuredOutputsParams(**other)
    params = [SamplingParams(structured_outputs=StructuredOutputsParams(**one)) for _ in range(2)]
    assert params[0].key == params[1].key
    assert params[0].key != SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")).key


def test_a_mapping_becomes_the_parameters() -> None:
    kind = StructuredOutputsParams | None
    given = {"json": {"type": "object"}, "disable_any_whitespace": True}
    assert conform("structured_outputs", given, kind) == StructuredOutputsParams(**given)
    with pytest.raises(ParamsError, match=r"^structured_outputs has no key 'jsn'; did you mean 'json'"):
        conform("structured_outputs", {"jsn": {}}, kind)
    with pytest.raises(ParamsError, match=r"^structured_outputs\.regex must be a string, or None, not 3$"):
        conform("structured_outputs", {"regex": 3}, kind)
    with pytest.raises(ParamsError, match="json and regex are given"):
        conform("structured_outputs", {"json": {}, "regex": "a"}, kind)


WRONG_TYPES: list[dict[str, Any]] = [
    {"choice": "yes"},  # three texts, if it were taken as a list
    {"choice": [1, 2]},
    {"choice": {"a": 1}},
    {"choice": 5},
    {"regex": 3},
    {"grammar": b"start: x"},
    {"json": [1]},
    {"json": StructuredOutputsParams},
    {"json_object": "yes"},
    {"json_object": 1},
    {"structural_tag": 3},
    {"reasoning": True, "regex": "a"},
    {"whitespace_pattern": 3, "json": {}},
    {"disable_any_whitespace": "no", "json": {}},
    {"disable_additional_properties": "no", "json": {}},
]


@pytest.mark.parametrize("given", WRONG_TYPES)
def test_a_wrong_type_is_an_error_in_an_object_as_in_a_mapping(given: dict[str, Any]) -> None:
    message = rf"^structured_outputs\.{next(iter(given))} must be "
    with pytest.raises(ParamsError, match=message):
        StructuredOutputsParams(**given)
    with pytest.raises(ParamsError, match=message):
        conform("structured_outputs", given, StructuredOutputsParams | None)


def test_a_pydantic_class_is_answered_with_what_to_give() -> None:
    with pytest.raises(ParamsError, match=r"Model\.model_json_schema\(\)"):
        StructuredOutputsParams(json=type("City", (), {}))  # type: ignore[arg-type]


def test_the_options_of_the_engine() -> None:
    options = engine_options({"structured_outputs": {"backend": "llguidance", "timeout": 3}})
    assert options.structured_outputs == StructuredOutputsOptions(backend="llguidance", timeout=3.0)
    for wrong, message in (
        ({"backnd": "x"}, "structured_outputs has no key 'backnd'; did you mean 'backend'"),
        ({"timeout": 0}, "structured_outputs.timeout is in seconds and must be above 0"),
        ({"max_bytes": 0}, "structured_outputs.max_bytes must be from 1"),
        ("xgrammar", "a mapping of backend, timeout"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine_options({"structured_outputs": wrong})
