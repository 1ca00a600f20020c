"""Prompt lookup: what followed the sample's last tokens when they were last there, in its prompt or its output.

The idea: Saxena, "Prompt Lookup Decoding" (2023). It pays where the output repeats the prompt: summaries, edits of
code, answers about a document.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanoengine.api import DrafterContext, DraftSample, DraftState, HostDrafter
from nanoengine.plugins.drafters.params import NgramParams


class NgramDrafter(HostDrafter):
    params: NgramParams

    def __init__(self, ctx: DrafterContext, params: NgramParams) -> None:
        super().__init__(ctx, params)

    def start(self, prompt_token_ids: Sequence[int], sample: DraftSample) -> DraftState:
        return _Lookup(prompt_token_ids, self.params)


class _Lookup(DraftState):
    """A dictionary from each n-gram to the place behind its newest occurrence, for all n in the range.

    A token costs one entry for each n, about 140 bytes. A draft costs one look-up for each n.
    """

    def __init__(self, prompt_token_ids: Sequence[int], params: NgramParams) -> None:
        self._sizes = range(params.max_n, params.min_n - 1, -1)  # the longest first
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        self.feed(prompt_token_ids)

    def feed(self, token_ids: Sequence[int]) -> None:
        """Enters the n-grams that the new tokens follow. So the last n-gram of all is not entered yet, and a draft
        finds where it was before."""
        tokens, old = self._tokens, len(self._tokens)
        tokens += token_ids
        for n in self._sizes:
            for place in range(max(old, n), len(tokens)):
                self._behind[tuple(tokens[place - n : place])] = place

    def draft(self, most: int) -> Sequence[int]:
        for n in self._sizes:
            place = self._behind.get(tuple(self._tokens[-n:]))
            if place is not None:
                found = self._tokens[place : place + most]
                return [found[i % len(found)] for i in range(most)]  # at the end: what repeats itself goes on doing so
        return ()
