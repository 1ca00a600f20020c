"""SamplingParams and its resolver: names, defaults, types, ranges, words."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch

from nanoengine.api import ColumnSpec, ProcessorParams, StandardOp
from nanoengine.api.errors import ParamsError, PluginError, TokenizerMissing
from nanoengine.params.columns import MAX_RAGGED
from nanoengine.params.field_types import conform, describe
from nanoengine.params.resolver import ParamsResolver, ResolvedParams
from nanoengine.params.sampling_fields import NOT_SUPPORTED, legal_fields
from nanoengine.params.sampling_params import SamplingParams

from .harness import BUILT_IN, Context, resolver

VOCAB = 256
WIDE = MAX_RAGGED + 1


def resolve(**params: Any) -> ResolvedParams:
    return resolver(VOCAB, eos=(2, 3, 9999)).resolve(SamplingParams(**params))


def processors_of(resolved: ResolvedParams) -> dict[str, dict[str, Any]]:
    return {s.name: {name: column.tolist() for name, column in s.columns.items()} for s in resolved.processors}


def test_defaults_are_vllms() -> None:
    plain, resolved = SamplingParams(), resolve()
    assert (plain.n, plain.max_tokens, plain.min_tokens, plain.seed, plain.stop, plain.logprobs) == (
        (1, 16, 0, None, None, None)
    )
    assert (plain.detokenize, plain.skip_special_tokens, plain.ignore_eos) == (True, True, False)
    assert resolved.processors == ()
    assert not resolved.greedy
    assert resolved.stop_set == {2, 3}
    legal = legal_fields([(s.name, s.params) for s in BUILT_IN.values()])
    assert set(legal) == {
        "n", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "logit_bias", "allowed_token_ids", "bad_words", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids",
        "include_stop_str_in_output", "ignore_eos", "logprobs", "prompt_logprobs", "detokenize",
        "skip_special_tokens", "priority", "cache_salt", "speculate", "structured_outputs", "logits_processors",
        "batch_logits_processor",
    }  # fmt: skip
    processor_defaults = {k: v for s in BUILT_IN.values() for k, v in vars(s.params()).items()}
    assert processor_defaults == {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "logit_bias": None, "allowed_token_ids": None, "bad_words": None,
        "structured_outputs": None, "logits_processors": None, "batch_logits_processor": None,
    }  # fmt: skip
    inert = {k: v for k, v in processor_defaults.items() if v is not None} | {
        "top_k": -1,
        "bad_words": [],
        "logit_bias": {},
    }
    assert resolve(**inert).processors == ()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 0}, {"temperature": {"temperature": 0.0}}),
        ({"temperature": 5e-6}, {"temperature": {"temperature": 0.0}}),
        ({"temperature": np.float32(0.5)}, {"temperature": {"temperature": 0.5}}),
        ({"top_k": np.int64(7)}, {"top_k": {"top_k": 7}}),
        ({"top_k": 10**12}, {"top_k": {"top_k": 0}}),
        ({"logit_bias": {3: 1, 4: -2.5}}, {"logit_bias": {"ids": [3, 4], "bias": [1.0, -2.5]}}),
        ({"allowed_token_ids": (9, 4, 9)}, {"allowed_token_ids": {"ids": [4, 9]}}),
        ({"allowed_token_ids": np.array([7])}, {"allowed_token_ids": {"ids": [7]}}),
        (
            {"bad_words": ["ab", " c"]},
            {
                "bad_words": {
                    "tokens": [97, 98, 104, 98, 99, 106],
                    "following": [1, 0, 1, 0, 0, 0],
                    "sequence": [0, 0, 1, 1, 2, 3],
                }
            },
        ),
    ],
)
def test_packing(given: dict[str, Any], expected: dict[str, Any]) -> None:
    resolved = resolve(**given)
    assert processors_of(resolved) == expected
    assert resolved.greedy == (expected.get("temperature") == {"temperature": 0.0})
    with pytest.raises(ValueError, match="read-only"):
        next(iter(resolved.processors[0].columns.values()))[...] = 1


def test_resolution_of_core_fields() -> None:
    resolved = resolve(
        n=3, seed=-5, stop="END", stop_token_ids=[7], ignore_eos=True, logprobs=-1, prompt_logprobs=0, max_tokens=None
    )
    assert (resolved.n, resolved.seed, resolved.stop, resolved.max_tokens) == (3, -5, ("END",), None)
    assert resolved.stop_set == {7}
    assert (resolved.logprobs, resolved.prompt_logprobs) == (VOCAB, 0)


@pytest.mark.parametrize(
    ("limits", "given", "words"),
    [
        ({"max_n": 2}, {"n": 3}, "n is 3, and engine option max_n is 2: lower n or raise max_n"),
        ({"max_logprobs": 5}, {"logprobs": 6}, "logprobs is 6, and engine option max_logprobs is 5"),
        (
            {"max_logprobs": 5},
            {"prompt_logprobs": -1},
            r"prompt_logprobs is -1 \(all 256\), and engine option",
        ),
        ({"max_logprobs": VOCAB}, {"logprobs": -1}, "engine option max_logprobs is 256.*-1: no limit"),
        ({"max_logprobs": 0}, {"logprobs": 1}, "ask for at most 0"),
    ],
)
def test_limits_by_value_name_their_option(limits: dict[str, int], given: dict[str, Any], words: str) -> None:
    limited = ParamsResolver([], Context(VOCAB), frozenset(), **limits)
    with pytest.raises(ParamsError, match=words):
        limited.resolve(SamplingParams(**given))
    limited.resolve(SamplingParams(n=2, logprobs=0))


class Odd:
    """A value that cannot be copied, hashed or shown."""

    def __init__(self, broken: str) -> None:
        self.broken = broken

    def __deepcopy__(self, memo: object) -> Odd:
        if self.broken == "copy":
            raise SystemExit
        return self

    def __hash__(self) -> int:
        raise ValueError

    def __repr__(self) -> str:
        raise ValueError


@pytest.mark.parametrize("broken", ["copy", "hash"])
def test_values_of_any_class_are_refused_by_name(broken: str) -> None:
    with pytest.raises(ParamsError, match="temperature"):
        resolve(temperature=Odd(broken))


class Level(IntEnum):
    LOW = 3


class Text(str):
    def encode(self, *args: Any) -> bytes:
        raise SystemExit


class Number(float):
    def __le__(self, other: float) -> bool:
        raise SystemExit

    __lt__ = __ge__ = __gt__ = __le__


class Hidden:
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise SystemExit


@dataclass(frozen=True)
class WordsParams(ProcessorParams):
    words: Any = None

    def active(self) -> bool:
        return False


class NotEqual(str):
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise SystemExit


def test_numbers_and_texts_of_a_class_of_their_own_are_plain_ones() -> None:
    """A range looks for what is no plain int one number after the other."""
    params = SamplingParams(priority=Level.LOW, seed=Level.LOW, stop=[Text("END")], top_p=Number(0.5))
    assert [type(value) for value in (params.priority, params.seed, *params.stop)] == [int, int, str]
    assert processors_of(resolve(priority=Level.LOW, temperature=Level.LOW, top_p=Number(0.5))) == {
        "temperature": {"temperature": 3.0},
        "top_p": {"top_p": 0.5},
    }


@pytest.mark.parametrize("name", ["seed", "stop", "n", "logprobs", "top_k", "bad_words"])
def test_a_value_whose_class_raises_is_refused_by_name(name: str) -> None:
    with pytest.raises(ParamsError, match=name):
        resolve(**{name: Hidden()})


def test_values_that_cannot_be_compared_are_refused_by_name() -> None:
    made = ParamsResolver([("words", WordsParams)], Context(VOCAB), frozenset())
    made.resolve(SamplingParams(words=NotEqual("x")))
    with pytest.raises(ParamsError, match=r"comparing .*words.* raised SystemExit"):
        made.resolve(SamplingParams(words=NotEqual("x")))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"logit_bias": dict.fromkeys(range(WIDE), 1.0)}, "logit_bias: logits processor 'logit_bias', column"),
        ({"allowed_token_ids": range(WIDE)}, "allowed_token_ids: logits processor 'allowed_token_ids', column 'ids'"),
        ({"stop_token_ids": list(range(WIDE))}, f"stop_token_ids has {WIDE} ids, more than {MAX_RAGGED}"),
        ({"bad_words": [chr(256 + i // 99) + chr(256 + i % 99) for i in range(9000)]}, "bad_words: logits processor"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_would_widen_a_table_for_all_slots_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    made = resolver(WIDE)
    with pytest.raises(ParamsError, match=words):
        made.resolve(SamplingParams(**given))


def test_at_most_so_many_values_are_taken() -> None:
    assert resolver(WIDE).resolve(SamplingParams(allowed_token_ids=range(MAX_RAGGED))).processors


def test_a_bad_word_given_twice_counts_once() -> None:
    assert processors_of(resolve(bad_words=["ab", "c"] * 20_000)) == processors_of(resolve(bad_words=["ab", "c"]))


def test_a_list_that_holds_itself_is_refused_by_name() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ParamsError, match="allowed_token_ids"):
        resolve(allowed_token_ids=endless)


@pytest.mark.parametrize("packed", [np.array([2**40]), [1.5], [2**40], None])
def test_what_a_column_does_not_hold_is_refused(packed: Any) -> None:
    """Not cut to its lower bits, as numpy's casts do."""

    @dataclass(frozen=True)
    class Params(ProcessorParams):
        columns: ClassVar[dict[str, ColumnSpec]] = {"ids": ColumnSpec(dtype="int32", ragged=True)}  # type: ignore[misc]
        wide: int = 0

        def pack(self, ctx: Any) -> dict[str, Any]:
            return {"ids": packed}

    with pytest.raises(PluginError, match="logits processor 'wide', column 'ids'"):
        ParamsResolver([("wide", Params)], Context(VOCAB), frozenset()).resolve(SamplingParams(wide=1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"stop": "a\ud800"}, r"stop must be .*, not 'a.ud800': half of a surrogate pair"),
        ({"stop": ["a", "\udfff"]}, r"stop must be .*because of '.udfff'.: half of a surrogate pair"),
        ({"cache_salt": "\ud800"}, "cache_salt must be .*: half of a surrogate pair"),
        ({"bad_words": ["\ud800"]}, "bad_words must be .*: half of a surrogate pair"),
        ({"max_tokens": 10**5000}, "max_tokens must be .*: it does not fit in 64 bits"),
        ({"top_k": -(10**5000)}, "top_k must be an integer, not .*: it does not fit in 64 bits"),
        ({"logit_bias": {2**70: 1.0}}, "logit_bias must be .*: it does not fit in 64 bits"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids: no such token id"),
        ({"priority": 2**63}, "priority must be a 64-bit integer"),
        ({"temperature": 1e39}, "temperature must be a number from 0 .greedy. up, below 1e30, not 1e.39"),
        ({"n": True}, "n must be an integer, not True"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, or None, not 0"),
        ({"max_tokens": 4, "min_tokens": 5}, r"min_tokens must be at most max_tokens \(4\), not 5"),
        ({"min_tokens": -1}, "min_tokens must be at least 0"),
        ({"seed": 2**63}, "seed must be a 64-bit integer"),
        ({"seed": 1.0}, "seed must be an integer, or None, not 1.0"),
        ({"stop": ""}, "stop must be strings that are not empty"),
        ({"stop": ["a", ""]}, "stop must be strings that are not empty"),
        ({"stop": ["a", 3]}, r"stop must be a string, or a list of strings, or None, not \['a', 3\] \(because of 3\)"),
        ({"stop": "a", "detokenize": False}, "stop must be None if detokenize is False"),
        ({"logprobs": -2}, "logprobs must be at least 0, or -1 for the whole vocabulary"),
        ({"logprobs": VOCAB + 1}, "logprobs must be at most the size of the vocabulary, 256"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids: no such token id: .256.; ids are 0 to 255"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of integers, or None, not 5"),
        ({"cache_salt": ""}, "cache_salt must be a string that is not empty"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, not 1"),
        ({"temperature": -0.1}, "temperature must be a number from 0"),
        ({"temperature": float("nan")}, "temperature must be a number from 0"),
        ({"temperature": float("inf")}, "temperature must be a number from 0"),
        ({"temperature": "1"}, "temperature must be a number, not '1'"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"temperature": 10**400}, "temperature must be a number"),
        ({"top_k": -2}, "top_k must be at least 1, or 0 or -1 for all tokens, not -2"),
        ({"top_k": 2.0}, "top_k must be an integer, not 2.0"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1"),
        ({"min_p": 1.01}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": 2.5}, "presence_penalty must be from -2 to 2, not 2.5"),
        ({"frequency_penalty": -3}, "frequency_penalty must be from -2 to 2"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias: no such token id: 256; this model's ids are 0 to 255"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias must be a mapping from integers to numbers.*because of '5'"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias.5. must be a number below infinity"),
        ({"allowed_token_ids": []}, "allowed_token_ids must be a list with at least one id"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids: no such token id: -1"),
        ({"bad_words": "word"}, "bad_words must be a list of strings, or None, not 'word'"),
        ({"bad_words": [" "]}, "bad_words must be words that are not blank"),
        ({"top_pp": 0.9}, "SamplingParams has no field 'top_pp'; did you mean 'top_p'. Valid: allowed_token_ids, "),
    ],
)
def test_refusals_name_field_value_and_fix(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ParamsError, match=words):
        resolve(**given)


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED))
def test_what_vllm_has_and_we_do_not_is_refused_by_name(name: str) -> None:
    with pytest.raises(ParamsError, match=f"vLLM's '{name}' is not supported: {NOT_SUPPORTED[name][:20]}"):
        resolve(**{name: None})


def test_without_a_tokenizer_words_and_stop_strings_are_refused() -> None:
    class Bare(Context):
        def encode(self, text: str) -> list[int]:
            raise TokenizerMissing("no tokenizer")

    bare = ParamsResolver([(s.name, s.params) for s in BUILT_IN.values()], Bare(), frozenset())
    for given in ({"stop": "x"}, {"bad_words": ["x"]}):
        with pytest.raises(TokenizerMissing):
            bare.resolve(SamplingParams(**given))
    assert bare.resolve(SamplingParams(stop_token_ids=[1])).stop_set == {1}


def _within_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(5000):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"top_p": torch.tensor([[0.5]])}, "top_p must be a number"),
        ({"allowed_token_ids": torch.tensor(1)}, "allowed_token_ids must be a list of integers, or None"),
        ({"allowed_token_ids": _within_itself()}, "allowed_token_ids"),
        ({"bad_words": _deep()}, "]] cannot be a parameter: RecursionError"),
        ({"top_k": threading.Lock()}, "top_k: <unlocked _thread.lock"),
        ({"top_k": 10**5000}, "top_k"),
        ({"seed": 10**5000}, "seed must be an integer, or None"),
        ({"stop": ["x" * 10**6, 3]}, "stop must be"),
        ({"self": 1}, "no field 'self'"),
    ],
)
def test_a_value_that_cannot_even_be_shown_is_refused_by_field(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ParamsError) as caught:
        resolve(**given)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_params_as_a_value() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"], logit_bias={1: 2.0})
    assert repr(params) == "SamplingParams(stop=['a'], temperature=0.5, logit_bias={1: 2.0})"
    assert eval(repr(params)) == params
    for other in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params), copy.copy(params), params.replace()):
        assert other == params
        assert other is not params
    changed = params.replace(temperature=0.0, max_tokens=5)
    assert (changed.temperature, changed.max_tokens, changed.stop) == (0.0, 5, ["a"])
    assert changed != params
    assert SamplingParams(max_tokens=16) == SamplingParams()
    with pytest.raises(AttributeError, match=r"immutable: use params.replace\(temperature="):
        params.temperature = 1.0
    with pytest.raises(AttributeError, match="has no value for 'top_p': it was not given"):
        _ = params.top_p
    with pytest.raises(TypeError, match="unhashable"):
        hash(params)
    words = ["x"]
    kept = SamplingParams(stop=words, bad_words=words)
    words.append("y")
    assert (kept.stop, kept.bad_words) == (["x"], ["x"])


