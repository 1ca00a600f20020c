"""Rows that bring several tokens: drafts are checked by what is drawn, so right or wrong they change no token."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoengine import LLM, SamplingParams
from nanoengine.api.drafters import DeviceDrafter, DrafterContext, DraftStep
from nanoengine.core.execution.finish_step import FinishStep
from nanoengine.core.request import Request
from nanoengine.kernels import step_inputs
from nanoengine.testing.checkpoints import tiny_gemma3, tiny_llama

from .support import VOCAB, greedy, mock_llm, prompts, tokens_of
from .test_same_tokens import COUNT, WAYS, seeded


class Oracle:
    """Drafts from what the requests will say: each token is right with a probability.

    `known`: (prompt, sample) -> tokens. Otherwise as `Speculation`.
    """

    on_device = False

    def __init__(
        self, known: Mapping[tuple[tuple[int, ...], int], Sequence[int]], tokens: int, accuracy: float
    ) -> None:
        self.known, self.tokens, self.accuracy = known, tokens, accuracy
        self.drafted = self.accepted = 0
        self.ended: set[Request] = set()

    def most(self, request: Request) -> int:
        return self.tokens

    def propose(self, request: Request, most: int) -> Sequence[int]:
        if self.on_device:
            return [-1] * most
        rng, done = random.Random(f"{request.id} {len(request.output_token_ids)}"), len(request.output_token_ids)
        right = list(self.known[tuple(request.prompt_token_ids), request.sample_index][done : done + most])
        right += [0] * (most - len(right))
        return [t if rng.random() < self.accuracy else (t + rng.randrange(1, VOCAB)) % VOCAB for t in right]

    def committed(self, request: Request, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted

    def end(self, request: Request) -> None:
        assert request not in self.ended
        self.ended.add(request)


class TableDrafter(DeviceDrafter):
    """Finds what follows in a table, by the first token of the prompt; other positions are wrong."""

    def __init__(self, ctx: DrafterContext, table: Tensor) -> None:
        super().__init__(ctx, None)
        self.table = table

    def draft(self, step: DraftStep) -> Tensor:
        first = step.token_ids[step.slots, 0].long()
        places = step.num_tokens[:, None] + torch.arange(self.ctx.tokens)
        return self.table[first[:, None] % len(self.table), places.clamp(max=self.table.shape[1] - 1)]


def with_device_drafts(
    llm: LLM, asked: Sequence[Sequence[int]], want: Sequence[Sequence[int]], tokens: int, accuracy: float
) -> Oracle:
    """From here on the engine's requests have drafts that the device makes."""
    rng, table = random.Random(0), torch.full((VOCAB, 512), -1, dtype=torch.int32)
    for prompt, output in zip(asked, want, strict=True):
        for at, token in enumerate(output, start=len(prompt)):
            table[prompt[0], at] = token if rng.random() < accuracy else (token + 1) % VOCAB
    ctx = DrafterContext(tokens=tokens, vocab_size=VOCAB, max_model_len=512, max_slots=32, device="cpu")
    runner: Any = llm.engine._executor.runner  # type: ignore[attr-defined]
    runner.finish.drafter = TableDrafter(ctx, table)
    oracle = with_drafts(llm, asked, want, tokens=tokens, accuracy=accuracy)
    oracle.on_device = llm.engine.scheduler._runs_ahead = True
    return oracle


def with_drafts(llm: LLM, asked: Sequence[Sequence[int]], want: Sequence[Sequence[int]], **how: Any) -> Oracle:
    """From here on the engine's requests have drafts."""
    oracle = Oracle({(tuple(p), 0): tokens for p, tokens in zip(asked, want, strict=True)}, **how)
    llm.engine.scheduler._speculation = oracle
    return oracle


OFTEN = ("plain", "batch 1", "no overlap", "chunked", "preempted, chunked, cached")


@pytest.mark.parametrize("drafting", [with_drafts, with_device_drafts], ids=["host", "device"])
@pytest.mark.parametrize(
    ("name", "accuracy"), [(name, each) for name in WAYS for each in ((0.0, 0.7, 1.0) if name in OFTEN else (0.7,))]
)
def test_drafts_change_no_token(tmp_path: Path, name: str, accuracy: float, drafting: Callable[..., Oracle]) -> None:
    """Greedy and random rows, penalties that count drafts, in each way of running."""
    options, asked, _ = WAYS[name]
    asked = [[i, *prompt] for i, prompt in enumerate(asked)]  # each its own tokens
    params = seeded(len(asked))
    with mock_llm(tmp_path, **options) as llm:
        want = tokens_of(llm.generate(asked, params, use_tqdm=False))
        steps = llm.stats().steps
        llm.reset_prefix_cache()
        oracle = drafting(llm, asked, want, tokens=5, accuracy=accuracy)
        assert tokens_of(llm.generate(asked, params, use_tqdm=False)) == want
        stats = llm.stats()
    assert stats.steps_broken == 0
    assert oracle.drafted > 0
    assert (oracle.accepted > 0) is (accuracy > 0)
    if accuracy == 1 and name in ("plain", "batch 1", "no overlap"):
        assert stats.steps - steps < steps // 2
    assert stats.free_blocks == stats.num_blocks


