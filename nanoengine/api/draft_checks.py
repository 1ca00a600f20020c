"""Drafters as the core calls them: drafts are checked, and errors name the plugin. Imports no torch."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from nanoengine.api.drafters import DeviceDrafter, DraftSample, DraftState, DraftStep, HostDrafter
from nanoengine.api.errors import PluginError, shown
from nanoengine.api.plugin_calls import failing_request, name_of, plugin_step

if TYPE_CHECKING:
    from torch import Tensor


class CheckedDrafter:
    """Starts checked states. `where`: the drafter's name and origin, for messages.

    All methods raise `RequestError("drafter_failed")` if the drafter raises, or returns what is no draft.
    """

    def __init__(self, drafter: HostDrafter, where: str) -> None:
        self._drafter, self._where = drafter, where

    def start(self, prompt_token_ids: Sequence[int], sample: DraftSample) -> CheckedState:
        with _failing("start", self._where, self._drafter):
            state: object = self._drafter.start(prompt_token_ids, sample)
            if not isinstance(state, DraftState):
                raise TypeError(f"it returned {shown(state)}, not a nanoengine.api.DraftState")
        return CheckedState(state, self._where, self._drafter.ctx.vocab_size)


class CheckedState:
    """A state of a drafter. num_fed: how many generated tokens it knows. failed: a method has failed."""

    def __init__(self, state: DraftState, where: str, vocab_size: int) -> None:
        self._state, self._where, self._vocab_size = state, where, vocab_size
        self.num_fed, self.failed = 0, False

    def feed(self, output_token_ids: Sequence[int]) -> None:
        """Feeds the tokens of the whole output that it does not know yet."""
        new = output_token_ids[self.num_fed :]
        if new:
            with self._calling("feed"):
                self._state.feed(new)
            self.num_fed = len(output_token_ids)

    def draft(self, most: int) -> list[int]:
        """At most `most` ids of the vocabulary."""
        with self._calling("draft"):
            ids = [operator.index(token) for token in islice(self._state.draft(most), most + 1)]
            if len(ids) > most:
                raise ValueError(f"it returned more than the {most} ids that were asked for")
            for token in ids:
                if not 0 <= token < self._vocab_size:
                    raise ValueError(f"it returned the id {shown(token)}; ids are 0 to {self._vocab_size - 1}")
        return ids

    def end(self) -> None:
        with self._calling("end"):
            self._state.end()

    @contextmanager
    def _calling(self, method: str) -> Iterator[None]:
        self.failed = True
        with _failing(method, self._where, self._state):
            yield
        self.failed = False


def _failing(method: str, where: str, owner: object) -> AbstractContextManager[None]:
    return failing_request("drafter_failed", f"{method}() of {where}", type(owner))


def checked_drafts(drafter: DeviceDrafter, step: DraftStep) -> Tensor:
    """Its drafts: int32 [R, tokens]. Raises `PluginError` if it returns anything else."""
    where = f"drafter {name_of(type(drafter))}"
    with plugin_step(where, type(drafter)):
        drafts: Any = drafter.draft(step)
    want = (len(step.slots), drafter.ctx.tokens)
    if tuple(getattr(drafts, "shape", ())) != want or str(getattr(drafts, "dtype", "")) != "torch.int32":
        raise PluginError(f"{where} returned {shown(drafts):.80}, not an int32 tensor of shape {list(want)}")
    return drafts  # type: ignore[no-any-return]
