"""Texts with the spelling of a special token, ids that no grammar may have, and the notations of grammars."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers

from nanoengine.api import Constraint, Grammar, GrammarError
from nanoengine.plugins.grammars.unchanged_text import with_unchanged_text
from nanoengine.testing.byte_tokenizer import END, START_REASONING, byte_tokenizer

from .support import grammar_llm, params
from .test_backends import accepts, backend, compiled, mask_of, sentencepiece

TOKENIZER = byte_tokenizer()
TOKENIZER.add_special_tokens(["<s>", "</s>"])
MADE = backend(TOKENIZER)


def masked_path(grammar: Grammar, text: str) -> list[int]:
    """Ids that the masks allow, one after the other, and that spell the text; the longest first."""
    matcher, out, rest = grammar.matcher(), list[int](), text.encode()
    special = {TOKENIZER.token_to_id(each) for each in (END, START_REASONING, "</think>", "<s>", "</s>")}
    while rest:
        allowed = {TOKENIZER.decode([i]).encode(): i for i in mask_of(matcher, 320) - special}
        fitting = [each for each in allowed if rest.startswith(each)]
        assert fitting, (text, rest, mask_of(matcher, 320))
        piece = max(fitting, key=len)
        assert matcher.consume([allowed[piece]]) == 1
        out.append(allowed[piece])
        rest = rest.removeprefix(piece)
    assert matcher.is_accepting
    return out


@pytest.mark.parametrize("token", ["<s>", "</s>", END, START_REASONING])
@pytest.mark.parametrize(
    ("kind", "text", "spelled"),
    [
        ("choice", json.dumps(["a{}b", "zz"]), "a{}b"),
        ("choice", json.dumps(["{}"]), "{}"),
        ("regex", "{}{}x+", "{}{}x"),
        ("json", '[[["const": "a{}"]]]', '"a{}"'),
        ("grammar", 'start: "{}" /[0-9]/', "{}1"),
        ("grammar", 'root ::= "{}" [0-9]', "{}1"),
    ],
)
def test_a_text_may_have_the_spelling_of_a_special_token(token: str, kind: Any, text: str, spelled: str) -> None:
    source = text.replace("{}", token).replace("[[[", "{").replace("]]]", "}")
    grammar = MADE.compile(Constraint(kind=kind, text=source))
    ids = masked_path(grammar, spelled.replace("{}", token))
    assert TOKENIZER.token_to_id(token) not in ids
    matchers = [grammar.matcher() for _ in range(3)]  # together, as of several rows
    rows = np.empty((3, 10), np.int32)
    assert not type(matchers[0]).advance(matchers, [None] * len(matchers), rows).failed
    alone = np.empty(10, np.int32)
    matchers[0].mask(alone)
    assert (rows == alone).all()


NORMALIZERS = [normalizers.NFC(), normalizers.NFKC(), normalizers.NFD(), normalizers.Lowercase(), normalizers.Strip(),
               normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])]  # fmt: skip


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=lambda each: type(each).__name__)
def test_a_text_that_the_tokenizer_would_change_is_written_as_it_is(normalizer: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizer
    made = backend(tokenizer)
    for text in ("e\u0301x", "\u00e9", "\ufb01", "\u212b", "ABC", " a ", "\u3000"):
        matcher, ids = made.compile(Constraint(kind="choice", text=json.dumps([text]))).matcher(), list[int]()
        while not matcher.is_accepting:
            ids.append(min(mask_of(matcher, 320)))
            assert matcher.consume(ids[-1:]) == 1, (text, ids)
        assert bytes(ids).decode() == text


@pytest.mark.parametrize("text", ["▁", "a▁▁{", " ▁x", "▁ "])
def test_the_character_that_is_a_space_in_sentencepiece_is_written_by_its_bytes(text: str) -> None:
    tokenizer = sentencepiece()
    made = backend(tokenizer)
    assert made._literal(f"{text}{END}{text}") == f'"{text}" <[{tokenizer.token_to_id(END)}]> "{text}"'  # of a tag
    grammar = made.compile(Constraint(kind="choice", text=json.dumps([text])))
    matcher, together, ids, row = grammar.matcher(), [grammar.matcher()], list[int](), np.empty((1, 10), np.int32)
    while not matcher.is_accepting:
        type(matcher).advance(together, ids[-1:] or [None], row)
        allowed = mask_of(matcher, 320)
        assert {i for i in range(320) if row[0, i // 32] >> i % 32 & 1} == allowed
        ids.append(min(allowed))
        assert matcher.consume(ids[-1:]) == 1, (text, ids)
    assert "".join(map(tokenizer.id_to_token, ids)).replace("▁", " ").replace("<0xE2><0x96><0x81>", "▁") in (
        text,
        text.replace("x", "<0x78>"),
    )


def test_only_normalizers_that_write_a_space_are_kept() -> None:
    found = sentencepiece()
    assert with_unchanged_text(found.to_str()) == found.to_str()
    steps = [normalizers.Prepend("▁"), normalizers.NFKC(), normalizers.Replace(" ", "▁")]
    found.normalizer = normalizers.Sequence(steps)
    kept = json.loads(with_unchanged_text(found.to_str(pretty=True)))
    found.normalizer = normalizers.Sequence([steps[0], steps[2]])
    assert kept == json.loads(found.to_str())


def test_a_special_token_in_a_grammar_stays_one() -> None:
    matcher = MADE.compile(Constraint(kind="grammar", text='start: "a" <s> "b"')).matcher()
    assert matcher.consume([ord("a")]) == 1
    assert mask_of(matcher, 320) == {TOKENIZER.token_to_id("<s>")}
    assert matcher.consume([TOKENIZER.token_to_id("<s>"), ord("b")]) == 2


@pytest.mark.parametrize("text", ["start: <[*]>*", "start: <[^1-200]>*", "start: (<[270-319]>)*"])
def test_ids_without_a_token_are_not_allowed_where_a_grammar_names_them(text: str) -> None:
    known = TOKENIZER.get_vocab_size()
    allowed = mask_of(MADE.compile(Constraint(kind="grammar", text=text)).matcher(), 320)
    assert allowed
    assert max(allowed) < known


def test_the_engine_writes_such_texts(tmp_path: Any) -> None:
    with grammar_llm(tmp_path) as llm:
        given = [{"json": {"const": [END, START_REASONING]}, "disable_any_whitespace": True}, {"choice": [END]}]
        outputs = llm.generate([[1], [1]], [params(each) for each in given])
    assert [output.error for output in outputs] == [None, None]
    assert [output.outputs[0].text for output in outputs] == [json.dumps([END, START_REASONING]).replace(" ", ""), END]


def test_a_property_cannot_be_written_a_second_time_with_escapes() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "patternProperties": {"^x": {"type": "null"}}}
    for grammar in (compiled("json", schema), compiled("grammar", f"start: %json {json.dumps(schema)}")):
        assert accepts(grammar, '{"a":1,"b\\n":"c","xx":null}')
        for wrong in ('{"\\u0061":"c"}', '{"a":1,"\\u0061":"c"}', '{"\\u0078":1}'):
            assert not accepts(grammar, wrong)
    two = {"minProperties": 2, "required": ["a"], "properties": {"a": True}}
    assert accepts(compiled("json", two), '{"a":1,"b":2}')


def test_control_characters_are_written_where_names_are_closed_and_else_refused() -> None:
    closed = {"type": "object", "properties": {"a\x01": {"pattern": "^b\\x02$"}}, "additionalProperties": False}
    assert accepts(compiled("json", closed), '{"a\\u0001":"b\\u0002"}')
    assert not accepts(compiled("json", closed), '{"a":"b"}')
    assert not accepts(compiled("json", {"const": "a\x00b"}), '"ab"')
    for value in ({"const": "\x01"}, {"pattern": "\\x1f"}, {"enum": ["\x7f"]}, {"pattern": "\\u{1f}"}):
        with pytest.raises(GrammarError, match="control character"):
            compiled("json", {"properties": {"a": value}})


NOTATIONS: list[tuple[str, list[str], list[str]]] = [
    ('\n?start: term ("+" term)*\n?term: NUMBER | "(" start ")"\n%import common.NUMBER\n', ["1+(2)"], ["1+"]),
    ('// a ::= b\n!start: "a ::= b"', ["a ::= b"], ["a"]),
    ('start: "%json {}" %json {"format": "date"} // %json {"not": {}}', ['%json {}"2024-02-29"'],
     ['%json {}"2023-02-29"']),
    ('root ::= "start" start\nstart ::= "x" # start', ["startx"], ["start"]),
    (r'root ::= "\u00e9\\x41" [\U0001F600-\U0001F64F]', ["é\\x41😀"], ["éA😀"]),
    (r'root ::= "\x22\x5c" [\x5d\x5b]', ['"\\]', '"\\['], ['"\\a']),
    ("root ::= [a&&b] [~~] [+--]", ["&~,", "a~+"], ["c~,", "a~."]),
    ('root ::= ("a" | # "b"\n "c")\n', ["a", "c"], ["b"]),
    ('root ::= ([0-9]+)? ("a"{2} )* ((("(" root ")")?))+ "b)"', ["b)", "12aaaab)", "(b))b)"], ["ab)", "1", "(b)"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "good", "wrong"), NOTATIONS)
def test_grammars_in_both_notations(text: str, good: list[str], wrong: list[str]) -> None:
    grammar = compiled("grammar", text)
    assert all(accepts(grammar, each) for each in good)
    assert not any(accepts(grammar, each) for each in wrong)
