"""The state of one sample: looking ahead over drafts gives what feeding them gives, and leaves no trace."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from llguidance import LLExecutor

from nanoengine.api import Constraint
from nanoengine.api.errors import GrammarError, RequestError
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


def together(monkeypatch: pytest.MonkeyPatch, threads: int) -> bool:
    """Whether states that look ahead together, in steps in which some have got a token and some have not, say what each
    says alone."""
    rng, executor = random.Random(1), LLExecutor(threads) if threads else None
    monkeypatch.setattr(llguidance, "_FEWEST_IN_PARALLEL", 2)
    each = [(CONSTRAINTS[i // 2], CLOSE if i % 2 else None) for i in range(2 * len(CONSTRAINTS))]
    states, fed = [state(*one) for one in each], [list[int]() for _ in each]
    for made in states:
        made._matcher._executor = executor  # type: ignore[attr-defined]
        made.stop_ids = frozenset([ord("!")])
    for _ in range(12):
        GrammarState.look_ahead(states)
        for made, tokens, (constraint, reasoning) in zip(states, fed, each, strict=True):
            alone = state(constraint, reasoning)
            alone.stop_ids = made.stop_ids
            alone.feed(tokens)
            if list(made.forced()) != list(alone.forced()):
                return False
            here = allowed(made.columns([])["allowed"][0])
            if here != allowed(alone.columns([])["allowed"][0]):
                return False
            if rng.random() < 0.7:
                token = CLOSE if reasoning is not None and rng.random() < 0.3 and CLOSE in here else rng.choice(here)
                made.feed([token])
                tokens.append(token)
    assert sum(map(len, fed)) > 100
    return True


@pytest.mark.parametrize("threads", [0, 2])
def test_states_look_ahead_together(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """By one call of llguidance for all of them, and one by one."""
    assert together(monkeypatch, threads)


def rows_shifted(patch: pytest.MonkeyPatch) -> None:
    masks = llguidance._Matcher.masks
    patch.setattr(llguidance._Matcher, "masks", lambda matchers, out: masks(matchers[1:] + matchers[:1], out))


def masks_of_the_step_before(patch: pytest.MonkeyPatch) -> None:
    feed = GrammarState.feed

    def broken(self: GrammarState, token_ids: Any) -> None:
        known = self._next
        feed(self, token_ids)
        self._next = known

    patch.setattr(GrammarState, "feed", broken)


@pytest.mark.parametrize("mutant", [rows_shifted, masks_of_the_step_before])
def test_mutants_of_looking_ahead_are_caught(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    mutant(monkeypatch)
    try:
        same = together(monkeypatch, 2)
    except (RequestError, IndexError):
        same = False
    assert not same


def test_a_state_that_fails_ahead_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [state(Constraint(kind="regex", text="ab?")) for _ in range(3)]

    def failing(out: Any) -> None:
        raise GrammarError("beyond its limits")

    states[1]._matcher.mask = failing  # type: ignore[method-assign]
    GrammarState.look_ahead(states)
    for made in (states[0], states[2]):
        assert allowed(made.columns([])["allowed"][0]) == [ord("a")]
    with pytest.raises(GrammarError, match="beyond its limits"):
        states[1].forced()


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
