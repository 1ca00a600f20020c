"""Constraints made to hurt: whatever they are, they compile or are refused, soon, and harm no other request."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLExecutor

from nanoengine import SamplingParams, StructuredOutputsParams
from nanoengine.api import Constraint, GrammarError

from .corpus import SAMPLE
from .support import grammar_llm, params
from .test_backends import EXAMPLES, TAGS, TOKENIZER, backend
from .test_state import by_threads

TEXTS = {
    "json": [json.dumps(schema) for schema in SAMPLE],
    "regex": ["^[A-Z]{2}[0-9]+(a|b)*$", "(x|y){2,5}\\d", '[^"\\\\]*'],
    "grammar": ['start: "(" start ")" | /[a-z]+/', 'root ::= "a" [0-9]+ | "b" root'],
    "structural_tag": [json.dumps(TAGS)],
}


def spoiled(text: str, rng: random.Random) -> str:
    """A copy with a few places changed, removed, doubled or exchanged."""
    for _ in range(rng.randint(1, 3)):
        i, j = sorted((rng.randrange(len(text)), rng.randrange(len(text))))
        j = min(j, i + 12)
        change = rng.randrange(5)
        middle = ["", text[i:j] * 2, rng.choice('{}[]"\\:,()|*+?$^9é\x00\ufeff'), text[i:j][::-1], "null"][change]
        text = text[:i] + middle + text[j:] or "x"
    return text


@pytest.mark.parametrize("kind", TEXTS)
def test_a_spoiled_constraint_compiles_or_is_refused(kind: Any) -> None:
    rng, made, out, refused = random.Random(1), backend(), np.zeros(10, np.int32), 0
    for number in range(300):
        text = spoiled(TEXTS[kind][number % len(TEXTS[kind])], rng)
        if kind in ("json", "structural_tag"):
            try:
                if not isinstance(json.loads(text), dict):
                    continue
            except ValueError:  # `StructuredOutputsParams` refuses it
                continue
        try:
            made.compile(Constraint(kind=kind, text=text)).matcher().mask(out)
        except GrammarError:
            refused += 1
    assert refused > 3


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a"]}
    return schema


def one_of(depth: int) -> Any:
    """Two alternatives at each level, each of which has the next level: 2^depth of them, in a short text."""
    defs: dict[str, Any] = {"d0": {"type": "integer"}}
    for i in range(depth):
        each = [
            {
                "type": "object",
                "properties": {"kind": {"const": n}, "of": {"$ref": f"#/$defs/d{i}"}},
                "required": ["kind"],
            }
            for n in "ab"
        ]
        defs[f"d{i + 1}"] = {"oneOf": [*each, {"type": "string"}]}
    return {"$defs": defs, "$ref": f"#/$defs/d{depth}"}


HEAVY = {
    "deep oneOf": {"json": one_of(16)},
    "wide": {"json": nested(12)},
    "repeated": {"regex": "((a{1,500}){1,500}){1,500}b"},
    "exponential": {"regex": "(.*a){20}.{20}b"},
    "long choice": {"choice": [f"{i:05d}" * 3 for i in range(20_000)]},
    "recursive": {"grammar": 'start: start start | start | "a"'},
    "what must come next has no end": {"grammar": 'start: WORD "a" "b"\nWORD: /a+/'},
    "ambiguous": {"grammar": 'start: x x x x x x x x\nx: "a"*'},
    "many": {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}},
}


@pytest.mark.parametrize("name", HEAVY)
def test_a_heavy_constraint_harms_no_other_request(tmp_path: Path, name: str) -> None:
    with grammar_llm(tmp_path) as llm:
        plain = SamplingParams(temperature=0, max_tokens=12)
        (alone,) = llm.generate([[5, 6]], plain)
        heavy, other = llm.generate([[1], [5, 6]], [params(HEAVY[name], max_tokens=12, temperature=1, seed=0), plain])
        assert other.outputs[0].token_ids == alone.outputs[0].token_ids
        assert heavy.error is None or heavy.error.code in ("invalid_grammar", "prepare_timeout")
        assert name != "what must come next has no end" or heavy.error is None, heavy.error
        assert name != "long choice" or heavy.outputs[0].text[:5] in {each[:5] for each in HEAVY[name]["choice"]}
        assert llm.stats().grammars.compiled_in_steps == 0


def test_what_is_too_complex_behind_a_token_is_said_to_be_that() -> None:
    """It compiles, and the backend finds out when it takes the first token."""
    matcher = backend().compile(StructuredOutputsParams(**HEAVY["many"]).constraint()).matcher()
    token = _allowed(matcher)[0]
    with pytest.raises(GrammarError, match="12007 items; max is 2000"):
        matcher.consume([token])


@pytest.mark.parametrize("threads", [0, 2])
def test_together_it_is_no_refusal_either(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    by_threads(monkeypatch)
    asked = [StructuredOutputsParams(**HEAVY["many"]), *(StructuredOutputsParams(choice=[each]) for each in ("a", "b"))]
    matchers: Any = [backend().compile(each.constraint()).matcher() for each in asked]
    for each in matchers:
        each._executor = LLExecutor(threads) if threads else None
    out = np.zeros((3, 10), np.int32)
    failed = type(matchers[0]).advance(matchers, [_allowed(matchers[0])[0], ord("a"), ord("a")], out).failed
    assert sorted(failed) == [0, 2]
    assert "12007 items; max is 2000" in str(failed[0])
    assert failed[2] is None


@pytest.mark.parametrize(
    "texts",
    [["", "a"], [""], ["a"], ["a", "ab", "abc"], ['q"\\', "\n/", "é☃", "\U0001f600", "\x00\t\x7f"], ["/a/i", "[a]+"]],
)
def test_a_choice_is_its_texts_and_nothing_else(texts: list[str]) -> None:
    grammar = backend().compile(StructuredOutputsParams(choice=texts).constraint())

    def fits(text: str) -> bool:
        ids, matcher = TOKENIZER.encode(text).ids, grammar.matcher()
        return matcher.consume(ids) == len(ids) and matcher.is_accepting

    assert all(map(fits, texts))
    beside = {text[:-1] for text in texts} | {text + "x" for text in texts} | {"", "aaa", "A"}
    assert not any(map(fits, beside - {*texts}))


def test_a_schema_that_is_nested_too_deeply_is_an_error(tmp_path: Path) -> None:
    text = '{"items":' * 5000 + "{}" + "}" * 5000
    from nanoengine import ParamsError

    with grammar_llm(tmp_path) as llm, pytest.raises(ParamsError, match="structured_outputs"):
        llm.generate([[1]], params({"json": text}))


def test_the_examples_of_the_kit_survive_any_order_of_calls() -> None:
    """Walks with rollbacks give the masks of a matcher that went straight there."""
    rng, made = random.Random(0), backend()
    for constraint, _, _ in EXAMPLES:
        grammar = made.compile(constraint)
        matcher, taken = grammar.matcher(), []
        for _ in range(25):
            allowed = _allowed(matcher)
            straight = grammar.matcher()
            assert straight.consume(taken) == len(taken)
            assert _allowed(straight) == allowed
            if not allowed:
                break
            tried = matcher.consume([rng.choice(allowed) for _ in range(2)])
            matcher.rollback(tried)
            matcher.forced(8, 10)
            taken.append(rng.choice(allowed))
            assert matcher.consume(taken[-1:]) == 1


def _allowed(matcher: Any) -> list[int]:
    out = np.zeros(10, np.int32)
    matcher.mask(out)
    ids = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")).tolist()
    return [i for i in ids if i < 277]
