"""The draw over slices of the vocabulary against the draw over the whole of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from test_sampling_triton import (
    CASES,
    INF,
    NAN,
    TINY,
    Columns,
    assert_same,
    by_slot,
    columns,
    mixed_logits,
    reference,
)

from nanoengine.kernels import all_reduce
from nanoengine.kernels.sampling_shard_triton import answer, best_keys
from nanoengine.kernels.sampling_triton import Tail, Tuning

PLAIN = ["greedy", "temperature", "some greedy"]


def sharded(
    logits: Tensor, tail: Tail, c: Columns, cuts: list[int], tuning: Tuning | None = TINY, skew: int = 0
) -> tuple[Tensor, Tensor]:
    """The ranks one after the other. `skew` is added to where a rank thinks that it starts."""
    names = ("greedy", "temperature", "seeds", "positions", "sample_index")
    given = {name: c[name] for name in (*names, "at") if name in c}
    keys = [
        best_keys(logits[:, a:b], tail, a + (skew if a else 0), tuning=tuning, **given)
        for a, b in zip([0, *cuts], [*cuts, logits.shape[1]], strict=True)
    ]
    tokens = torch.full((len(logits),), -7, dtype=torch.int64, device=logits.device)
    failed = torch.full((len(logits),), -7, dtype=torch.int32, device=logits.device)
    best = all_reduce.highest(keys)
    answer(best, tokens, failed)
    assert_same((tokens, failed), all_reduce.answer(best))
    return tokens, failed


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("cuts", [[205], [128], [100, 200, 300], [409]], ids=str)
def test_tokens_are_those_of_the_whole_row(case: str, cuts: list[int], device: torch.device) -> None:
    tail, values = CASES[case]
    logits, c = mixed_logits(6, 409).to(device), columns(6, device, **values)
    expected = reference(logits, tail, c)
    assert_same(sharded(logits, tail, c, cuts), expected)
    assert len({int(t) > cuts[0] for t in expected[0]}) == 2 or cuts == [409]  # both sides win somewhere


@pytest.mark.parametrize("case", PLAIN)
def test_columns_in_tables_of_slots(case: str, device: torch.device) -> None:
    tail, values = CASES[case]
    logits, c = mixed_logits(6, 409).to(device), columns(6, device, **values)
    assert_same(sharded(logits, tail, by_slot(c, [7, 2, 9, 0, 4, 5], 11), [205]), reference(logits, tail, c))


def test_the_comparison_sees_noise_of_wrong_ids(device: torch.device) -> None:
    tail, values = CASES["temperature"]
    logits, c = mixed_logits(6, 409).to(device), columns(6, device, **values)
    assert sharded(logits, tail, c, [205], skew=1)[0].tolist() != reference(logits, tail, c)[0].tolist()


@pytest.mark.parametrize("tail", [Tail.GREEDY, Tail.TEMPERATURE])
def test_broken_rows(tail: Tail, device: torch.device) -> None:
    logits = torch.randn(8, 150, generator=torch.Generator().manual_seed(3))
    logits[0, 149], logits[1, 3], logits[2] = NAN, INF, -INF
    logits[3, 5] = 3e38
    logits[4] = NAN
    logits[5, :75] = -INF  # one slice without a possible token breaks nothing
    logits = logits.to(device)
    c = columns(8, device, temperature=[0.7, 0.7, 0.7, 0.01])
    expected = reference(logits, tail, c)
    assert expected[1].tolist() == [1, 1, 1, 0 if tail is Tail.GREEDY else 2, 1, 0, 0, 0]
    assert_same(sharded(logits, tail, c, [75]), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 64, 256])
@pytest.mark.parametrize("case", PLAIN)
def test_full_size(case: str, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    tail, values = CASES[case]
    logits = (torch.randn(rows, 151936, generator=torch.Generator().manual_seed(1)) * 3).to(device, dtype)
    c = columns(rows, device, **values)
    assert_same(sharded(logits, tail, c, [75968], None), reference(logits, tail, c))
