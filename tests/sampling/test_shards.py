"""The draw over slices of the vocabulary: the tokens and failures of the whole row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanoengine.core.execution.sampler import Sampler
from nanoengine.kernels import all_reduce
from nanoengine.kernels.sampling import on_host

from .harness import Batch, draw, make_sampler, rows_of, tenant

VOCAB = 301
PLAIN: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.6},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 5.0},
]
CUTS = [[150], [100, 200], [300], [301]]


def over_slices(
    sampler: Sampler, logits: torch.Tensor, rows: Batch, cuts: list[int], skew: int = 0
) -> tuple[list[int], list[int]]:
    parts = zip([0, *cuts], [*cuts, VOCAB], strict=True)
    keys = [
        sampler.best_keys(logits[:, a:b].clone(), rows, rows.plan(sampler), a + (skew if a else 0)) for a, b in parts
    ]
    token_ids, failed = all_reduce.answer(all_reduce.highest(keys))
    return token_ids.tolist(), failed.tolist()


def whole(sampler: Sampler, logits: torch.Tensor, rows: Batch) -> tuple[list[int], list[int]]:
    token_ids, failed = draw(sampler, logits.clone(), rows)
    return token_ids.tolist(), failed.tolist()


def batch(seed: int) -> tuple[torch.Tensor, Batch]:
    logits = torch.randn(len(PLAIN), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    logits[0] = logits[0].round()  # ties
    tenants = [
        tenant(VOCAB, prompt=[1, 2, 97], output=[97, 298, 97], seed=10 * seed + i, **want)
        for i, want in enumerate(PLAIN)
    ]
    return logits, rows_of(VOCAB, tenants)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("host", [True, False])
def test_tokens_are_those_of_the_whole_row(
    cuts: list[int], fuse: bool, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoengine.kernels.sampling.on_host", on_host if host else lambda tensor: False)
    sampler = make_sampler(VOCAB, fuse=fuse)
    for seed in range(4):
        logits, rows = batch(seed)
        assert rows.plan(sampler).sharded
        assert over_slices(sampler, logits, rows, cuts) == whole(sampler, logits, rows)


def test_the_comparison_sees_noise_of_wrong_ids() -> None:
    sampler = make_sampler(VOCAB, fuse=True)
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1))
    rows = rows_of(VOCAB, [tenant(VOCAB, seed=i) for i in range(8)])
    assert over_slices(sampler, logits, rows, [150]) == whole(sampler, logits, rows)
    assert over_slices(sampler, logits, rows, [150], skew=1)[0] != whole(sampler, logits, rows)[0]


def test_failures_are_those_of_the_whole_row() -> None:
    sampler = make_sampler(VOCAB, fuse=True)
    inf = float("inf")
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[0, 300], logits[1, 3], logits[2] = float("nan"), inf, -inf
    logits[3, :150] = -inf
    logits[4, 200] = 3e38
    tenants = [tenant(VOCAB, temperature=t, seed=i) for i, t in enumerate((0.7, 0, 0.7, 0.7, 0.01, 0.7))]
    rows = rows_of(VOCAB, tenants)
    expected = whole(sampler, logits, rows)
    assert expected[1] == [1, 1, 1, 0, 2, 0]
    for cuts in CUTS:
        assert over_slices(sampler, logits, rows, cuts) == expected


@pytest.mark.parametrize(
    "want", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"logit_bias": {3: 1.0}}, {"min_tokens": 4}]
)
def test_what_needs_the_whole_row_gets_it(want: dict[str, Any]) -> None:
    for fuse in (True, False):
        rows = rows_of(VOCAB, [tenant(VOCAB, temperature=0.7), tenant(VOCAB, **want)])
        assert not rows.plan(make_sampler(VOCAB, fuse=fuse)).sharded
