"""Grammar backends at the level of their contract: the kit, refusals by name, structural tags, tokenizers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanoengine.api import Constraint, Grammar, GrammarContext, GrammarError, Matcher
from nanoengine.plugins.grammars.llguidance import LLGuidance
from nanoengine.testing.byte_tokenizer import END, END_REASONING, byte_tokenizer
from nanoengine.testing.conformance import ConformanceError, check_grammar_backend

TOKENIZER = byte_tokenizer()
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TAGS = {
    "type": "structural_tag",
    "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
                   {"begin": "<f=b>", "schema": PERSON, "end": "</f>"}],
    "triggers": ["<f="],
}  # fmt: skip


def separated(**flags: bool) -> Any:
    contents = {n: {"type": "json_schema", "json_schema": {"const": n}} for n in (1, 2)}
    tags = [{"begin": f"<{n}>", "content": content, "end": "."} for n, content in contents.items()]
    return {"format": {"type": "tags_with_separator", "tags": tags, "separator": "; ", **flags}}


SEPARATED: list[Any] = [
    ({}, (["", "<1>1.", "<1>1.; <2>2."], ["<1>1.<2>2.", "<1>1.; ", "a", "<1>2."])),
    ({"at_least_one": True}, (["<1>1.", "<1>1.; <2>2."], ["", "a<1>1."])),
    ({"stop_after_first": True}, (["", "<1>1."], ["<1>1.; <2>2."])),
    ({"at_least_one": True, "stop_after_first": True}, (["<2>2."], ["", "<1>1.; <2>2."])),
]
EXAMPLES = [
    (Constraint(kind="json", text=json.dumps(PERSON)), ['{"name": "Al", "age": 12}', '{"name":"","age":0}'],
     ['{"name": "Al"}', '{"name": "Al", "age": -1}', '{"name": "Al", "age": 1, "x": 1}', "[]", '{"name": "ninelette"']),
    (Constraint(kind="json", text=json.dumps(PERSON), any_whitespace=False), ['{"name":"Al","age":12}'],
     ['{"name": "Al","age":12}']),
    (Constraint(kind="json", text="true"), ["[1, 2]", "null", '"x"', "-1.5e3"], ["nul", "[1,]"]),
    (Constraint(kind="regex", text="[a-c]{2,3}x?"), ["ab", "abcx"], ["a", "abcd", "x"]),
    (Constraint(kind="choice", text='["yes", "no", "né\\"o/\\n", "no way"]'), ["yes", "no", 'né"o/\n', "no way"],
     ["ye", "maybe", "yes "]),
    (Constraint(kind="grammar", text='start: "a" start "b" | "c"'), ["c", "acb", "aacbb"], ["ab", "acbb"]),
    (Constraint(kind="grammar", text='root ::= "yes" | "no" [0-9]+'), ["yes", "no1", "no12"], ["no", "yes1"]),
    *((Constraint(kind="structural_tag", text=json.dumps(separated(**flags))), *texts) for flags, texts in SEPARATED),
    (Constraint(kind="structural_tag", text=json.dumps(TAGS)),
     ["free text", "", 'so <f=a>12</f> and <f=b>{"name":"","age":1}</f>!', "a < b"],
     ["so <f=a>x</f>", "so <f=c>1</f>", "so <f=a>1", "<f="]),
]  # fmt: skip


def test_llguidance_passes_the_conformance_kit() -> None:
    refused = [Constraint(kind="json", text="false"), Constraint(kind="regex", text="a|b(")]
    check_grammar_backend(LLGuidance, *EXAMPLES, refused=refused)  # type: ignore[arg-type]


def backend(tokenizer: Tokenizer = TOKENIZER, vocab_size: int = 320) -> LLGuidance:
    end = frozenset(i for i in [tokenizer.token_to_id(END)] if i is not None)
    ctx = GrammarContext(tokenizer_json=tokenizer.to_str(), vocab_size=vocab_size, end_ids=end, timeout=60)
    return LLGuidance(ctx)


def compiled(kind: Any, text: Any, **options: Any) -> Grammar:
    return backend().compile(Constraint(kind=kind, text=text if isinstance(text, str) else json.dumps(text), **options))


def accepts(grammar: Grammar, text: str) -> bool:
    ids, matcher = TOKENIZER.encode(text).ids, grammar.matcher()
    return matcher.consume(ids) == len(ids) and matcher.is_accepting


@pytest.mark.parametrize(
    ("kind", "text", "named"),
    [
        ("json", {"type": "string", "not": {"const": "x"}}, "not"),
        ("json", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json", {"if": {"type": "string"}, "then": {"minLength": 1}}, "if"),
        ("json", {"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ("json", {"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ("json", {"contains": {"type": "integer"}}, "contains"),
        ("json", {"unevaluatedProperties": False}, "unevaluatedProperties"),
        ("json", {"properties": {"deep": {"items": {"uniqueItems": True}}}}, "uniqueItems"),
        ("json", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ("json", {"type": "string", "format": "postcode"}, "postcode"),
        ("json", {"$ref": "https://example.com/schema.json"}, "example.com"),
        ("json", {"$ref": "#/$defs/missing"}, "missing"),
        ("json", {"type": "strin"}, "strin"),
        ("json", {"type": 3}, "type"),
        ("json", {"type": "string", "pattern": "a("}, "a\\("),
        ("json", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ("json", {"$schema": "http://json-schema.org/draft-03/schema#", "disallow": "integer"}, "draft 3"),
        ("json", {"$schema": "http://json-schema.org/draft-07/schema#", "contentEncoding": "utf"}, "contentEncoding"),
        ("json", {"x-guidance": {"lenient": True}, "not": {}}, "not"),
        ("json", {"minProperties": 2}, "minProperties 2 is not supported with 0 required"),
        ("json", {"minProperties": 3, "required": ["a"], "properties": {"a": True}}, "minProperties 3"),
        ("json", {"$ref": "#"}, "no text matches it"),
        ("json", {"x-guidance": {"coerce_one_of": True}, "oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ("regex", "(?<name", "(?<name"),
        ("regex", r"\bword", "lookaround"),
        ("regex", "a\\", "inside of an escape"),
        ("regex", "\\\\\\", "inside of an escape"),
        ("grammar", "start: missing", "missing"),
        ("grammar", 'start: %json {"x-guidance": {"lenient": true}, "not": {}}', "not"),
        ("grammar", 'root ::= "a\\', "no EBNF"),
        ("grammar", "nothing at all", ""),
        ("grammar", 'root ::= "a" other', "other"),
        ("structural_tag", {"type": "other"}, "other"),
        ("structural_tag", {"structures": [], "triggers": ["<"]}, "structures"),
        ("structural_tag", {"structures": [{"begin": "x", "schema": {}, "end": ""}], "triggers": ["<"]}, "trigger"),
        ("structural_tag", {"structures": [{"begin": "<", "scheme": {}}], "triggers": ["<"]}, "scheme"),
        ("structural_tag", {"structures": [{"begin": "<", "schema": {"not": {}}}], "triggers": ["<"]}, "not"),
        ("structural_tag", {"structures": [{"begin": "<", "end": ["a", "b"]}], "triggers": ["<"]}, "end must be"),
        ("structural_tag", {"format": {"type": "any_text"}}, "any_text"),
        ("structural_tag", {"format": {"type": "triggered_tags", "triggers": ["<"], "at_least_one": 1,
          "tags": [{"begin": "<", "content": {"type": "json_schema", "json_schema": {}}, "end": ""}]}}, "at_least_one"),
        ("structural_tag", {"format": {"type": "tags_with_separator",
          "tags": [{"begin": "<", "content": {"type": "json_schema", "json_schema": {}}, "end": ""}]}}, "separator"),
        ("structural_tag", {"format": {"type": ["triggered_tags"]}}, "triggered_tags"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_not_supported_is_refused_by_name(kind: str, text: Any, named: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiled(kind, text)
    assert named.replace("\\(", "(") in str(caught.value)
    assert caught.value.code == "invalid_grammar"
    assert len(str(caught.value)) < 600, "no dump of the grammar"


def test_formats_are_as_narrow_as_their_standard() -> None:
    date = compiled("json", {"type": "string", "format": "date"})
    assert accepts(date, '"2024-02-29"')
    assert accepts(date, '"2000-02-29"')
    for wrong in ("2023-02-29", "1900-02-29", "2024-02-30", "2024-04-31", "2024-13-01", "24-01-01"):
        assert not accepts(date, f'"{wrong}"'), wrong
    both = compiled("json", {"type": "string", "format": "date", "pattern": "^19"})
    assert accepts(both, '"1999-12-31"')
    assert not accepts(both, '"2024-02-29"')
    time = compiled("json", {"format": "date-time"})
    assert accepts(time, '"1998-12-31T23:59:59.5Z"')
    assert not accepts(time, '"1998-12-31T23:58:60Z"')


def test_white_space_in_a_pattern_is_that_of_ecmascript() -> None:
    dark = compiled("json", {"type": "string", "pattern": "^[\\S]\\S$"})
    assert accepts(dark, '"ab"')
    assert not accepts(dark, '"a\ufeff"')
    assert not accepts(dark, '"\ufeffa"')
    light = compiled("json", {"type": "string", "pattern": "^[\\sx]\\s$"})
    assert accepts(light, '"x\ufeff"')
    assert not accepts(light, '"xx"')


def test_a_regular_expression_with_anchors_matches_the_whole_output() -> None:
    anchored = compiled("regex", "^[a-z]+$")
    assert accepts(anchored, "abc")
    assert not accepts(anchored, "abc1")


def test_white_space_follows_its_options() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert accepts(compiled("json", schema), '{ "a" :\n1 }')
    assert not accepts(compiled("json", schema, any_whitespace=False), '{ "a" :\n1 }')
    narrow = compiled("json", schema, whitespace_pattern="[ ]?")
    assert accepts(narrow, '{ "a" : 1 }')
    assert not accepts(narrow, '{  "a" : 1 }')


def test_a_trigger_may_begin_with_another_one() -> None:
    tags = [{"begin": "<f=a>", "schema": {"type": "null"}, "end": ";"}, {"begin": "<x>", "schema": True, "end": ";"}]
    for triggers in (["<", "<f"], ["<f", "<"]):
        grammar = compiled("structural_tag", {"structures": tags, "triggers": triggers})
        assert accepts(grammar, "a <f=a>null; <x>1;")
        assert not any(accepts(grammar, text) for text in ("<", "<f", "<f=b>null;", "<f=a>1;"))


def test_white_space_is_that_of_json() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for pattern in ("\\s*", "[\\s]*", "( |\\n|\t)*"):
        grammar = compiled("json", schema, whitespace_pattern=pattern)
        assert accepts(grammar, '{ "a" :\n\t1 }')
        assert not accepts(grammar, '{\u3000"a": 1}')
        assert not accepts(grammar, '{\x0c"a": 1}')
    for pattern in ("x", "x*", " |/", "\\S?", "[^a]", ".", "\\x0c", "(", " \\"):
        with pytest.raises(GrammarError, match=r"whitespace_pattern|escape"):
            compiled("json", schema, whitespace_pattern=pattern)
    own = {**schema, "x-guidance": {"whitespace_pattern": "\\s*"}}
    assert not accepts(compiled("grammar", f"start: %json {json.dumps(own)}"), '{\u3000"a": 1}')


def test_separators_of_a_schema_are_those_of_json() -> None:
    """And more white space. llguidance would look for the end of one that takes what must follow it."""
    schema = {"type": "object", "properties": {"a": {"const": [1, 1]}}, "required": ["a"]}
    own = {**schema, "x-guidance": {"item_separator": ", ", "key_separator": ":\\s?"}}
    for grammar in (
        compiled("json", own, any_whitespace=False),
        compiled("grammar", f"start: %json {json.dumps(own)}"),
    ):
        assert accepts(grammar, '{"a": [1, 1]}')
        assert not accepts(grammar, '{"a":\u3000[1, 1]}')
    for name, pattern in (("item_separator", "1+"), ("key_separator", '"+'), ("whitespace_pattern", "1+")):
        own = {**schema, "x-guidance": {name: pattern}}
        for kind, text in (("json", own), ("grammar", f"start: %json {json.dumps(own)}")):
            with pytest.raises(GrammarError, match=name):
                compiled(kind, text)


def test_a_special_token_can_be_a_trigger() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<call>"])
    made = backend(tokenizer)
    tag = {"structures": [{"begin": "<call>", "schema": {"type": "integer"}, "end": ";"}], "triggers": ["<call>"]}
    grammar = made.compile(Constraint(kind="structural_tag", text=json.dumps(tag)))
    ids = tokenizer.encode("so <call>12; and").ids
    assert tokenizer.token_to_id("<call>") in ids
    matcher = grammar.matcher()
    assert matcher.consume(ids) == len(ids)
    assert matcher.is_accepting
    matcher = grammar.matcher()
    wrong = tokenizer.encode("so <call>x").ids
    assert matcher.consume(wrong) == len(wrong) - 1


def mask_of(matcher: Matcher, vocab_size: int) -> set[int]:
    out = np.zeros(-(-vocab_size // 32), np.int32)
    matcher.mask(out)
    return set(np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")).tolist())


def test_ids_without_a_token_are_never_allowed() -> None:
    known, vocab_size = TOKENIZER.get_vocab_size(), 1000
    matcher = backend(vocab_size=vocab_size).compile(Constraint(kind="regex", text="(.|\n)*")).matcher()
    allowed = mask_of(matcher, vocab_size)
    assert {ord("a"), ord("\n"), TOKENIZER.token_to_id("true")} <= allowed
    assert max(allowed) < known
    assert not {TOKENIZER.token_to_id(text) for text in ("<think>", END_REASONING)} & allowed, (
        "control tokens are no text"
    )


def sentencepiece() -> Tokenizer:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "{", "}", "▁{", '"', "a", ":", "1", '{"']
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>",
                                byte_fallback=True))  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([END])
    return made


def test_a_tokenizer_with_byte_fallback_is_supported() -> None:
    tokenizer = sentencepiece()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    matcher = backend(tokenizer).compile(Constraint(kind="json", text=json.dumps(schema))).matcher()
    allowed = mask_of(matcher, 320)
    assert {tokenizer.token_to_id(text) for text in ("{", '{"', "<0x7B>")} <= allowed
    assert tokenizer.token_to_id("▁{") not in allowed, "a text that begins with a space is no JSON for the grammar"


def test_a_tokenizer_that_is_not_supported_is_an_error_that_says_so() -> None:
    ctx = GrammarContext(tokenizer_json="{}", vocab_size=8, end_ids=frozenset([1]), timeout=1)
    with pytest.raises(GrammarError, match="does not support this model's tokenizer"):
        LLGuidance(ctx)


def test_compiling_and_matching_on_several_threads_gives_the_same() -> None:
    from concurrent.futures import ThreadPoolExecutor

    made = backend()
    grammars = [(made.compile(constraint), good) for constraint, good, _ in EXAMPLES]

    def work(_: int) -> bool:
        return all(accepts(grammar, text) for grammar, good in grammars for text in good)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))


# --- mistakes that the kit must see


class Changed(LLGuidance):
    """A backend whose matchers do one thing wrongly."""

    wrong: type[Matcher]

    def compile(self, constraint: Constraint) -> Grammar:
        grammar, wrong = super().compile(constraint), self.wrong

        class Wrapped(Grammar):
            def matcher(self) -> Matcher:
                return wrong(grammar.matcher()._matcher)  # type: ignore[attr-defined,call-arg]

        return Wrapped()


def mutants() -> dict[str, tuple[type[Matcher], str]]:
    from nanoengine.plugins.grammars.llguidance import _Matcher

    class Alone(_Matcher):
        advance = classmethod(Matcher.advance.__func__)  # type: ignore[assignment]  # one by one, by `mask`

    class Padded(Alone):
        def mask(self, out: Any) -> None:
            super().mask(out)
            out[-1] |= 1 << 5

    class NoRollback(_Matcher):
        def rollback(self, count: int) -> None:
            return None

    class TooFew(Alone):
        def mask(self, out: Any) -> None:
            super().mask(out)
            out[1] = 0

    class TooMany(Alone):
        def mask(self, out: Any) -> None:
            super().mask(out)
            out[3] |= 1

    class NeverEnds(_Matcher):
        @property
        def is_accepting(self) -> bool:
            return False

    class ForcesFirst(_Matcher):
        def forced(self, most: int, width: int) -> list[int]:
            return sorted(mask_of(self, 320))[:1]

    class Stale(_Matcher):
        def consume(self, token_ids: Any) -> int:
            taken = super().consume(token_ids)
            return taken + (taken < len(token_ids))

    class Stays(_Matcher):
        @classmethod
        def advance(cls, matchers: Any, token_ids: Any, out: Any) -> Any:
            return super().advance(matchers, [None] * len(token_ids), out)

    class TakesAll(_Matcher):
        @classmethod
        def advance(cls, matchers: Any, token_ids: Any, out: Any) -> Any:
            return replace(super().advance(matchers, token_ids, out), failed={})

    return {
        "padded": (Padded, "no token|beyond the vocabulary"),
        "no rollback": (NoRollback, "rollback|changed the mask|but consume returned"),
        "too few": (TooFew, "not in the mask|but consume returned"),
        "too many": (TooMany, "but consume returned|in the mask"),
        "never ends": (NeverEnds, "is_accepting"),
        "forces": (ForcesFirst, "another one may come next"),
        "stale": (Stale, "consume"),
        "stays": (Stays, "advance"),
        "takes all": (TakesAll, "advance"),
    }


@pytest.mark.parametrize("name", mutants())
def test_the_kit_sees_each_mistake(name: str) -> None:
    wrong, message = mutants()[name]
    with pytest.raises(ConformanceError, match=message):
        check_grammar_backend(type("Mutant", (Changed,), {"wrong": wrong}), *EXAMPLES[:4])  # type: ignore[arg-type]


def test_the_kit_sees_a_constraint_that_is_weakened() -> None:
    with pytest.raises(ConformanceError, match="expected a GrammarError"):
        check_grammar_backend(LLGuidance, EXAMPLES[3], refused=[Constraint(kind="regex", text="a")])  # type: ignore[arg-type]
