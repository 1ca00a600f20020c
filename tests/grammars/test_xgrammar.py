"""The second grammar backend: its compilation can be killed, and what it would ignore is refused."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import threading
import time
from typing import Any

import pytest

from nanoengine.api import Constraint, GrammarContext, GrammarError
from nanoengine.api.errors import RequestError
from nanoengine.plugins.grammars import register_grammars
from nanoengine.plugins.grammars.plain_regexes import plain_regex
from nanoengine.plugins.grammars.plain_schemas import plain
from nanoengine.testing.byte_tokenizer import END, byte_tokenizer
from nanoengine.testing.conformance import check_grammar_backend

from .support import grammar_llm, params
from .test_backends import EXAMPLES, PERSON

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "patternProperties": {"a": {}}}, "patternProperties"),
        ({"type": "string", "format": "date"}, "format"),
        ({"properties": {"x": {"not": {}}}, "type": "object"}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"minimum": 3}, "minimum without one type"),
        ({"type": ["string", "null"]}, "type without one type"),
        ({"type": "string", "minimum": 3}, "minimum for a string"),
        ({"type": "integer", "enum": [1, "x"]}, "type next to enum"),
        ({"$ref": "#/$defs/a", "minimum": 3}, "minimum next to \\$ref"),
        ({"$ref": "https://example.com/x.json"}, "to another document"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "a length next to pattern"),
        ({"type": "object", "required": ["a"]}, "requires 'a'"),
        ({"type": "strin"}, "unknown type 'strin'"),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, "additionalProperties next to"),
        ({"type": "string", "pattern": "a^b"}, r"\^ inside of it"),
        ({"type": "string", "pattern": '^"$'}, "does not write as JSON"),
        ({"type": "string", "pattern": r"^\\\\$"}, "does not write as JSON"),
        ({"type": "string", "pattern": r"\\n"}, "does not write as JSON"),
    ],
)
def test_what_xgrammar_would_ignore_is_refused_by_name(schema: Any, named: str) -> None:
    with pytest.raises(GrammarError, match=named):
        plain(schema)


def test_what_it_supports_exactly_is_not_refused() -> None:
    plain(PERSON)
    plain({"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"})
    plain({"title": "T", "type": "string", "enum": ["a", "b"], "default": "a"})
    plain({"anyOf": [{"type": "integer", "minimum": 1}, {"const": {"not": 1}}, True]})


def test_a_length_is_written_as_a_pattern_without_control_characters(backend: Any) -> None:
    for schema in ({"type": "string", "maxLength": 3}, {"type": "string", "minLength": 1}):
        grammar = backend.compile(Constraint(kind="json", text=json.dumps(schema)))
        taken = {}
        for text in ('"é"', '"ab"', '"\x01"', '"\t"', '"\n"', '"\\"', '"a"b"', '"abcd"'):
            ids, matcher = TOKENIZER.encode(text).ids, grammar.matcher()
            taken[text] = matcher.consume(ids) == len(ids) and matcher.is_accepting
        for raw in (b'"\xed\xa0\x80"', b'"\xf0\x80\x80\x80"', b'"\xe0\x80\x80"'):  # no UTF-8
            assert grammar.matcher().consume(list(raw)) < len(raw)
        assert [text for text, accepted in taken.items() if accepted] == [
            '"é"',
            '"ab"',
            *['"abcd"'] * ("minLength" in schema),
        ]


@pytest.mark.parametrize("regex", ["$a", "a^b", "x(^a)", "(a$)b", "[[:alpha:]]"])
def test_anchors_and_classes_that_it_takes_more_widely_are_refused(regex: str) -> None:
    with pytest.raises(GrammarError, match="use the backend llguidance"):
        plain_regex(regex)


def test_expressions_that_it_takes_exactly_stay_as_they_are() -> None:
    for regex in ("^a|b$", "^a$|^b$", r"[.^$]\.\$\^", "(a|b)?c{2}"):
        assert plain_regex(regex) == regex
    assert plain_regex("a.[.]") == r"a[^\n][.]"


def test_texts_and_tags_are_what_they_are_for_the_other_backend(backend: Any) -> None:
    texts = ["\U0001f642", "é", '"\\\n', ""]
    grammar = backend.compile(Constraint(kind="choice", text=json.dumps(texts)))
    for text in texts:
        matcher = grammar.matcher()
        assert matcher.consume(list(text.encode())) == len(text.encode())
        assert matcher.is_accepting
    lark = backend.compile(Constraint(kind="grammar", text='root ::= start\nstart ::= "a: b"')).matcher()
    assert lark.consume(list(b"a: b")) == 4
    for tag in ({"begin": "<", "scheme": {}}, {"schema": {}}, 3, {"begin": "<", "end": ["a", "b"]}):
        text = json.dumps({"structures": [tag], "triggers": ["<"]})
        with pytest.raises(GrammarError, match=r"structures\[0\]"):
            backend.compile(Constraint(kind="structural_tag", text=text))


def test_it_is_the_second_choice() -> None:
    order = sorted(register_grammars(), key=lambda spec: -spec.preference)
    assert [spec.name for spec in order] == ["llguidance", "xgrammar"]


@pytest.fixture(scope="module")
def backend() -> Any:
    pytest.importorskip("xgrammar")
    made = made_with(60.0)
    yield made
    made.close()


def made_with(timeout: float) -> Any:
    from nanoengine.plugins.grammars.xgrammar import XGrammar

    end = TOKENIZER.token_to_id(END)
    assert end is not None
    ctx = GrammarContext(tokenizer_json=TOKENIZER.to_str(), vocab_size=320, end_ids=frozenset([end]), timeout=timeout)
    return XGrammar(ctx)


def test_it_passes_the_conformance_kit(backend: Any) -> None:
    refused = [Constraint(kind="regex", text="a("), Constraint(kind="json", text='{"not": {}}'),
               Constraint(kind="json", text="{}", whitespace_pattern=" ")]  # fmt: skip
    check_grammar_backend(type(backend), *EXAMPLES, refused=refused)  # type: ignore[arg-type]


def test_no_invalid_document_is_accepted(backend: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    texts = [{"minLength": 2}, {"maxLength": 2}, {"pattern": "^a"}, {"pattern": "[bc]$"}]
    numbers = [{"minimum": 1}, {"maximum": 5}, {"exclusiveMinimum": 1}, {"exclusiveMaximum": 5}]
    schemas = [{"type": "string", **one, **other} for one, other in itertools.combinations_with_replacement(texts, 2)]
    for kind in ("integer", "number"):
        schemas += [{"type": kind, **one, **other} for one, other in itertools.combinations(numbers, 2)]
    schemas += [{"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, PERSON,
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"type": "array", "prefixItems": [{"type": "integer"}], "items": False}]  # fmt: skip
    documents = [None, 0, 1, 1.5, 5, 6, -1, "", "a", "ab", "abc", "xc", [], [1], [1, 2], [1, 2, 3], ["a"], {}, {"a": 1},
                 {"a": "x"}, {"name": "x", "age": 1}, {"name": "x"}]  # fmt: skip
    accepted = 0
    for schema in schemas:
        try:
            grammar = backend.compile(Constraint(kind="json", text=json.dumps(schema)))
        except GrammarError:
            continue
        for document in documents:
            ids, matcher = TOKENIZER.encode(json.dumps(document)).ids, grammar.matcher()
            if matcher.consume(ids) == len(ids) and matcher.is_accepting:
                accepted += 1
                assert jsonschema.Draft202012Validator(schema).is_valid(document), (schema, document)
    assert accepted > 30


def test_a_compilation_that_takes_too_long_is_killed(backend: Any) -> None:
    """The child is stopped, as one that computes for ever; its place is taken by another one."""
    backend.compile(Constraint(kind="regex", text="a"))
    (child,) = backend._idle
    os.kill(child._process.pid, signal.SIGSTOP)
    ctx, backend._ctx = (
        backend._ctx,
        GrammarContext(tokenizer_json="", vocab_size=320, end_ids=frozenset(), timeout=0.1),
    )
    try:
        with pytest.raises(RequestError, match=r"longer than 0.1 s.*structured_outputs.timeout") as caught:
            backend.compile(Constraint(kind="regex", text="b"))
    finally:
        backend._ctx = ctx
    assert caught.value.code == "prepare_timeout"
    assert child._process.poll() == -signal.SIGKILL
    assert backend.compile(Constraint(kind="regex", text="b")).matcher().consume([ord("b")]) == 1


def test_a_child_that_dies_is_the_error_of_one_constraint(backend: Any) -> None:
    backend.compile(Constraint(kind="regex", text="a"))
    backend._idle[-1]._process.kill()
    with pytest.raises(GrammarError, match="ended its process"):
        backend.compile(Constraint(kind="regex", text="c"))
    assert backend.compile(Constraint(kind="regex", text="c")).matcher().consume([ord("c")]) == 1


def test_close_ends_its_processes(backend: Any) -> None:
    made = made_with(60.0)
    threads = [threading.Thread(target=made.compile, args=[Constraint(kind="regex", text=t)]) for t in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    children = [child._process for child in made._idle]
    made.close()
    made.close()
    end = time.monotonic() + 100
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        time.sleep(0.01)
    assert [child.returncode for child in children] == [-signal.SIGKILL] * len(children)
    assert 1 <= len(children) <= 2
    with pytest.raises(GrammarError, match="closed"):
        made.compile(Constraint(kind="regex", text="a"))
    assert all(isinstance(child, subprocess.Popen) for child in children)


def test_the_engine_uses_it_where_it_is_chosen(tmp_path: Any) -> None:
    pytest.importorskip("xgrammar")
    with grammar_llm(tmp_path, structured_outputs={"backend": "xgrammar"}) as llm:
        wrong, *fine = llm.generate(
            [[1], [2], [3]],
            [params({"json": {"not": {}}}),
             params({"json": PERSON, "disable_any_whitespace": True}, temperature=2, seed=1),
             params({"choice": ["yes", "no"]}, n=3, temperature=2)],
        )  # fmt: skip
        assert wrong.error is not None
        assert "not" in str(wrong.error)
        assert json.loads(fine[0].outputs[0].text).keys() == {"name", "age"}
        assert {sample.text for sample in fine[1].outputs} <= {"yes", "no"}
        assert llm.stats().grammars.compiled_in_steps == 0
