"""What a constraint lets through is what its parser reads: by random texts of each constraint, and by goldens."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from nanoengine import StructuredOutputsParams
from nanoengine.api import Grammar, GrammarContext, Tool
from nanoengine.plugins.grammars.llguidance import LLGuidance
from nanoengine.testing.byte_tokenizer import END, byte_tokenizer

from .support import PARSERS, calls_of, content_of, parsed

WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 3},
            "days": {"type": "integer", "minimum": 0, "maximum": 99},
            "at": {"$ref": "#/$defs/Place"},
        },
        "required": ["city", "at"],
        "additionalProperties": False,
        "$defs": {"Place": {"type": "array", "items": {"enum": [True, None, 1.5, "x"]}, "maxItems": 2}},
    },
)
TIME = Tool(name="get_time", parameters={"type": "object", "properties": {}, "additionalProperties": False})
TOOLS = (WEATHER, TIME)
SPECIAL = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")
NONE = ("qwen3_coder",)  # cannot be constrained
AUTO = ("hermes", "mistral", "mistral_list")


def tokenizer_of(*, special: bool) -> Tokenizer:
    found = byte_tokenizer()
    if special:
        found.add_special_tokens(list(SPECIAL))
    return found


def compiled(value: Mapping[str, Any] | None, tokenizer: Tokenizer) -> Grammar:
    assert value is not None
    ctx = GrammarContext(
        tokenizer_json=tokenizer.to_str(), vocab_size=320, end_ids=frozenset([tokenizer.token_to_id(END)]), timeout=60
    )
    space = {} if "grammar" in value else {"whitespace_pattern": "[ ]?"}
    return LLGuidance(ctx).compile(StructuredOutputsParams(**value, **space).constraint())


def random_text(grammar: Grammar, tokenizer: Tokenizer, draw: random.Random, most: int = 400) -> tuple[str, bool]:
    """A text of the grammar, and whether it is complete."""
    matcher, ids, out = grammar.matcher(), list[int](), np.zeros(10, np.int32)
    while len(ids) < most and not (matcher.is_accepting and draw.random() < 0.3):
        matcher.mask(out)
        allowed = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little"))
        allowed = allowed[allowed != tokenizer.token_to_id(END)]
        if not len(allowed):
            break
        common = [i for i in allowed if 32 <= i < 127 or i > 255]
        ids.append(int(draw.choice(common or list(allowed))))
        assert matcher.consume(ids[-1:]) == 1
    return tokenizer.decode(ids, skip_special_tokens=False), matcher.is_accepting


def check(calls: Sequence[tuple[str, str]]) -> None:
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), schemas[name])


@pytest.mark.parametrize("parser", sorted(set(PARSERS) - set(NONE)))
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("special", [True, False])
def test_a_required_call_is_read_as_it_was_constrained(parser: str, parallel: bool, special: bool) -> None:
    tokenizer, draw = tokenizer_of(special=special), random.Random(0)
    grammar = compiled(PARSERS[parser].constraint(TOOLS, required=True, parallel=parallel), tokenizer)
    most = 0
    for _ in range(30):
        text, complete = random_text(grammar, tokenizer, draw)
        if not complete:
            continue
        events = parsed(parser, [text], TOOLS)
        calls = calls_of(events)
        check(calls)
        most = max(most, len(calls))
        assert calls, text
        assert content_of(events).strip() == "", text
        assert parallel or len(calls) == 1, text
    assert most > (1 if parallel and parser != "llama3" else 0)


@pytest.mark.parametrize("parser", AUTO)
def test_free_text_may_come_before_a_call_that_is_not_required(parser: str) -> None:
    tokenizer = tokenizer_of(special=True)
    value = PARSERS[parser].constraint(TOOLS, required=False, parallel=True)
    grammar = compiled(value, tokenizer)
    calls = {
        "hermes": '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
        "mistral": "[TOOL_CALLS]get_time[ARGS]{}",
        "mistral_list": '[TOOL_CALLS] [{"name": "get_time", "arguments": {}}]',
    }
    assert accepts(grammar, tokenizer, "Hello [x] <y>")
    assert accepts(grammar, tokenizer, f"Hello {calls[parser]}")
    assert accepts(grammar, tokenizer, calls[parser] * 2) == (parser != "mistral_list")  # one list has all its calls
    between = "\n" if parser == "hermes" else ""
    assert not accepts(grammar, tokenizer, f"Hello {calls[parser].replace('get_time', 'get_tim')}")
    required = compiled(PARSERS[parser].constraint(TOOLS, required=True, parallel=True), tokenizer)
    assert not accepts(required, tokenizer, "Hello")
    assert not accepts(required, tokenizer, f"{calls[parser]} and")
    assert accepts(required, tokenizer, calls[parser])
    assert accepts(required, tokenizer, calls[parser] + between + calls[parser]) == (parser != "mistral_list")
    one = compiled(PARSERS[parser].constraint(TOOLS, required=False, parallel=False), tokenizer)
    assert accepts(one, tokenizer, f"Hello {calls[parser]}")
    assert accepts(one, tokenizer, "Hello")
    assert not accepts(one, tokenizer, calls[parser] * 2)


@pytest.mark.parametrize("parser", sorted(set(PARSERS) - set(AUTO)))
def test_forms_without_a_trigger_leave_free_text_alone(parser: str) -> None:
    assert PARSERS[parser].constraint(TOOLS, required=False, parallel=True) is None


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    ids, matcher = tokenizer.encode(text).ids, grammar.matcher()
    return matcher.consume(ids) == len(ids) and matcher.is_accepting


ODD: list[Any] = [
    *({"properties": value} for value in (5, None, [], {"city": 5}, {"a b": {}}, {"city": True})),
    *({"properties": {"city": {key: 5}}} for key in ("type", "anyOf", "enum", "properties", "$ref")),
    *({"required": value} for value in (5, ["other"], [[1]])),
    {"properties": {"city": {"anyOf": [5, {"type": 3}], "type": ["string", 5], "enum": [{}]}}},
    {"$defs": 3, "type": 7},
]


@pytest.mark.parametrize("parser", sorted(PARSERS))
@pytest.mark.parametrize("schema", ODD, ids=str)
def test_a_schema_that_is_none_is_left_to_the_grammar_backend(parser: str, schema: Any) -> None:
    tools = [Tool(name="get_weather", parameters=schema)]
    for required in (True, False):
        PARSERS[parser].constraint(tools, required=required, parallel=True)
    text = "<function=get_weather><parameter=city>x</parameter></function>"
    assert content_of(parsed(parser, [text], tools)) == ("" if parser == "qwen3_coder" else text)
