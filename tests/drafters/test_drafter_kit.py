"""The conformance kit of drafters: the built-in ones pass, each mistake is caught, in words."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from named_params import Named
from torch import Tensor

from nanoengine.api import DeviceDrafter, DrafterSpec, DraftSample, DraftState, DraftStep, HostDrafter
from nanoengine.plugins.drafters import register_drafters
from nanoengine.testing.conformance import ConformanceError, check_drafter

EXAMPLES: Mapping[str, list[dict[str, Any]]] = {
    "ngram": [{}, {"min_n": 1, "max_n": 1}, {"min_n": 3, "max_n": 9}],
    "suffix": [{}, {"min_match": 1, "max_places": 1}, {"max_tokens": 0}, {"per_match": 0.5, "min_share": 1.0}],
}


@pytest.mark.parametrize("spec", register_drafters(), ids=lambda spec: spec.name)
def test_the_built_in_drafters_conform(spec: DrafterSpec) -> None:
    check_drafter(spec, *EXAMPLES[spec.name])


class Good(HostDrafter):
    """What followed the newest token when it was last there, in the sample or in an ended one with the same key."""

    def __init__(self, ctx: Any, params: Any) -> None:
        super().__init__(ctx, params)
        self.ended: dict[bytes, dict[int, int]] = {}

    def start(self, prompt_token_ids: Sequence[int], sample: DraftSample) -> DraftState:
        return GoodState(self, prompt_token_ids, sample.cache_key)


class GoodState(DraftState):
    def __init__(self, drafter: Good, prompt: Sequence[int], key: bytes) -> None:
        self.drafter, self.tokens, self.key = drafter, list(prompt), key

    def feed(self, token_ids: Sequence[int]) -> None:
        self.tokens += token_ids

    def draft(self, most: int) -> Sequence[int]:
        learned = self.drafter.ended.get(self.key, {})
        follow = learned | dict(zip(self.tokens, self.tokens[1:], strict=False))
        found: list[int] = []
        while len(found) < most and (found or self.tokens)[-1] in follow:
            found.append(follow[(found or self.tokens)[-1]])
        return found

    def end(self) -> None:
        self.drafter.ended.setdefault(self.key, {}).update(zip(self.tokens, self.tokens[1:], strict=False))


class TooLong(GoodState):
    def draft(self, most: int) -> Sequence[int]:
        found = list(super().draft(most))
        return [*found, found[-1]] if found else found


class Outside(GoodState):
    def draft(self, most: int) -> Sequence[int]:
        return [token + 1 for token in super().draft(most)]


class Negative(GoodState):
    def draft(self, most: int) -> Sequence[int]:
        return [*super().draft(most), -1][:most]


class NoIds(GoodState):
    def draft(self, most: int) -> Any:
        return [float(token) for token in super().draft(most)]


class Nothing(GoodState):
    def draft(self, most: int) -> Any:
        return super().draft(most) or None


class Advances(GoodState):
    def draft(self, most: int) -> Sequence[int]:
        found = super().draft(most)
        self.tokens += found[:1]
        return found


class KeepsTheLastOfAFeed(GoodState):
    def feed(self, token_ids: Sequence[int]) -> None:
        self.tokens.append(token_ids[-1])


class FeedsBackwards(GoodState):
    def feed(self, token_ids: Sequence[int]) -> None:
        super().feed(token_ids[::-1])


class KeepsTheList(GoodState):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.fed: list[Sequence[int]] = []
        self.prompt = self.tokens

    def feed(self, token_ids: Sequence[int]) -> None:
        self.fed.append(token_ids)

    def draft(self, most: int) -> Sequence[int]:
        self.tokens = [*self.prompt, *(token for part in self.fed for token in part)]
        return super().draft(most)


class ChangesThePrompt(GoodState):
    def __init__(self, drafter: Good, prompt: Sequence[int], key: bytes) -> None:
        super().__init__(drafter, prompt, key)
        self.tokens = prompt  # type: ignore[assignment]


class GuessesAtRandom(GoodState):
    def draft(self, most: int) -> Sequence[int]:
        return [random.SystemRandom().randrange(90)] * most


class TeachesWhileItRuns(GoodState):
    def feed(self, token_ids: Sequence[int]) -> None:
        super().feed(token_ids)
        self.end()


class IgnoresTheKey(GoodState):
    def __init__(self, drafter: Good, prompt: Sequence[int], key: bytes) -> None:
        super().__init__(drafter, prompt, b"")


class Raises(GoodState):
    def feed(self, token_ids: Sequence[int]) -> None:
        raise KeyError("gone")


class NeverGuesses(GoodState):
    def draft(self, most: int) -> Sequence[int]:
        return ()


class Drafter(Good):
    state: type[Any] = GoodState

    def start(self, prompt_token_ids: Sequence[int], sample: DraftSample) -> DraftState:
        made: DraftState = self.state(self, prompt_token_ids, sample.cache_key)
        return made


MUTANTS: Mapping[type[Any], str] = {
    TooLong: r"draft\(5\) returned 6 ids",
    Outside: "ids are 0 to 96",
    Negative: r"the id \[-1\]",
    NoIds: r"draft\(5\) raised TypeError",
    Nothing: "returned NoneType, not a sequence",
    Advances: "it must only look",
    KeepsTheLastOfAFeed: "tokens at once",
    FeedsBackwards: "tokens at once",
    KeepsTheList: r"feed\(\) kept the list",
    ChangesThePrompt: "changed the list of the prompt's tokens",
    GuessesAtRandom: "could not be repeated",
    TeachesWhileItRuns: "if others run",
    IgnoresTheKey: "another cache_key",
    Raises: r"feed\(\) raised KeyError",
    NeverGuesses: "has no draft for any",
}


def spec_of(drafter: type[Any], **more: Any) -> DrafterSpec:
    return DrafterSpec(name="tried", target=f"{__name__}:{drafter.__name__}", api=1, **more)


def test_a_good_drafter_conforms() -> None:
    check_drafter(spec_of(Drafter))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda cls: cls.__name__)
def test_each_mistake_is_caught(mutant: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drafter, "state", mutant)
    with pytest.raises(ConformanceError, match=MUTANTS[mutant]):
        check_drafter(spec_of(Drafter))


def test_parameters_are_checked() -> None:
    check_drafter(spec_of(Drafter, params=Named), {"depth": 2})
    with pytest.raises(ConformanceError, match="has no key 'deep'; did you mean 'depth'"):
        check_drafter(spec_of(Drafter, params=Named), {"deep": 2})


# -- on the device ----------------------------------------------------------------------------------------------------


class OnDevice(DeviceDrafter):
    """The token `period` places back, for the whole draft; no guess where a row is shorter."""

    period = 4

    def draft(self, step: DraftStep) -> Tensor:
        ahead = torch.arange(self.ctx.tokens, device=step.slots.device)
        at = step.num_tokens[:, None] - self.period + ahead % self.period
        found = step.token_ids[step.slots[:, None], at.clamp(min=0)]
        return torch.where(step.num_tokens[:, None] >= self.period, found, -1).int()


class Waits(OnDevice):
    def draft(self, step: DraftStep) -> Tensor:
        return super().draft(step) if int(step.slots.max()) >= 0 else step.slots


class OfTheLastRow(OnDevice):
    def draft(self, step: DraftStep) -> Tensor:
        return super().draft(step)[-1:].expand(len(step.slots), -1)


class BySlotOrder(OnDevice):
    def draft(self, step: DraftStep) -> Tensor:
        return super().draft(step)[step.slots.argsort()]


class Long(OnDevice):
    def draft(self, step: DraftStep) -> Tensor:
        return super().draft(step).long()


class Short(OnDevice):
    def draft(self, step: DraftStep) -> Tensor:
        return super().draft(step)[:, 1:]


class Gap(OnDevice):
    def draft(self, step: DraftStep) -> Tensor:
        found = super().draft(step)
        found[:, 1] = -1
        return found


class BeyondTheVocabulary(OnDevice):
    def draft(self, step: DraftStep) -> Tensor:
        return super().draft(step) + 97


class Writes(OnDevice):
    def draft(self, step: DraftStep) -> Tensor:
        step.token_ids[step.slots, step.num_tokens] = 96
        return super().draft(step)


DEVICE_MUTANTS: Mapping[type[Any], str] = {
    Waits: "reads values on the host",
    OfTheLastRow: "place in the step",
    BySlotOrder: "place in the step|other rows",
    Long: r"torch.int64 \(4, 5\), not int32",
    Short: r"\(4, 4\), not int32",
    Gap: "behind a -1",
    BeyondTheVocabulary: "outside the vocabulary",
    Writes: "changed the table",
}


def test_a_device_drafter_conforms() -> None:
    check_drafter(spec_of(OnDevice, device=True))


@pytest.mark.parametrize("mutant", DEVICE_MUTANTS, ids=lambda cls: cls.__name__)
def test_each_mistake_of_a_device_drafter_is_caught(mutant: type[Any]) -> None:
    with pytest.raises(ConformanceError, match=DEVICE_MUTANTS[mutant]):
        check_drafter(spec_of(mutant, device=True))


def test_a_drafter_of_the_other_place_is_refused() -> None:
    with pytest.raises(ConformanceError, match=r"derived from nanoengine\.api\.DeviceDrafter"):
        check_drafter(spec_of(Drafter, device=True))
    with pytest.raises(ConformanceError, match=r"derived from nanoengine\.api\.HostDrafter"):
        check_drafter(spec_of(OnDevice))
