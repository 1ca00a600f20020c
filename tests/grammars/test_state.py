"""The state of one sample: looking ahead over drafts gives what feeding them gives, and leaves no trace."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from llguidance import LLExecutor

from nanoengine.api import Constraint, Matcher
from nanoengine.api.errors import GrammarError, RequestError
from nanoengine.api.grammars import Advanced
from nanoengine.plugins.grammars import llguidance
from nanoengine.plugins.samplers.grammar_state import GrammarState
from nanoengine.testing.byte_tokenizer import END, END_REASONING, byte_tokenizer

from .test_backends import EXAMPLES, PERSON, backend

TOKENIZER = byte_tokenizer()
END_ID, CLOSE = TOKENIZER.token_to_id(END), TOKENIZER.token_to_id(END_REASONING)
SIZE, VOCAB = TOKENIZER.get_vocab_size(), 320
CTX: Any = SimpleNamespace(vocab_size=VOCAB, num_tokens=SIZE, end_ids=frozenset([END_ID]), reasoning=None)
CONSTRAINTS = [constraint for constraint, _, _ in EXAMPLES]


def state(constraint: Constraint, reasoning: int | None = None) -> GrammarState:
    return GrammarState(backend().compile(constraint).matcher(), CTX, reasoning)


def allowed(row: Any) -> list[int]:
    ids: list[int] = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
    return ids


def after(constraint: Constraint, reasoning: int | None, tokens: list[int]) -> list[int]:
    made = state(constraint, reasoning)
    made.feed(tokens)
    return allowed(made.columns([])["allowed"][0])


@pytest.mark.parametrize("reasoning", [None, CLOSE])
@pytest.mark.parametrize("number", range(len(CONSTRAINTS)))
def test_looking_ahead_is_feeding(number: int, reasoning: int | None) -> None:
    """Drafts are mostly allowed ones, some cross the end of the reasoning or of the output, some are refused."""
    rng, constraint = random.Random(number), CONSTRAINTS[number]
    looked, fed = state(constraint, reasoning), list[int]()
    for _ in range(14):
        here = after(constraint, reasoning, fed)
        drafts, known = list[int](), here
        for _ in range(rng.randrange(5)):
            token = rng.choice(known) if rng.random() < 0.8 else rng.randrange(SIZE)
            token = CLOSE if reasoning is not None and rng.random() < 0.3 else token
            drafts.append(token)
            if token not in known:
                break
            known = after(constraint, reasoning, fed + drafts)
        masks = looked.columns(drafts)["allowed"]
        assert masks.shape == (1 + len(drafts), VOCAB // 32)
        for count in range(len(drafts) + 1):
            if count and drafts[count - 1] not in allowed(masks[count - 1]):
                break
            assert allowed(masks[count]) == after(constraint, reasoning, fed + drafts[:count]), (fed, drafts, count)
        assert max(here) < SIZE
        looked.forced()
        token = rng.choice(here)
        looked.feed([token])
        fed.append(token)


def by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """All matchers but the first, where there are threads."""
    for name, value in (("_SECONDS_ALONE", -1.0), ("_SECONDS_LEFT", -1.0), ("_LOOK_EVERY", 2)):
        monkeypatch.setattr(llguidance, name, value)


def together(monkeypatch: pytest.MonkeyPatch, threads: int) -> bool:
    """Whether states that are asked together, in steps in which some have got tokens and some have not, say what each
    says alone."""
    rng, executor = random.Random(1), LLExecutor(threads) if threads else None
    by_threads(monkeypatch)
    each = [(CONSTRAINTS[i // 2], CLOSE if i % 2 else None) for i in range(2 * len(CONSTRAINTS))]
    states, fed = [state(*one) for one in each], [list[int]() for _ in each]
    for made in states:
        made._matcher._executor = executor  # type: ignore[attr-defined]
        made.stop_ids = frozenset([ord("!")])
    new = [list[int]() for _ in each]
    for _ in range(12):
        out = np.full((len(states), VOCAB // 32), 0x5A5A5A5A, np.int32)
        if GrammarState.columns_together(states, new, {"allowed": out}):
            return False
        for i, (made, tokens, (constraint, reasoning)) in enumerate(zip(states, fed, each, strict=True)):
            tokens += new[i]
            alone = state(constraint, reasoning)
            alone.stop_ids = made.stop_ids
            if tokens:
                alone.feed(tokens)
            here = allowed(out[i])
            if here != allowed(alone.columns([])["allowed"][0]) or list(made.forced()) != list(alone.forced()):
                return False
            token = CLOSE if reasoning is not None and rng.random() < 0.3 and CLOSE in here else rng.choice(here)
            new[i] = [token] if rng.random() < 0.8 else []
            if new[i] and rng.random() < 0.2:
                alone.feed(new[i])
                new[i].append(rng.choice(allowed(alone.columns([])["allowed"][0])))
    assert sum(map(len, fed)) > 100
    return True


@pytest.mark.parametrize("threads", [0, 2])
def test_states_that_are_asked_together_say_what_each_says_alone(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """By calls of llguidance for all of them, or one by one."""
    assert together(monkeypatch, threads)


def rows_shifted(patch: pytest.MonkeyPatch) -> None:
    advance = llguidance._Matcher.advance

    def broken(matchers: Any, tokens: Any, out: Any) -> Any:
        result = advance(matchers, tokens, out)
        out[:] = np.roll(out, 1, axis=0)
        return result

    patch.setattr(llguidance._Matcher, "advance", broken)


def masks_before_feeding(patch: pytest.MonkeyPatch) -> None:
    advance = llguidance._Matcher.advance
    patch.setattr(
        llguidance._Matcher, "advance", lambda matchers, tokens, out: advance(matchers, [None] * len(tokens), out)
    )


def ends_of_others(patch: pytest.MonkeyPatch) -> None:
    may_end = GrammarState._may_end.fget  # type: ignore[attr-defined]
    patch.setattr(GrammarState, "_may_end", property(lambda self: self._num_fed % 2 == 0 and may_end(self)))


@pytest.mark.parametrize("mutant", [rows_shifted, masks_before_feeding, ends_of_others])
def test_mutants_of_asking_together_are_caught(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    mutant(monkeypatch)
    try:
        same = together(monkeypatch, 2)
    except (RequestError, IndexError):
        same = False
    assert not same


@pytest.mark.parametrize("threads", [0, 2])
def test_a_state_that_fails_among_others_fails_alone(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """One's mask is beyond the limits, one is fed what its grammar refuses, and one several such tokens."""
    by_threads(monkeypatch)
    states = [state(Constraint(kind="regex", text="ab?")) for _ in range(5)]
    for made in states:
        made._matcher._executor = LLExecutor(threads) if threads else None  # type: ignore[attr-defined]

    def failing(matchers: Any, tokens: Any, out: Any) -> Any:
        found = advance(matchers, tokens, out)
        at = [i for i, each in enumerate(matchers) if each is states[1]._matcher]
        return Advanced({**found.failed, **dict.fromkeys(at, GrammarError("beyond its limits"))}, found.complete)

    advance = llguidance._Matcher.advance
    monkeypatch.setattr(llguidance._Matcher, "advance", failing)
    out = np.zeros((5, VOCAB // 32), np.int32)
    fed = [[ord("a")], [], [ord("x")], [ord("a"), ord("b"), ord("b")], []]
    failed = GrammarState.columns_together(states, fed, {"allowed": out})
    assert failed is not None
    assert sorted(failed) == [1, 2, 3]
    assert str(failed[1]) == "beyond its limits"
    assert "token 0 of the output, id 120, is not allowed by the grammar" in str(failed[2])
    assert "token 2 of the output, id 98, is not allowed by the grammar" in str(failed[3])
    assert allowed(out[0]) == sorted([ord("b"), END_ID])
    assert allowed(out[4]) == [ord("a")]


class _SaysByNumpy(llguidance._Matcher):
    advance = classmethod(Matcher.advance.__func__)  # type: ignore[assignment]  # one by one

    @property
    def is_accepting(self) -> Any:
        return np.bool_(super().is_accepting)


def test_a_matcher_may_say_by_a_bool_of_numpy_that_the_output_is_complete() -> None:
    """As one does that looks it up in an array."""
    states = [state(Constraint(kind="regex", text="ab?")) for _ in range(4)]
    for made in states:
        made._matcher = _SaysByNumpy(made._matcher._matcher)  # type: ignore[attr-defined]
    states[2].feed([ord("a"), END_ID])
    out = np.zeros((4, VOCAB // 32), np.int32)
    assert not GrammarState.columns_together(states, [[], [ord("a")], [], [ord("a"), END_ID]], {"allowed": out})
    assert [allowed(row) for row in out] == [[ord("a")], [ord("b"), END_ID], [END_ID], [END_ID]]


def test_the_end_follows_the_grammar() -> None:
    made = state(Constraint(kind="choice", text='["a", "ab"]'))
    assert allowed(made.columns([])["allowed"][0]) == [ord("a")]
    made.feed([ord("a")])
    assert allowed(made.columns([])["allowed"][0]) == [ord("b"), END_ID]
    masks = made.columns([ord("b"), END_ID, END_ID])["allowed"]
    assert [allowed(row) for row in masks[1:]] == [[END_ID]] * 3
    made.feed([END_ID, END_ID])
    assert allowed(made.columns([])["allowed"][0]) == [END_ID]
    assert list(made.forced()) == []


def test_the_requests_own_stop_tokens_are_allowed_at_the_end() -> None:
    """One that is a token of the grammar, too, is that until the end."""
    made = state(Constraint(kind="regex", text="ab?"))
    made.stop_ids = frozenset([ord("b"), ord("!")])
    assert allowed(made.columns([])["allowed"][0]) == [ord("a")]
    masks = made.columns([ord("a"), ord("b"), ord("!"), END_ID])["allowed"]
    assert [allowed(row) for row in masks] == [
        [ord("a")], sorted([ord("b"), ord("!"), END_ID]), *[sorted([ord("b"), ord("!"), END_ID])] * 3
    ]  # fmt: skip
    assert allowed(made.columns([])["allowed"][0]) == [ord("a")]
    made.feed([ord("a"), ord("!")])
    with pytest.raises(RequestError):
        made.feed([ord("x")])


@pytest.mark.parametrize("tokens", [[ord("x")], [END_ID], [ord("a"), END_ID, ord("a")]])
def test_a_token_that_is_not_allowed_is_an_error(tokens: list[int]) -> None:
    made = state(Constraint(kind="choice", text='["a"]'))
    with pytest.raises(RequestError, match=f"token {len(tokens) - 1} of the output, id {tokens[-1]}") as caught:
        made.feed(tokens)
    assert caught.value.code == "grammar_failed"


def test_before_the_end_of_the_reasoning_all_tokens_are_allowed_but_the_end() -> None:
    made = state(Constraint(kind="json", text=json.dumps(PERSON)), CLOSE)
    assert allowed(made.columns([])["allowed"][0]) == [i for i in range(SIZE) if i != END_ID]
    assert list(made.forced()) == []
    made.feed([5, 6, CLOSE])
    assert set(allowed(made.columns([])["allowed"][0])) <= {*b'{ \n\r\t', TOKENIZER.token_to_id('{"'),
                                                            TOKENIZER.token_to_id("  ")}  # fmt: skip


def test_one_mask_serves_forced_and_columns() -> None:
    """A mask is most of what a row costs the host."""
    made, calls = state(Constraint(kind="regex", text="[ab]cdef(gh)?")), list[int]()
    matcher: Any = made._matcher
    whole = matcher.mask
    matcher.mask = lambda out: (calls.append(1), whole(out))
    for token, forced in ((None, ""), (ord("a"), "cdef"), (ord("c"), "def")):
        made.feed([] if token is None else [token])
        calls.clear()
        assert bytes(made.forced()).decode() == forced
        assert len(calls) == 1 + len(forced)  # those of the places behind it
        made.columns([])
        made.columns([])
        assert len(calls) == 1 + len(forced)