@pytest.mark.parametrize("tokens", range(1, 9))
def test_any_number_of_drafts(tmp_path: Path, tokens: int) -> None:
    asked = prompts(4)
    want = [greedy(p, COUNT) for p in asked]
    with mock_llm(tmp_path) as llm:
        oracle = with_drafts(llm, asked, want, tokens=tokens, accuracy=1.0)
        found = tokens_of(llm.generate(asked, SamplingParams(temperature=0, max_tokens=COUNT), use_tqdm=False))
        steps = llm.stats().steps
    assert found == want
    assert oracle.accepted == oracle.drafted
    assert steps <= 2 + -(-COUNT // (tokens + 1))


def test_the_end_falls_inside_accepted_drafts(tmp_path: Path) -> None:
    """A stop token, and log-probs as far as it."""
    asked = prompts(6)
    whole = [greedy(p, COUNT) for p in asked]
    stops = [tokens[7] for tokens in whole]
    params = [SamplingParams(temperature=0, max_tokens=COUNT, stop_token_ids=[s], logprobs=2) for s in stops]
    with mock_llm(tmp_path) as llm:
        plain = llm.generate(asked, params, use_tqdm=False)
        oracle = with_drafts(llm, asked, whole, tokens=5, accuracy=1.0)
        drafted = llm.generate(asked, params, use_tqdm=False)
    assert oracle.accepted > 0
    for one, other, tokens, stop in zip(plain, drafted, whole, stops, strict=True):
        a, b = one.outputs[0], other.outputs[0]
        assert b.token_ids == tokens[: tokens.index(stop) + 1]
        assert (a.token_ids, a.finish_reason, a.stop_reason) == (b.token_ids, b.finish_reason, b.stop_reason)
        assert a.logprobs is not None
        assert b.logprobs is not None
        for x, y in zip(a.logprobs, b.logprobs, strict=True):  # sums over rows of other numbers round otherwise
            assert {t: e.rank for t, e in x.items()} == {t: e.rank for t, e in y.items()}
            assert [e.logprob for e in x.values()] == pytest.approx([e.logprob for e in y.values()], abs=1e-5)


def test_what_is_drafted_behind_an_end_does_not_count(tmp_path: Path) -> None:
    """Rows that ran ahead of a stop token bring nothing, though all their drafts are right."""
    asked = [[i, *prompt] for i, prompt in enumerate(prompts(6, longest=6))]
    whole = [greedy(prompt, COUNT) for prompt in asked]
    one, *others = [SamplingParams(temperature=0, max_tokens=COUNT, stop_token_ids=[tokens[4]]) for tokens in whole]
    params = [one.replace(stop_token_ids=None), *others]  # the first one goes on, so that all steps are committed
    want = [whole[0], *(tokens[: tokens.index(tokens[4]) + 1] for tokens in whole[1:])]
    with mock_llm(tmp_path) as llm:
        oracle = with_device_drafts(llm, asked, whole, tokens=4, accuracy=1.0)
        assert tokens_of(llm.generate(asked, params, use_tqdm=False)) == want
        stats = llm.stats()
    assert 0 < oracle.accepted == stats.accepted <= sum(map(len, want)) - len(want)


def off_by_one(patch: pytest.MonkeyPatch) -> None:
    """The first wrong draft is accepted, too."""
    original = step_inputs.settle

    def settle(
        state: Any, slots: Any, start: Any, tokens: Any, of_row: Any, drafts: Any, *rest: Any, **most: Any
    ) -> None:
        original(state, slots, start, tokens, of_row, drafts, *rest, **most)
        if drafts is not None:
            more = (rest[1] <= drafts) & (drafts > 0)
            rest[1].add_(more)
            for table in (state.num_computed, state.num_tokens):
                table[slots.long()] += more

    patch.setattr(step_inputs, "settle", settle)


def stale_counts(patch: pytest.MonkeyPatch) -> None:
    """Penalties do not see the drafts before a draw."""
    patch.setattr(FinishStep, "_count_drafts", lambda *args: None)


def advance_by_drafted(patch: pytest.MonkeyPatch) -> None:
    """The device counts refused drafts as computed."""
    original = step_inputs.settle

    def settle(
        state: Any, slots: Any, start: Any, tokens: Any, of_row: Any, drafts: Any, *rest: Any, **most: Any
    ) -> None:
        before = state.num_computed[slots.long()]
        original(state, slots, start, tokens, of_row, drafts, *rest, **most)
        if drafts is not None:
            state.num_computed[slots.long()] = before + start.diff() * (slots != len(state.num_tokens) - 1)

    patch.setattr(step_inputs, "settle", settle)


@pytest.mark.parametrize("drafting", [with_drafts, with_device_drafts], ids=["host", "device"])
@pytest.mark.parametrize("mutant", [off_by_one, stale_counts, advance_by_drafted])
def test_mutants_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., None], drafting: Callable[..., Oracle]
) -> None:
    def runs() -> None:
        for name in ("plain", "batch 32", "cached"):
            test_drafts_change_no_token(tmp_path, name, 0.7, drafting)

    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        runs()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3], ids=lambda make: make.__name__)
@pytest.mark.parametrize("accuracy", [0.0, 0.7, 1.0])
def test_drafts_of_a_real_model(tmp_path: Path, make: Callable[[Path], Path], accuracy: float) -> None:
    """In float32 a row of several tokens rounds otherwise than one: no near tie lies in these tokens."""
    folder = make(tmp_path)
    asked = prompts(6, shortest=3, longest=40)
    params = [SamplingParams(temperature=0 if i % 2 else 1.1, seed=i, max_tokens=20, ignore_eos=True) for i in range(6)]
    options = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 128, "block_size": 16, "dtype": "float32"}
    with LLM(folder, device="cpu", max_model_len=128, **options) as llm:
        want = tokens_of(llm.generate(asked, params, use_tqdm=False))
        oracle = with_drafts(llm, asked, want, tokens=4, accuracy=accuracy)
        assert tokens_of(llm.generate(asked, params, use_tqdm=False)) == want
    assert oracle.drafted > 0
    assert (oracle.accepted > 0) is (accuracy > 0)
