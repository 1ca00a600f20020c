"""Schemas of others: nothing invalid is accepted, what is not supported is named, and how long it takes is printed."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from nanoengine.api import Constraint, Grammar, GrammarError
from nanoengine.testing.byte_tokenizer import byte_tokenizer

from .corpus import SAMPLE, public_schemas, suite
from .test_backends import backend

jsonschema = pytest.importorskip("jsonschema")

TOKENIZER = byte_tokenizer()
DIALECTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}


def accepts(grammar: Grammar, document: Any) -> bool:
    try:
        ids = TOKENIZER.encode(json.dumps(document, ensure_ascii=False)).ids
    except UnicodeEncodeError:  # half of a surrogate pair
        ids = TOKENIZER.encode(json.dumps(document)).ids
    matcher = grammar.matcher()
    return matcher.consume(ids) == len(ids) and matcher.is_accepting


def compiled(schema: Any) -> Grammar:
    return backend().compile(Constraint(kind="json", text=json.dumps(schema)))


def percentiles(name: str, seconds: list[float]) -> None:
    shown = ", ".join(f"p{p} {1e3 * np.percentile(seconds, p):.3g}" for p in (50, 90, 99, 100))
    print(f"{name} (ms, {len(seconds)}): {shown}")


DOCUMENTS: list[Any] = [  # properties in the order of the schemas: a grammar has them in this order
    None, True, 0, 9, 300, 0.5, -21, 1.0, "", "ab", "AB123", "2024-02-29", "2023-02-29", "red", "nope", "abcdefg", [],
    [1, 2], [True, "a"], [True, "a", 1], {}, {"ok": True}, {"name": "x", "ok": True}, {"ok": 1}, {"a": None}, {"b": 1},
    {"b": 2}, {"x1": True}, {"x1": True, "y": 1}, {"id": "q"}, {"left": "a"}, {"right": "a"},
    {"value": True, "next": None}, {"value": True, "next": {"value": False, "next": None}}, {"value": True, "next": 1},
    {"tool": "open", "arguments": {"query": "x"}}, {"tool": "open", "arguments": {"query": "x", "limit": 51}},
    {"kind": "ping", "to": ["a", "b"]}, {"deep": [True]},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SAMPLE)))
def test_the_sample_accepts_exactly_what_is_valid(number: int) -> None:
    schema = SAMPLE[number]
    check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    grammar = compiled(schema)
    for document in DOCUMENTS:
        if document == 1.0 and isinstance(document, float):
            continue  # an integer to JSON Schema, but none in the notation that a grammar has for it
        assert accepts(grammar, document) == check.is_valid(document), document


@pytest.mark.corpus
@pytest.mark.parametrize("draft", DIALECTS)
def test_the_official_suite(draft: str) -> None:
    """No invalid document of the suite is accepted; the reasons of refusals are printed."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    wrong = []
    for name, schema, tests in suite(draft):
        if isinstance(schema, dict):  # the older drafts' files do not say of which draft they are
            schema = {"$schema": DIALECTS[draft], **schema}
        try:
            grammar = compiled(schema)
        except GrammarError as error:
            counts["schemas refused"] += 1
            reasons[re.sub(r"'.*?'|https?://\S+|\d[\d.e+-]{3,}", "…", str(error).partition(": ")[2])[:60]] += 1
            continue
        counts["schemas compiled"] += 1
        for test in tests:
            accepted = accepts(grammar, test["data"])
            if accepted and not test["valid"]:
                wrong.append(f"{name}: {test['description']}")
            counts["valid refused" if test["valid"] and not accepted else "right"] += 1
    print(f"\n{draft}: {dict(counts)}")
    for reason, count in reasons.most_common(12):
        print(f"  {count:4d} {reason}")
    assert wrong == []
    assert counts["schemas compiled"] > 100


@pytest.mark.corpus
def test_300_public_schemas_compile_or_are_refused_by_name() -> None:
    schemas = public_schemas()
    assert len(schemas) == 300
    made = backend()
    refused: Counter[str] = Counter()
    seconds, masks, wrong = [], [], []
    for name, schema in schemas:
        start = time.perf_counter()
        try:
            grammar = made.compile(Constraint(kind="json", text=json.dumps(schema)))
        except GrammarError as error:
            refused[re.sub(r"'.*?'|https?://\S+", "…", str(error).partition(": ")[2])[:60]] += 1
            continue
        finally:
            seconds.append(time.perf_counter() - start)
        check = jsonschema.validators.validator_for(schema)(schema)
        for document in (*DOCUMENTS, *schema.get("examples", ()), schema.get("default")):
            if accepts(grammar, document) and not check.is_valid(document):
                wrong.append((name, document))
        out, matcher = np.zeros(10, np.int32), grammar.matcher()
        for token in TOKENIZER.encode('{"').ids:
            start = time.perf_counter()
            matcher.mask(out)
            masks.append(time.perf_counter() - start)
            matcher.consume([token])
    print(f"\n{len(schemas)} schemas, {sum(refused.values())} refused")
    for reason, count in refused.most_common(15):
        print(f"  {count:4d} {reason}")
    percentiles("compile and first mask", seconds)
    percentiles("mask", masks)
    assert wrong == []
    assert sum(refused.values()) < 150
