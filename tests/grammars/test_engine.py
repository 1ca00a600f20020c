"""Structured outputs in the engine: what they hold, in every way of running, and what fails alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.test_drafts import Oracle

from nanoengine import LLM, ParamsError, RequestOutput, SamplingParams, StructuredOutputsParams, TokenizerMissing
from nanoengine.api import Constraint, Grammar, GrammarBackend, GrammarSpec, Matcher, hookimpl
from nanoengine.api.errors import RequestError
from nanoengine.params.engine_options import StructuredOutputsOptions
from nanoengine.params.grammars import Grammars
from nanoengine.params.preparation import Preparations
from nanoengine.plugins.grammars.llguidance import LLGuidance
from nanoengine.testing.byte_tokenizer import END, END_REASONING, START_REASONING, byte_tokenizer
from nanoengine.testing.mock_model import write_mock_checkpoint

from .corpus import SAMPLE
from .support import VOCAB, grammar_llm, greedy, params, schema_params, tokens_of
from .test_backends import PERSON, TAGS, backend

jsonschema = pytest.importorskip("jsonschema")
TOKENIZER = byte_tokenizer()
END_ID = TOKENIZER.token_to_id(END)
PROMPTS = [[ord(c) for c in text] for text in ("a", "tell me", "an object:", "an object: with more")]


def compiled(schema: Any) -> Grammar:
    text = json.dumps(schema)
    return backend().compile(Constraint(kind="json", text=text, whitespace_pattern="[ ]?"))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with grammar_llm(tmp_path_factory.mktemp("grammars")) as made:
        yield made


def check(schemas: Sequence[Any], outputs: Sequence[RequestOutput]) -> int:
    """What ended by stop is valid, and what ended by length a valid beginning. Returns how many samples stopped."""
    stopped = 0
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.error is None, (schema, output.error)
        checker = jsonschema.validators.validator_for(schema)(schema, format_checker=jsonschema.FormatChecker())
        for sample in output.outputs:
            if sample.finish_reason == "stop":
                stopped += 1
                checker.validate(json.loads(sample.text))
            else:
                matcher = compiled(schema).matcher()
                assert matcher.consume(sample.token_ids) == len(sample.token_ids)
    return stopped


def test_random_output_follows_the_sample_of_schemas(llm: LLM) -> None:
    prompts = [[1 + i, 2] for i in range(len(SAMPLE))]
    outputs = llm.generate(prompts, [schema_params(s, temperature=2, n=2, seed=i) for i, s in enumerate(SAMPLE)])
    assert check(SAMPLE, outputs) >= len(SAMPLE)
    assert llm.stats().grammars.compiled_in_steps == 0


def test_greedy_tokens_are_the_likeliest_allowed_ones(llm: LLM) -> None:
    grammars = [compiled(schema) for schema in (PERSON, SAMPLE[9], SAMPLE[18], SAMPLE[19])]
    schemas = [PERSON, SAMPLE[9], SAMPLE[18], SAMPLE[19]]
    outputs = llm.generate(PROMPTS, [schema_params(schema, max_tokens=60) for schema in schemas])
    expected = [[greedy(p, g, END_ID, 60)] for p, g in zip(PROMPTS, grammars, strict=True)]
    assert tokens_of(outputs) == expected
    assert any(each[0][-1] == END_ID for each in expected)


def mixed(llm: LLM) -> list[list[tuple[int, ...]]]:
    """Structured and other requests, sampled, some with several samples and a common prompt."""
    schemas = [PERSON, SAMPLE[8], SAMPLE[14], SAMPLE[17], SAMPLE[19]]
    given = [schema_params(s, temperature=1.5, seed=i, n=1 + i % 2, max_tokens=80) for i, s in enumerate(schemas)]
    given += [SamplingParams(temperature=1.0, seed=9, max_tokens=40), SamplingParams(temperature=0, max_tokens=20)]
    given += [params({"regex": "[a-f]{5,20}"}, repetition_penalty=1.3, bad_words=["ab"])]
    prompts = [[7] * 9 + [i] for i in range(len(given))]
    return tokens_of(llm.generate(prompts, given))


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[tuple[int, ...]]]:
    return mixed(llm)


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": False},
        {"num_gpu_blocks_override": 30, "max_model_len": 100},
        {"max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_same_tokens_in_every_way_of_running(
    tmp_path: Path, expected: list[list[tuple[int, ...]]], options: dict[str, Any]
) -> None:
    with grammar_llm(tmp_path, positions=200, **options) as llm:
        assert mixed(llm) == expected
        if "num_gpu_blocks_override" in options:
            assert llm.stats().preemptions > 0
        if "overlap" in options:
            assert llm.stats().prefix_hit_tokens > 0
        assert llm.stats().grammars.compiled_in_steps == 0


@pytest.mark.parametrize("accuracy", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("overlap", [True, False])
def test_the_same_tokens_with_drafts(
    tmp_path: Path, expected: list[list[tuple[int, ...]]], accuracy: float, overlap: bool
) -> None:
    """Right and wrong drafts, some of which the grammar refuses: none changes a token."""
    with grammar_llm(tmp_path, positions=200, overlap=overlap) as llm:
        known = {
            ((*[7] * 9, i), sample): tokens
            for i, samples in enumerate(expected)
            for sample, tokens in enumerate(samples)
        }
        oracle = Oracle(known, 4, accuracy)
        llm.engine.scheduler._speculation = oracle  # type: ignore[assignment]
        assert mixed(llm) == expected
        assert oracle.drafted > 100
        assert (oracle.accepted > 20) == (accuracy > 0.5)


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_the_same_tokens_with_a_drafter(tmp_path: Path, expected: list[list[tuple[int, ...]]], method: str) -> None:
    with grammar_llm(tmp_path, positions=200, speculation={"method": method, "tokens": 3}) as llm:
        assert mixed(llm) == expected


def test_tokens_that_are_the_only_possible_ones_take_no_step(llm: LLM) -> None:
    """The text of this constant is longer than the steps that it takes, and still the likeliest allowed tokens."""
    schema = {"const": {"kind": "ping", "to": ["a", "b"], "text": "all of this is forced"}}
    before = llm.stats().steps
    given = params({"json": schema, "disable_any_whitespace": True})
    (output,) = llm.generate([[1, 2]], given)
    sample = output.outputs[0]
    assert json.loads(sample.text) == schema["const"]
    assert sample.finish_reason == "stop"
    steps = llm.stats().steps - before
    assert steps < len(sample.token_ids) / 2
    grammar = backend().compile(Constraint(kind="json", text=json.dumps(schema), any_whitespace=False))
    assert sample.token_ids == greedy([1, 2], grammar, END_ID, 300)


@pytest.mark.slow
def test_the_same_tokens_on_two_ranks(tmp_path: Path, expected: list[list[tuple[int, ...]]]) -> None:
    with grammar_llm(tmp_path, positions=200, tensor_parallel_size=2) as llm:
        assert mixed(llm) == expected


def test_only_the_end_is_allowed_when_it_is_complete(llm: LLM) -> None:
    for outputs in ({"choice": ["yes", "no"]}, {"regex": "ab?"}, {"json": {"const": {"a": 1}}}):
        (output,) = llm.generate([PROMPTS[0]], params(outputs, temperature=2, seed=3))
        sample = output.outputs[0]
        assert sample.finish_reason == "stop"
        assert sample.token_ids[-1] == END_ID
        assert sample.stop_reason is None
    (output,) = llm.generate([PROMPTS[0]], params({"choice": ["yes"]}, ignore_eos=True, max_tokens=9))
    assert output.outputs[0].text == "yes", "behind the end come end tokens only, which are no text"


def test_the_requests_own_stop_tokens_end_it_at_the_end(llm: LLM) -> None:
    stop = ord("!")
    given = params({"regex": "[a-z]{3}"}, stop_token_ids=[stop], logit_bias={stop: 50.0}, temperature=1, seed=2)
    (output,) = llm.generate([[1]], given)
    sample = output.outputs[0]
    assert (sample.finish_reason, sample.stop_reason, sample.token_ids[-1]) == ("stop", stop, stop)
    assert len(TOKENIZER.decode(list(sample.token_ids[:-1]))) == 3


def test_all_kinds_of_constraints(llm: LLM) -> None:
    kinds: list[Any] = [
        {"json_object": True, "disable_any_whitespace": True},
        {"regex": "[0-9]{3}-[a-z]+"},
        {"choice": ["né", "a\nb"]},
        {"grammar": 'start: "(" start ")" | "x"'},
        {"grammar": 'root ::= "a" | "b" root'},
        {"structural_tag": TAGS},
        StructuredOutputsParams(json=json.dumps({"type": "null"})),
    ]
    outputs = llm.generate([[i + 1] for i in range(len(kinds))], [params(each, max_tokens=40) for each in kinds])
    texts = [output.outputs[0].text for output in outputs]
    assert [output.error for output in outputs] == [None] * len(kinds)
    assert texts[0].startswith("{")
    assert texts[2] in ("né", "a\nb")
    assert set(texts[3]) <= set("(x)")
    assert set(texts[4]) <= set("ab")
    assert texts[6] == "null"


def test_padded_ids_are_never_drawn(llm: LLM) -> None:
    anything = params({"regex": "(.|\n)*"}, temperature=100, n=8, max_tokens=60, seed=5)
    free = anything.replace(structured_outputs=None)
    known = TOKENIZER.get_vocab_size()
    plain, structured = llm.generate([[1], [1]], [free, anything])
    assert any(token >= known for sample in plain.outputs for token in sample.token_ids), "they could be drawn"
    assert [t for sample in structured.outputs for t in sample.token_ids if t >= known] == []


# --- reasoning


def test_the_grammar_begins_after_the_reasoning(llm: LLM) -> None:
    close = TOKENIZER.token_to_id(END_REASONING)
    outputs = {"choice": ["yes", "no"], "reasoning": END_REASONING}
    given = params(outputs, temperature=2, seed=1, n=6, max_tokens=600, logit_bias={close: 9.0})
    (output,) = llm.generate([[1, 2]], given)
    ended = [s for s in output.outputs if s.finish_reason == "stop"]
    assert len(ended) >= 3
    for sample in ended:
        ids = list(sample.token_ids)
        at = ids.index(close)
        assert at > 0
        assert END_ID not in ids[:at], "the reasoning does not end the output"
        assert TOKENIZER.decode(ids[at + 1 : -1]) in ("yes", "no")
        assert max(ids) < TOKENIZER.get_vocab_size()


@pytest.mark.parametrize(
    ("prompt", "begins"),
    [
        ("question" + START_REASONING + END_REASONING, True),
        (START_REASONING + "hm" + END_REASONING + "\n", True),
        ("question" + START_REASONING, False),
        (START_REASONING + "a" + END_REASONING + "b" + START_REASONING, False),
        (END_REASONING + "answer" + END + "question", False),  # of an earlier turn
        ("question", False),
    ],
)
def test_a_prompt_that_has_the_end_of_the_reasoning(llm: LLM, prompt: str, begins: bool) -> None:
    ids = TOKENIZER.encode(prompt).ids
    (output,) = llm.generate([ids], params({"regex": "[xyz]{9}", "reasoning": END_REASONING}, max_tokens=8))
    assert (set(output.outputs[0].text) <= set("xyz")) == begins


def test_the_reasoning_token_of_the_engine_is_the_default(tmp_path: Path) -> None:
    with grammar_llm(tmp_path, structured_outputs={"reasoning": END_REASONING}) as llm:
        first, second = llm.generate(
            [TOKENIZER.encode("q").ids, TOKENIZER.encode("q" + END_REASONING).ids],
            params({"regex": "x{9}"}, max_tokens=8),
        )
        assert second.outputs[0].text == "x" * 8
        assert first.outputs[0].text != "x" * 8


# --- errors


def test_a_constraint_that_is_refused_fails_alone(llm: LLM) -> None:
    wrong = [{"json": {"not": {}}}, {"regex": "a("}, {"grammar": "start: b"}, {"structural_tag": {"triggers": ["<"]}}]
    outputs = llm.generate([[1]] * 5, [*(params(each) for each in wrong), params({"choice": ["yes"]})])
    assert [output.error.code for output in outputs[:4] if output.error] == ["invalid_grammar"] * 4
    assert "not" in str(outputs[0].error)
    assert outputs[4].outputs[0].text == "yes"
    refused = llm.stats().grammars.refused
    (again,) = llm.generate([[1]], params(wrong[0]))
    assert str(again.error) == str(outputs[0].error)
    assert llm.stats().grammars.refused == refused, "a refused constraint is not compiled again"


def test_a_constraint_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with grammar_llm(tmp_path, structured_outputs={"max_bytes": 100}) as llm:
        large, small = llm.generate([[1], [1]], [params({"choice": ["x" * 200]}), params({"choice": ["x"]})])
        assert "max_bytes" in str(large.error)
        assert small.outputs[0].text == "x"


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"json": {}, "regex": "a"}, "json and regex are given"),
        ({"jsn": {}}, "did you mean 'json'"),
        ({}, "none is given"),
        ({"regex": "a", "reasoning": "two tokens"}, "must be one token"),
        ({"regex": "a", "reasoning": 4000}, "no such token id: 4000"),
        ({"regex": "a", "reasoning": VOCAB - 1}, f"no such token id: {VOCAB - 1}"),
        ({"regex": "a", "reasoning": END}, "'<end>' ends the output"),
        ("yes", "must be a mapping of json"),
    ],
)
def test_what_can_be_seen_at_once_raises_before_anything_runs(llm: LLM, outputs: Any, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        llm.generate([[1]], params(outputs))


def test_old_names_are_refused_with_the_new_one(llm: LLM) -> None:
    for name in ("guided_decoding", "guided_json", "guided_choice", "response_format"):
        with pytest.raises(ParamsError, match=rf"{name}.*structured_outputs=StructuredOutputsParams"):
            llm.generate([[1]], SamplingParams(**{name: {}}))


def test_a_model_without_a_tokenizer_or_an_end_cannot_be_constrained(tmp_path: Path) -> None:
    folder = write_mock_checkpoint(tmp_path / "bare", vocab_size=97)
    from nanoengine.testing import mock_model

    given: dict[str, Any] = {"attention": "mock", "load_format": "dummy", "plugins": [mock_model]}
    with LLM(folder, **given) as llm, pytest.raises(ParamsError, match="no end token"):
        llm.generate([[1]], params({"choice": ["a"]}))
    write_mock_checkpoint(folder, vocab_size=97, eos_token_id=3)
    with LLM(folder, **given) as llm, pytest.raises(TokenizerMissing, match="structured_outputs needs"):
        llm.generate([[1]], params({"choice": ["a"]}))


class Careless(LLGuidance):
    """Its masks allow "!", which its matchers then refuse; a constraint with "?" it cannot compile at all."""

    def compile(self, constraint: Constraint) -> Grammar:
        if "?" in constraint.text:
            raise ZeroDivisionError("of the backend")
        grammar = super().compile(constraint)
        if "!" not in constraint.text:
            return grammar
        made = grammar.matcher()
        original = type(made)

        class Wrong(original):  # type: ignore[valid-type,misc]
            advance = classmethod(Matcher.advance.__func__)  # one by one, by `mask`

            def mask(self, out: np.ndarray[Any, Any]) -> None:
                super().mask(out)
                out[1] = 1 << 1  # id 33
                out[2:] = 0

        class Wrapped(Grammar):
            def matcher(self) -> Matcher:
                return Wrong(made._matcher.deep_copy())

        return Wrapped()


class Plugin:
    @hookimpl
    def register_grammars(self) -> list[GrammarSpec]:
        missing = GrammarSpec(name="absent", target="nowhere:X", api=1, preference=900, requires=("nowhere",),
                              install="pip install nowhere")  # fmt: skip
        return [GrammarSpec(name="careless", target=f"{__name__}:Careless", api=1, preference=500), missing]


def test_a_matcher_that_refuses_its_own_token_ends_one_request(tmp_path: Path) -> None:
    with grammar_llm(tmp_path, plugins=[Plugin()]) as llm:  # "auto" takes the highest preference that is installed
        wrong, broken, fine = llm.generate(
            [[1], [1], [1]], [params({"choice": ["a!"]}), params({"regex": "b?"}), params({"choice": ["yes"]})]
        )
        assert wrong.error is not None
        assert wrong.error.code == "grammar_failed"
        assert "id 33" in str(wrong.error)
        assert broken.error is not None
        assert broken.error.code == "invalid_grammar"
        assert "ZeroDivisionError: of the backend" in str(broken.error)
        assert fine.outputs[0].text == "yes"


def test_a_backend_that_is_not_installed_is_named_with_the_command(tmp_path: Path) -> None:
    from nanoengine import PluginError, UnsupportedError

    with pytest.raises(UnsupportedError, match=r"'absent'.*needs nowhere, not installed here \(pip install nowhere\)"):
        grammar_llm(tmp_path, plugins=[Plugin()], structured_outputs={"backend": "absent"})
    with pytest.raises(PluginError, match="no grammar backend 'llguidence' is installed; did you mean 'llguidance'"):
        grammar_llm(tmp_path, structured_outputs={"backend": "llguidence"})


def test_without_any_backend_the_error_says_what_to_install(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoengine.setup.plugins.choose._is_there", lambda module: False)
    monkeypatch.setattr(llm._built.grammars, "_backend", None)
    (output,) = llm.generate([[1]], params({"regex": "never seen before"}))
    assert output.error is not None
    assert output.error.code == "not_supported"
    assert "llguidance needs llguidance, not installed here (pip install 'nanoengine[grammars]')" in str(output.error)


# --- compiling


def test_equal_constraints_are_compiled_once(tmp_path: Path) -> None:
    with grammar_llm(tmp_path) as llm:
        llm.generate([[1]] * 20, [schema_params(PERSON, seed=i) for i in range(20)])
        stats = llm.stats().grammars
        assert (stats.compiled, stats.refused, stats.compiled_in_steps) == (1, 0, 0)
        assert stats.cached == 19
        assert len(stats.seconds) == 1
        assert "seconds" not in repr(stats)  # up to 1,024 of them
        assert stats.percentile(50) == stats.seconds[0] > 0


class Stuck(LLGuidance):
    """It compiles a constraint with "?" once it may."""

    gate = threading.Event()

    def compile(self, constraint: Constraint) -> Grammar:
        if "?" in constraint.text:
            self.gate.wait(60)
        return super().compile(constraint)


class StuckPlugin:
    @hookimpl
    def register_grammars(self) -> list[GrammarSpec]:
        return [GrammarSpec(name="stuck", target=f"{__name__}:Stuck", api=1, preference=500)]


def test_compiling_takes_no_longer_than_the_timeout(tmp_path: Path) -> None:
    with grammar_llm(tmp_path, plugins=[StuckPlugin()], structured_outputs={"timeout": 0.05, "workers": 1}) as llm:
        (slow,) = llm.generate([[1]], params({"regex": "a?"}))
        llm._built.preparations._seconds = 60
        (fine,) = llm.generate([[1]], params({"choice": ["yes"]}))  # the only thread is still stuck
        Stuck.gate.set()
    assert slow.error is not None
    assert slow.error.code == "prepare_timeout"
    assert "more than 0.05 s" in str(slow.error)
    assert fine.outputs[0].text == "yes"


def test_the_time_in_which_the_backend_is_loaded_does_not_count() -> None:
    found: list[float] = []

    def make() -> GrammarBackend:
        found.append(grammars.counted_from() - time.monotonic())
        return backend()

    grammars = Grammars(make, StructuredOutputsOptions())
    assert grammars.counted_from() == 0
    grammars.get(Constraint(kind="regex", text="a"))
    assert 50 < found[0] <= 60, "while it is loaded, at most so many seconds"
    assert 0 < grammars.counted_from() <= time.monotonic()

    ended = list[RequestError | None]()
    for counted_from, gone in ((time.monotonic() + 60, []), (0.0, ["prepare_timeout"])):
        gate, began, made = threading.Event(), threading.Event(), Preparations(1, 0.0, lambda: counted_from)  # noqa: B023
        made.submit([began.set, lambda: gate.wait(60)], ended.append)  # noqa: B023
        began.wait(60)
        made.expire()
        assert [error.code for error in ended if error] == gone
        gate.set()
        made.close()


def test_more_constraints_than_the_cache_holds(tmp_path: Path) -> None:
    with grammar_llm(tmp_path, structured_outputs={"cache_size": 2}) as llm:
        outputs = llm.generate([[1]] * 30, [params({"regex": f"a{{{1 + i}}}"}) for i in range(30)])
        assert [output.outputs[0].text for output in outputs] == ["a" * (1 + i) for i in range(30)]
        stats = llm.stats().grammars
        assert (stats.compiled, stats.compiled_in_steps) == (30, 0)


def test_ids_of_the_mock_model_fit_the_tokenizer() -> None:
    assert TOKENIZER.get_vocab_size() < VOCAB - 32


def test_outputs_go_on_behind_generated_tokens(llm: LLM) -> None:
    """A grammar's matcher gets them all, wherever the output was cut, in strings, numbers and between."""
    schemas = [SAMPLE[i] for i in range(0, len(SAMPLE), 3)]
    asked = [schema_params(schema, temperature=2, seed=i, max_tokens=120) for i, schema in enumerate(schemas)]
    prompts = [[1 + i, 2] for i in range(len(schemas))]
    whole = llm.generate(prompts, asked, use_tqdm=False)
    check(schemas, whole)
    for cut in (1, 5, 14, -1):
        given = [output.outputs[0].token_ids[:cut] for output in whole]
        begun = [{"prompt_token_ids": p, "generated_token_ids": ids} for p, ids in zip(prompts, given, strict=True)]
        rest = llm.generate(begun, asked, use_tqdm=False)
        for one, other, ids in zip(whole, rest, given, strict=True):
            a = one.outputs[0]
            if ids == a.token_ids:
                assert other.error is not None
                assert other.error.code == "already_ended"
                continue
            assert other.error is None, other.error
            b = other.outputs[0]
            assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)


def test_generated_tokens_against_the_grammar_are_refused(llm: LLM) -> None:
    begun = {"prompt_token_ids": [1], "generated_token_ids": list(b'{"name" 5')}
    wrong, fine = llm.generate([begun, [1]], schema_params(PERSON), use_tqdm=False)
    assert wrong.error is not None
    assert wrong.error.code == "grammar_failed"
    assert "is not allowed by the grammar" in str(wrong.error)
    assert fine.error is None
