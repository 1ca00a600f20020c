"""Sums of hidden states over spans of tokens."""

from __future__ import annotations

import pytest
import torch

from nanoengine.kernels.pooling import span_sums

SPANS = [(0, 0), (1, 4), (5, 5), (6, 11)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_span_is_summed_in_float32(dtype: torch.dtype) -> None:
    hidden = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = hidden.clone()
    sums = span_sums(hidden, torch.tensor([last for _, last in SPANS]), SPANS)
    assert sums.dtype == torch.float32
    want = torch.stack([hidden[first : last + 1].double().sum(0) for first, last in SPANS])
    torch.testing.assert_close(sums.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(hidden, before)


def test_a_sum_of_one_token_is_a_copy() -> None:
    """The step behind may write over the hidden states before the sums have reached the host."""
    hidden = torch.ones(3, 2)
    sums = span_sums(hidden, torch.tensor([2]), [(2, 2)])
    hidden.zero_()
    assert sums.tolist() == [[1, 1]]
