"""Which drafts the next row of a request has: what its drafter guesses, as far as its guesses were accepted so far."""

from __future__ import annotations

import logging

from nanoengine.api.draft_checks import CheckedDrafter, CheckedState
from nanoengine.api.drafters import DraftSample
from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request
from nanoengine.params.speculation import Acceptance

_log = logging.getLogger(__name__)


class Speculation:
    """The drafts of a scheduler's requests, by one drafter.

    on_device: the device makes them, behind each draw: rows with drafts run ahead. Else a request has some only while
    nothing of it is in flight.
    """

    def __init__(self, drafter: CheckedDrafter | None, *, tokens: int, min_acceptance: float, step_tokens: int) -> None:
        """drafter: None: the device's. The others are as in `SpeculationOptions`."""
        self.on_device = drafter is None
        self._drafter, self._least, self._step_tokens = drafter, min_acceptance, step_tokens
        self._all = Acceptance([1.0] * tokens, min_acceptance, memory=32)  # a new request begins with what others had
        self._acceptance: dict[Request, Acceptance] = {}
        self._states: dict[Request, CheckedState] = {}
        self._waits: set[Request] = set()  # requests that do not run ahead, as a draft may follow the token in flight
        self._failed: dict[Request, RequestError] = {}  # what the drafter raised, until the request is picked
        self._warned = False

    def most(self, request: Request) -> int:
        """How many drafts the next row of a request may have; 0: a plain row, which may run ahead.

        With a token in flight the drafter is asked what may follow it, so the request waits only for a draft.
        """
        if not request.params.speculate or request.num_computed < request.length - 1:
            return 0
        found = self._acceptance.get(request)
        if found is None:
            found = self._acceptance[request] = Acceptance(self._all.shares, self._least)
        fair = self._step_tokens // len(self._acceptance) - 1
        depth = max(0, min(fair, found.depth(len(request.output_token_ids))))
        if self.on_device or not depth or request.num_in_flight != 1:
            return depth
        try:
            if len(self._ask(request, 2)) < 2:
                return 0
            self._waits.add(request)
            return depth
        except RequestError as error:
            self._failed[request] = error
            return depth

    def propose(self, request: Request, most: int) -> list[int]:
        """At most `most` drafts for the next row of a request; -1: one that the device has.

        Raises `RequestError("drafter_failed")`.
        """
        if self._drafter is None:
            return [-1] * most
        if request in self._failed:
            raise self._failed.pop(request)
        drafts = self._ask(request, most)
        if not drafts and request in self._waits:  # it has cost what a refused draft costs, and is in no statistics
            self.committed(request, 1, 0)
        self._waits.discard(request)
        return drafts

    def _ask(self, request: Request, most: int) -> list[int]:
        assert self._drafter is not None
        state = self._states.get(request)
        if state is None:
            sample = DraftSample(
                request=request.parent, index=request.sample_index, seed=request.seed, cache_key=request.cache_key
            )
            state = self._states[request] = self._drafter.start(request.prompt_token_ids, sample)
        state.feed(request.output_token_ids)
        return state.draft(most)

    def committed(self, request: Request, drafted: int, accepted: int) -> None:
        """A row of it had `drafted` drafts, of which the first `accepted` counted; its output has them already."""
        if not drafted:
            return
        self._all.observe(drafted, accepted)
        found = self._acceptance.get(request)
        if found is not None:
            found.adapt(len(request.output_token_ids), drafted, accepted)

    def end(self, request: Request) -> None:
        """The request has ended, or failed. What its drafter raises now fails no request, so it is logged, once."""
        self._acceptance.pop(request, None)
        self._failed.pop(request, None)
        self._waits.discard(request)
        state = self._states.pop(request, None)
        if state is None or state.failed:
            return
        try:
            state.feed(request.output_token_ids)
            state.end()
        except RequestError as error:
            if not self._warned:
                _log.warning("speculation: %s", error)
            self._warned = True
