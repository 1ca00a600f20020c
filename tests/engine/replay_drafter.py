"""Drafters for tests: `replay` drafts what the same sample said before, each token right with a given probability."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanoengine.api import (
    DeviceDrafter,
    DrafterParams,
    DrafterSpec,
    DraftSample,
    DraftState,
    DraftStep,
    HostDrafter,
    hookimpl,
)

Key = tuple[tuple[int, ...], int, int]


@dataclass(frozen=True)
class ReplayParams(DrafterParams):
    accuracy: float = 1.0


class Replay(HostDrafter):
    """It learns from ended samples, so that the first run has no drafts and the second one has as many as it may."""

    def __init__(self, ctx: Any, params: ReplayParams) -> None:
        super().__init__(ctx, params)
        self.said: dict[Key, list[int]] = {}

    def start(self, prompt_token_ids: Sequence[int], sample: DraftSample) -> DraftState:
        return ReplayState(self, (tuple(prompt_token_ids), sample.index, sample.seed))


class ReplayState(DraftState):
    def __init__(self, drafter: Replay, key: Key) -> None:
        self.drafter, self.key = drafter, key
        self.output: list[int] = []

    def feed(self, token_ids: Sequence[int]) -> None:
        self.output += token_ids

    def draft(self, most: int) -> Sequence[int]:
        done, vocab = len(self.output), self.drafter.ctx.vocab_size
        rng = random.Random(f"{self.key} {done}")
        right = self.drafter.said.get(self.key, [])[done : done + most]
        accuracy = self.drafter.params.accuracy
        return [t if rng.random() < accuracy else (t + rng.randrange(1, vocab)) % vocab for t in right]

    def end(self) -> None:
        self.drafter.said[self.key] = self.output


class Failing(HostDrafter):
    """It fails in the sample whose prompt begins with 13, once that has said some tokens."""

    def start(self, prompt_token_ids: Sequence[int], sample: DraftSample) -> DraftState:
        return FailingState(prompt_token_ids)


class FailingState(DraftState):
    def __init__(self, prompt: Sequence[int]) -> None:
        self.bad, self.fed = prompt[0] == 13, 0

    def feed(self, token_ids: Sequence[int]) -> None:
        self.fed += len(token_ids)

    def draft(self, most: int) -> Sequence[int]:
        if self.bad and self.fed > 5:
            raise LookupError("its index is lost")
        return [7] * most


class Follow(DeviceDrafter):
    """What followed the newest token when it was last there, on the device."""

    def draft(self, step: DraftStep) -> Tensor:
        tokens, known = step.token_ids[step.slots], step.num_tokens[:, None]  # [R, width], [R, 1]
        place = torch.arange(tokens.shape[1], device=tokens.device)
        newest = tokens.gather(1, known - 1)
        found = ((tokens == newest) & (place < known - 1)).long() * (place + 1)
        behind = found.amax(1, keepdim=True) + place[: self.ctx.tokens]  # 0, where it was not there
        good = (found.amax(1, keepdim=True) > 0) & (behind < known)
        return torch.where(good, tokens.gather(1, behind.clamp(max=tokens.shape[1] - 1)), -1).int()


@hookimpl
def register_drafters() -> list[DrafterSpec]:
    return [
        DrafterSpec(name="replay", params=ReplayParams, target=f"{__name__}:Replay", api=1),
        DrafterSpec(name="failing", target=f"{__name__}:Failing", api=1),
        DrafterSpec(name="follow_on_device", target=f"{__name__}:Follow", api=1, device=True),
    ]