def test_equal_params_resolve_once_but_types_count() -> None:
    made = resolver(VOCAB)
    first = made.resolve(SamplingParams(temperature=0.7, stop=["a"]))
    assert made.resolve(SamplingParams(stop=["a"], temperature=0.7)) is first
    assert made.resolve(SamplingParams(temperature=0.7, stop=["b"])) is not first
    made.resolve(SamplingParams(temperature=1, top_k=1))
    for slip in (
        {"temperature": True, "top_k": 1},
        {"temperature": 1, "top_k": True},
        {"temperature": 1, "top_k": 1.0},
    ):
        with pytest.raises(ParamsError):
            made.resolve(SamplingParams(**slip))
    for k in range(1000):  # more than the cache holds
        assert processors_of(made.resolve(SamplingParams(top_k=k + 1)))["top_k"]["top_k"] == (
            k + 1 if k + 1 < VOCAB else 0
        )


# Processors of others -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OtherTopP(ProcessorParams):
    top_p: float = 1.0


@dataclass(frozen=True)
class StealsN(ProcessorParams):
    n: int = 1


@dataclass(frozen=True)
class NeedsAValue(ProcessorParams):
    strength: float


@dataclass(frozen=True)
class Unknown(ProcessorParams):
    strength: "Nowhere" = 1  # type: ignore[name-defined]  # noqa: F821, UP037


