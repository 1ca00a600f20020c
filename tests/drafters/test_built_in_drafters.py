"""The built-in drafters against references that search all tokens anew for each draft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoengine.api import DrafterContext, DraftSample, DraftState, ParamsError
from nanoengine.plugins.drafters.ngram import NgramDrafter
from nanoengine.plugins.drafters.params import NgramParams, SuffixParams
from nanoengine.plugins.drafters.suffix import History, Samples, SuffixDrafter

CTX = DrafterContext(tokens=8, vocab_size=1000, max_model_len=1 << 20, max_slots=8, device="cpu")
SAMPLE = DraftSample(request="r", index=0, seed=0)
TOKENS = st.lists(st.integers(0, 3), max_size=40)  # few ids, so that there are many matches


def sample(index: int = 0, key: bytes = b"") -> DraftSample:
    return DraftSample(request="r", index=index, seed=0, cache_key=key)


# -- ngram ------------------------------------------------------------------------------------------------------------


def ngram_reference(tokens: Sequence[int], most: int, min_n: int, max_n: int) -> list[int]:
    for n in range(max_n, min_n - 1, -1):
        tail = list(tokens[len(tokens) - n :])
        if len(tail) < n or len(tokens) < n:
            continue
        for at in range(len(tokens) - 1, n - 1, -1):  # the newest place first
            if list(tokens[at - n : at]) == tail:
                out = list(tokens)
                for _ in range(most):
                    out.append(out[at + len(out) - len(tokens)])
                return out[len(tokens) :]
    return []


@given(prompt=TOKENS, parts=st.lists(TOKENS, max_size=5), most=st.integers(0, 8), data=st.data())
def test_ngram_is_the_longest_newest_match(prompt: list[int], parts: list[list[int]], most: int, data: Any) -> None:
    min_n = data.draw(st.integers(1, 4))
    max_n = data.draw(st.integers(min_n, 5))
    state = NgramDrafter(CTX, NgramParams(min_n=min_n, max_n=max_n)).start(prompt, SAMPLE)
    tokens = list(prompt)
    for part in [[], *parts]:
        state.feed(part)
        tokens += part
        assert list(state.draft(most)) == ngram_reference(tokens, most, min_n, max_n)
        assert list(state.draft(most)) == list(state.draft(most))  # looks, does not advance


def test_ngram_continues_what_repeats_itself() -> None:
    state = NgramDrafter(CTX, NgramParams()).start([9, 1, 2, 1, 2], SAMPLE)
    assert list(state.draft(5)) == [1, 2, 1, 2, 1]


def test_ngram_takes_a_bounded_number_of_entries_per_token() -> None:
    state: Any = NgramDrafter(CTX, NgramParams(min_n=2, max_n=4)).start(range(1000), SAMPLE)
    assert 3 * 990 < len(state._behind) <= 3 * 1000


class Counting(dict[Any, Any]):
    """A dictionary that counts what is entered and looked up."""

    work = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.work += 1
        super().__setitem__(key, value)

    def get(self, key: Any, default: Any = None) -> Any:
        self.work += 1
        return super().get(key, default)


def test_ngram_does_not_search_old_tokens_again() -> None:
    """The work for a token does not depend on how many there were before."""
    state: Any = NgramDrafter(CTX, NgramParams(min_n=2, max_n=4)).start(range(5000), SAMPLE)
    state._behind = Counting(state._behind)
    for token in range(100):
        state.feed([token])
        state.draft(4)
    assert 100 * 4 <= state._behind.work <= 100 * 6  # 3 entries and 3 look-ups each


# -- suffix -----------------------------------------------------------------------------------------------------------


def guess_reference(
    samples: Sequence[Sequence[int]], context: Sequence[int], most: int, params: SuffixParams, own: bool
) -> tuple[list[int], float]:
    """`samples` in the order in which they came. own: the last of them is the one that is continued."""
    size = params.min_match
    tail = list(context[len(context) - size :])
    places = [
        (n, i)
        for n, tokens in enumerate(samples)
        for i in range(size, len(tokens))
        if len(tail) == size and list(tokens[i - size : i]) == tail
    ][-params.max_places :]

    def matches(place: tuple[int, int], length: int) -> bool:
        n, i = place
        return i >= length and list(samples[n][i - length : i]) == list(context[len(context) - length :])

    length = max(
        (k for k in range(size, min(params.max_match, len(context)) + 1) if any(matches(p, k) for p in places)),
        default=size,
    )
    here = [p for p in places if matches(p, length)]
    drafted: list[int] = []
    expected = 0.0
    for _ in range(min(most, int(params.per_match * length))):
        texts = [[*tokens, *(drafted if own and n == len(samples) - 1 else [])] for n, tokens in enumerate(samples)]
        follow = [
            texts[n][i + len(drafted)]
            for n, i in here
            if i + len(drafted) < len(texts[n]) and texts[n][i : i + len(drafted)] == drafted
        ]
        if not follow:
            break
        counts = Counter(follow)
        token = max(reversed(follow), key=counts.__getitem__)  # of equals the newest
        if counts[token] < params.min_share * len(here):
            break
        drafted.append(token)
        expected += counts[token] / len(here)
    return drafted, expected


PARAMS = st.builds(
    SuffixParams,
    min_match=st.integers(1, 3),
    max_match=st.integers(3, 6),
    max_places=st.integers(1, 6),
    max_tokens=st.integers(0, 60),
    min_share=st.sampled_from([0.1, 0.4, 1.0]),
    per_match=st.sampled_from([0.5, 1.0, 4.0]),
)


@given(params=PARAMS, prompt=TOKENS, parts=st.lists(TOKENS, max_size=3), most=st.integers(0, 8))
def test_suffix_own_guess_is_the_most_frequent_continuation(
    params: SuffixParams, prompt: list[int], parts: list[list[int]], most: int
) -> None:
    history = History(params)
    tokens: list[int] = []
    for part in [prompt, *parts]:
        history.feed(part)
        tokens += part
        found = history.guess(history.tokens, most)
        drafted, expected = guess_reference([tokens], tokens, most, params, own=True)
        assert (list(found.token_ids), found.expected) == (drafted, pytest.approx(expected))
        assert history.tokens == tokens


@given(params=PARAMS, ended=st.lists(TOKENS, max_size=8), context=TOKENS, most=st.integers(0, 8))
def test_suffix_learns_from_the_newest_ended_samples(
    params: SuffixParams, ended: list[list[int]], context: list[int], most: int
) -> None:
    samples = Samples(params)
    kept: list[list[int]] = []
    for tokens in ended:
        samples.add(b"", tokens)
        if tokens and params.max_tokens:
            kept.append(tokens[-params.max_tokens :])
        while sum(map(len, kept)) > params.max_tokens:
            del kept[0]
        assert samples.num_tokens == sum(map(len, kept)) <= params.max_tokens
    if not kept:
        assert samples.histories == {}
        return
    found = samples.histories[b""].guess(context, most)
    drafted, expected = guess_reference(kept, context, most, params, own=False)
    assert (list(found.token_ids), found.expected) == (drafted, pytest.approx(expected))


@given(params=PARAMS, ended=st.lists(st.tuples(st.sampled_from([b"a", b"b"]), TOKENS), max_size=12))
def test_suffix_forgets_all_of_a_sample(params: SuffixParams, ended: list[tuple[bytes, list[int]]]) -> None:
    """What is dropped leaves no entry: the index has places of tokens that are there, and nothing else."""
    samples = Samples(params)
    for key, tokens in ended:
        samples.add(key, tokens)
    left = sum(len(history.tokens) - history.tokens.count(-1) for history in samples.histories.values())
    assert left == samples.num_tokens <= params.max_tokens
    for history in samples.histories.values():
        for gram, places in history.places.items():
            assert 0 < len(places) <= params.max_places
            for place in places:
                at = place - history._base
                assert tuple(history.tokens[at - params.min_match : at]) == gram
                assert -1 not in gram
                assert history.tokens[at] >= 0


def run(drafter: SuffixDrafter, prompt: list[int], output: list[int], key: bytes = b"") -> list[list[int]]:
    """The drafts before each token of the output."""
    state: DraftState = drafter.start(prompt, sample(key=key))
    drafts = []
    for token in output:
        drafts.append(list(state.draft(4)))
        state.feed([token])
    state.end()
    return drafts


def test_suffix_drafts_what_an_earlier_sample_had() -> None:
    drafter = SuffixDrafter(CTX, SuffixParams())
    first = run(drafter, [1, 2, 3], [10, 11, 12, 13, 14, 15])
    again = run(drafter, [7, 2, 3], [10, 11, 12, 13, 14, 15])
    assert first == [[]] * 6
    assert again[0] == [10, 11, 12, 13]
    assert again[1] == [11, 12, 13, 14]


def test_suffix_drafts_what_is_most_frequent() -> None:
    drafter = SuffixDrafter(CTX, SuffixParams())
    for token in (5, 6, 6, 5, 6):
        run(drafter, [1, 2, 3], [token, token])
    run(drafter, [1, 2, 3], [5, 5])  # three each: the newest counts
    assert run(drafter, [1, 2, 3], [0])[0] == [5, 5]
    run(drafter, [1, 2, 3], [6, 6])
    assert run(drafter, [1, 2, 3], [0])[0] == [6, 6]


def test_suffix_does_not_learn_from_samples_with_another_cache_salt() -> None:
    drafter = SuffixDrafter(CTX, SuffixParams())
    run(drafter, [1, 2, 3], [10, 11, 12], key=b"a")
    assert run(drafter, [1, 2, 3], [10], key=b"b") == [[]]
    assert run(drafter, [1, 2, 3], [10], key=b"a") == [[10, 11, 12]]


@given(requests=st.lists(st.tuples(TOKENS, TOKENS), max_size=5))
def test_suffix_gives_the_same_drafts_again(requests: list[tuple[list[int], list[int]]]) -> None:
    one, two = (SuffixDrafter(CTX, SuffixParams(min_match=1)) for _ in range(2))
    assert [run(one, *request) for request in requests] == [run(two, *request) for request in requests]


def test_suffix_memory_is_bounded_by_its_parameter() -> None:
    params = SuffixParams(max_tokens=500)
    drafter = SuffixDrafter(CTX, params)
    for i in range(300):
        run(drafter, [i % 90, 1, 2], [(i * j) % 97 for j in range(20)], key=bytes([i % 3]))
        assert drafter.samples.num_tokens <= 500
        assert sum(len(h.tokens) for h in drafter.samples.histories.values()) <= 500 + 500 // 23 + 1
        assert sum(len(h.places) for h in drafter.samples.histories.values()) <= 500


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "values", "text"),
    [
        (NgramParams, {"min_n": 0}, "min_n must be from 1 to 64, not 0"),
        (NgramParams, {"min_n": 5}, "max_n must be from min_n"),
        (NgramParams, {"max_n": 65}, "max_n must be from min_n"),
        (SuffixParams, {"min_match": 0}, "min_match"),
        (SuffixParams, {"max_match": 1}, "max_match must be from min_match"),
        (SuffixParams, {"max_places": 0}, "max_places"),
        (SuffixParams, {"max_tokens": -1}, "max_tokens"),
        (SuffixParams, {"min_share": 0.0}, "min_share"),
        (SuffixParams, {"per_match": 0.0}, "per_match"),
    ],
)
def test_parameters_out_of_range_are_refused(params: Any, values: dict[str, Any], text: str) -> None:
    with pytest.raises(ParamsError, match=text):
        params(**values)
