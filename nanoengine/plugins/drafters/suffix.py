"""What followed the sample's last tokens before, in the sample itself and in samples that have ended.

The idea: Oliaro et al., "SuffixDecoding" (arXiv 2411.04975): walk down a suffix tree, at each token into the child that
was seen most often. Here the tree is not built. A node is the list of the places where its text was seen, found by an
index of short suffixes; a step into a child keeps the places that go on with the child's token. It pays where requests
are like each other: agents, repeated questions, templates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from nanoengine.api import DrafterContext, DraftSample, DraftState, HostDrafter
from nanoengine.plugins.drafters.params import SuffixParams

_END = -1  # behind each sample, so that no match and no draft crosses from one to the next


class Guess(NamedTuple):
    """A draft. expected: how many of its tokens would have been accepted, averaged over the places it comes from."""

    token_ids: Sequence[int] = ()
    expected: float = 0.0


class History:
    """Tokens of samples, one after the other, and the places behind each run of `min_match` tokens.

    A token takes about 220 bytes. A place is the number of a token since the first one ever, so that it stays valid
    when the oldest tokens are dropped.
    """

    def __init__(self, params: SuffixParams) -> None:
        self._params = params
        self._base = 0  # place of tokens[0]
        self._start = 0  # index of the newest sample's first token
        self.tokens: list[int] = []
        self.places: dict[tuple[int, ...], list[int]] = {}  # the newest `max_places` each, the oldest first

    def feed(self, token_ids: Sequence[int]) -> None:
        """More tokens of the newest sample."""
        tokens, size, old = self.tokens, self._params.min_match, len(self.tokens)
        tokens += token_ids
        for i in range(max(old, self._start + size), len(tokens)):
            found = self.places.setdefault(tuple(tokens[i - size : i]), [])
            found.append(self._base + i)
            if len(found) > self._params.max_places:
                del found[0]

    def end(self) -> None:
        """The newest sample is complete."""
        self.tokens.append(_END)
        self._start = len(self.tokens)

    def drop(self, count: int) -> None:
        """Forgets the oldest sample, which has so many tokens."""
        for i in range(self._params.min_match, count):
            gram = tuple(self.tokens[i - self._params.min_match : i])
            found = self.places.get(gram, [])
            if found and found[0] == self._base + i:  # else newer places have replaced it
                del found[0]
                if not found:
                    del self.places[gram]
        del self.tokens[: count + 1]
        self._base += count + 1
        self._start -= count + 1

    def guess(self, context: Sequence[int], most: int) -> Guess:
        """What mostly followed the longest suffix of `context` that is here; of equals, what followed it last."""
        length, here = self._longest(context)
        most = min(most, int(self._params.per_match * length))
        own, all_here = context is self.tokens, len(here)
        drafted: list[int] = []
        expected = 0.0
        while here and len(drafted) < most:
            counts: dict[int, int] = {}
            for i in reversed(here):
                if i < len(self.tokens) and self.tokens[i] != _END:
                    counts[self.tokens[i]] = counts.get(self.tokens[i], 0) + 1
            token = max(counts, key=counts.__getitem__, default=_END)
            if token == _END or counts[token] < self._params.min_share * all_here:
                break
            expected += counts[token] / all_here
            here = [i + 1 for i in here if i < len(self.tokens) and self.tokens[i] == token]
            drafted.append(token)
            if own:
                self.tokens.append(token)  # for the time of the walk: what repeats itself goes on doing so
        if own:
            del self.tokens[len(self.tokens) - len(drafted) :]
        return Guess(drafted, expected)

    def _longest(self, context: Sequence[int]) -> tuple[int, list[int]]:
        """Length of the longest suffix of `context` that is here, and indices of the tokens behind it."""
        length, most = self._params.min_match, min(self._params.max_match, len(context))
        here = [place - self._base for place in self.places.get(tuple(context[-length:]), ())]
        while here and length < most:
            before = context[-length - 1]
            longer = [i for i in here if i > length and self.tokens[i - length - 1] == before]
            if not longer:
                break
            here, length = longer, length + 1
        return length, here


class Samples:
    """Ended samples, by cache key: at most `max_tokens` tokens in all, the newest."""

    def __init__(self, params: SuffixParams) -> None:
        self._params = params
        self._order: deque[tuple[bytes, int]] = deque()  # key and length of each sample, the oldest first
        self.num_tokens = 0
        self.histories: dict[bytes, History] = {}

    def add(self, key: bytes, token_ids: Sequence[int]) -> None:
        kept = token_ids[max(0, len(token_ids) - self._params.max_tokens) :]
        if not kept:
            return
        history = self.histories.setdefault(key, History(self._params))
        history.feed(kept)
        history.end()
        self._order.append((key, len(kept)))
        self.num_tokens += len(kept)
        while self.num_tokens > self._params.max_tokens:
            oldest, count = self._order.popleft()
            self.num_tokens -= count
            self.histories[oldest].drop(count)
            if not self.histories[oldest].tokens:
                del self.histories[oldest]


class SuffixDrafter(HostDrafter):
    params: SuffixParams

    def __init__(self, ctx: DrafterContext, params: SuffixParams) -> None:
        super().__init__(ctx, params)
        self.samples = Samples(params)

    def start(self, prompt_token_ids: Sequence[int], sample: DraftSample) -> DraftState:
        return _Suffix(self.samples, sample.cache_key, prompt_token_ids, self.params)


class _Suffix(DraftState):
    """Guesses from the sample's own tokens and from ended samples; the one of which more is expected."""

    def __init__(self, samples: Samples, key: bytes, prompt_token_ids: Sequence[int], params: SuffixParams) -> None:
        self._samples, self._key = samples, key
        self._own = History(params)
        self._own.feed(prompt_token_ids)

    def feed(self, token_ids: Sequence[int]) -> None:
        self._own.feed(token_ids)

    def draft(self, most: int) -> Sequence[int]:
        tokens = self._own.tokens
        own, shared = self._own.guess(tokens, most), self._samples.histories.get(self._key)
        other = Guess() if shared is None else shared.guess(tokens, most)
        return (other if other.expected > own.expected else own).token_ids

    def end(self) -> None:
        self._samples.add(self._key, self._own.tokens)