class NoDataclass(ProcessorParams):
    pass


@dataclass(frozen=True)
class HidesMembers(ProcessorParams):
    strength: float = 0.0
    start: bool = True  # type: ignore[assignment]
    pack: float = 0.0  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (OtherTopP, "'top_p' of logits processor 'mine' belongs to logits processor 'top_p' already"),
        (StealsN, "'n' of logits processor 'mine' belongs to SamplingParams itself already"),
        (NeedsAValue, "'mine': parameters without a default: strength"),
        (Unknown, "'mine': Unknown has an unknown annotation: .*Nowhere"),
        (NoDataclass, "'mine': NoDataclass must be a dataclass"),
        (HidesMembers, "'mine': fields with names of members of .*: start, pack; .* ClassVar"),
    ],
)
def test_unfit_processor_fields_are_named(params: type[ProcessorParams], words: str) -> None:
    processors = [*((s.name, s.params) for s in BUILT_IN.values()), ("mine", params)]
    with pytest.raises(PluginError, match=words):
        legal_fields(processors)
    with pytest.raises(PluginError, match=words):
        ParamsResolver(processors, Context(), frozenset())


@dataclass(frozen=True)
class Mine(ProcessorParams):
    best_of: int = 1  # a vLLM name that the engine itself does not serve
    heat: float = 1.0
    table: list[int] = field(default_factory=list)
    behave: Literal["well", "raise", "scalar", "text", "missing", "wide"] = "well"
    columns: ClassVar = {
        "heat": ColumnSpec(dtype="float32", default=1.0, op=StandardOp.TEMPERATURE),
        "table": ColumnSpec(dtype="int32", ragged=True),
    }

    def pack(self, ctx: Any) -> dict[str, Any]:
        if self.behave == "raise":
            raise KeyError("lost")
        made = {"heat": self.heat, "table": self.table}
        bad = {"scalar": {"table": 3}, "text": {"heat": "hot"}, "wide": {"table": [2**40]}}
        if self.behave == "missing":
            del made["table"]
        return made | bad.get(self.behave, {})


