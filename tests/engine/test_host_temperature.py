"""A column of op TEMPERATURE that changes with time: 0 takes the arg-max at that step, whatever it was before."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.api import (
    API_VERSION,
    ColumnSpec,
    HostState,
    LogitsProcessor,
    Phase,
    ProcessorParams,
    SamplerSpec,
    StandardOp,
    hookimpl,
)
from nanoengine.core.execution.finish_step import FinishStep

from .support import greedy, mock_llm, tokens_of

PROMPT = [5, 6, 7]
COUNT = 8


@dataclass(frozen=True)
class CoolParams(ProcessorParams):
    """Temperature `cool`, and behind `after` tokens `then`."""

    columns: ClassVar[Mapping[str, ColumnSpec]] = {
        "heat": ColumnSpec(dtype="float32", default=1.0, op=StandardOp.TEMPERATURE)
    }

    cool: float = -1.0
    then: float = -1.0
    after: int = 1

    def pack(self, ctx: Any) -> Mapping[str, Any]:
        return {"heat": self.cool}

    def start(self, prompt_token_ids: Sequence[int], ctx: Any) -> HostState:
        return Cooling(self)


class Cooling(HostState):
    def __init__(self, params: CoolParams) -> None:
        self.params, self.fed = params, 0

    def feed(self, token_ids: Sequence[int]) -> None:
        self.fed += len(token_ids)

    def columns(self, drafts: Sequence[int]) -> Mapping[str, Any]:
        own, fed = self.params, self.fed
        return {"heat": [own.cool if fed + at < own.after else own.then for at in range(1 + len(drafts))]}


class Cool(LogitsProcessor):
    phase = Phase.TEMPERATURE
    argmax_invariant = True

    def apply(self, logits: Any, rows: Any) -> Any:
        heat = rows.column("heat")
        return logits / heat.where(heat > 0, 1.0)[:, None]


@hookimpl
def register_samplers() -> list[SamplerSpec]:
    return [SamplerSpec(name="cool", params=CoolParams, target=f"{__name__}:Cool", api=API_VERSION)]


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "one-by-one"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = tmp_path_factory.mktemp("cool")
    with mock_llm(folder, plugins=[sys.modules[__name__]], fuse_sampling=request.param) as made:
        yield made


def tokens(llm: LLM, prompt: Sequence[int], count: int, **params: Any) -> tuple[int, ...]:
    asked = SamplingParams(max_tokens=count, ignore_eos=True, **params)
    company = SamplingParams(max_tokens=count, temperature=1.5, seed=99)
    outputs = llm.generate([[1, 2], list(prompt), [3]], [company, asked, company], use_tqdm=False)
    return tokens_of(outputs)[1]


def test_a_host_processor_that_cools_down_is_greedy_from_that_step_on(llm: LLM) -> None:
    seen = set()
    for seed in range(4):
        out = tokens(llm, PROMPT, COUNT, cool=2.0, then=0.0, after=3, seed=seed)
        assert out[:3] == tokens(llm, PROMPT, 3, temperature=2.0, seed=seed)
        assert out[3:] == greedy([*PROMPT, *out[:3]], COUNT - 3)
        seen.add(out)
    assert len(seen) > 1


def test_a_host_processor_that_heats_up_draws_from_that_step_on(llm: LLM) -> None:
    seen = set()
    for seed in range(4):
        out = tokens(llm, PROMPT, COUNT, cool=0.0, then=2.0, after=3, seed=seed)
        assert out[:3] == greedy(PROMPT, 3)
        assert out[3:] == tokens(llm, [*PROMPT, *out[:3]], COUNT - 3, temperature=2.0, seed=seed)
        seen.add(out)
    assert len(seen) > 1


def test_of_two_temperatures_either_makes_a_row_greedy(llm: LLM) -> None:
    assert tokens(llm, PROMPT, COUNT, cool=2.0, then=0.0, after=0, temperature=1.3) == greedy(PROMPT, COUNT)
    assert tokens(llm, PROMPT, COUNT, cool=2.0, then=1.5, temperature=0) == greedy(PROMPT, COUNT)


def test_a_slot_forgets_the_temperature_of_its_last_owner(llm: LLM) -> None:
    tokens(llm, PROMPT, COUNT, cool=2.0, then=0.0, after=2, seed=1)
    drawn = {tokens(llm, PROMPT, COUNT, temperature=2.0, seed=seed) for seed in range(3)}
    assert len(drawn) == 3
    assert greedy(PROMPT, COUNT) not in drawn


@pytest.mark.parametrize("heat", [float("nan"), float("inf"), -0.5])
def test_a_temperature_that_is_none_fails_its_request_alone(llm: LLM, heat: float) -> None:
    params = SamplingParams(max_tokens=4, cool=1.0, then=heat)
    bad, good = llm.generate([PROMPT, PROMPT], [params, SamplingParams(temperature=0, max_tokens=4)], use_tqdm=False)
    assert bad.error is not None
    assert bad.error.code == "processor_failed"
    assert "logits processor 'cool', column 'heat': a temperature must be" in str(bad.error)
    assert tokens_of([good]) == [greedy(PROMPT, 4)]


def test_it_is_the_change_of_the_column_that_counts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: greedy as it was at admission."""
    original = FinishStep._overridden

    def broken(self: FinishStep, rows: Any, supplied: Any) -> Any:
        return replace(original(self, rows, supplied), greedy=rows.greedy)

    monkeypatch.setattr(FinishStep, "_overridden", broken)
    out = tokens(llm, PROMPT, COUNT, cool=0.0, then=2.0, after=3, seed=1)
    assert out == greedy(PROMPT, COUNT)


def test_columns_are_copies() -> None:
    """A plugin may hand out an array that it goes on writing to."""
    from nanoengine.params.columns import pack_column

    own = np.asarray(0.5, dtype=np.float32)
    packed = pack_column("cool", "heat", CoolParams.columns["heat"], own)
    own[...] = 9.0
    assert packed == np.float32(0.5)
    assert own.flags.writeable