def test_a_processor_of_another() -> None:
    made = ParamsResolver([("mine", Mine)], Context(), frozenset())
    resolved = made.resolve(SamplingParams(best_of=2, heat=0, table=[1, 2]))
    assert processors_of(resolved) == {"mine": {"heat": 0.0, "table": [1, 2]}}
    assert resolved.greedy
    with pytest.raises(ParamsError, match=r"behave must be 'well' or 'raise' or .*, not 'badly'"):
        made.resolve(SamplingParams(behave="badly"))
    with pytest.raises(ParamsError, match="no field 'temperature'"):
        made.resolve(SamplingParams(temperature=1.0))


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        ("raise", "'mine': Mine failed on .*KeyError: 'lost'"),
        ("scalar", "'mine', column 'table': 3 is not a flat sequence"),
        ("text", "'mine', column 'heat': no float32: .*hot"),
        ("wide", "'mine', column 'table': no int32"),
        ("missing", r"'mine': packed \['heat'\] for its columns \['heat', 'table'\]"),
    ],
)
def test_a_misbehaving_processor_is_named(behave: str, words: str) -> None:
    made = ParamsResolver([("mine", Mine)], Context(), frozenset())
    with pytest.raises(PluginError, match=words):
        made.resolve(SamplingParams(behave=behave))


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, 1.0),
        (1, float | int, 1),
        (np.float64(2.5), float, 2.5),
        ((1, 2), list[int], [1, 2]),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ({1, 2}, set[int], {1, 2}),
        ({1: [2]}, dict[int, list[float]], {1: [2.0]}),
        (None, int | None, None),
        ("x", Any, "x"),
        (Level.LOW, int, 3),
        (Level.LOW, float, 3.0),
        (Level.LOW, Level, Level.LOW),
        (Level.LOW, float | int, 3.0),
        ([Level.LOW], list[int], [3]),
        (Text("x"), str, "x"),
        ({Text("x"): Number(0.5)}, dict[str, float], {"x": 0.5}),
    ],
    ids=repr,
)
def test_conform(value: Any, annotation: Any, expected: Any) -> None:
    got = conform("field", value, annotation)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("12", list[str]), (b"1", list[int]), ({1: 2}, list[int]), (np.bool_(True), int), ([1], tuple[int, str]),
        ([1, True], list[int]), (None, int), (1, bool), (3, Literal["3"]), (1, Literal[True]), ([], dict[str, int]),
    ],
)  # fmt: skip
def test_conform_refuses(value: Any, annotation: Any) -> None:
    with pytest.raises(ParamsError, match="field must be"):
        conform("field", value, annotation)
    assert describe(annotation)


def test_no_torch_is_imported() -> None:
    code = "import sys, nanoengine.params.sampling_params, nanoengine.plugins.samplers as s; s.register_samplers(); "
    subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], check=True, timeout=60)
