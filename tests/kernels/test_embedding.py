"""Rows of an embedding in Triton against torch: the same bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from nanoengine.kernels.embedding_triton import embedding
from nanoengine.kernels.ops import Ops


@pytest.mark.parametrize("width", [8, 64, 100, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_rows_are_torch_s(width: int, dtype: torch.dtype, kind: torch.dtype, device: torch.device) -> None:
    g = torch.Generator().manual_seed(width)
    weight = torch.randn(37, width, generator=g).to(device, dtype)
    for count in (0, 1, 5):
        ids = torch.randint(0, 37, (count,), generator=g).to(device, kind)
        ids[:1] = 36
        out = embedding(ids, weight)
        assert out.shape == (count, width)
        assert torch.equal(out, F.embedding(ids, weight))


@pytest.mark.parametrize("first", [0, 30, 1000])
def test_rows_of_a_part_of_the_whole(first: int, device: torch.device) -> None:
    """Those of ids outside of it are 0; also as torch's operations make it."""
    weight, ids = torch.randn(7, 20, device=device), torch.arange(0, 40, dtype=torch.int32, device=device)
    whole = torch.zeros(first + 50, 20, device=device)
    whole[first : first + 7] = weight
    out = torch.full((40, 20), float("nan"), device=device)
    assert embedding(ids, weight, first=first, out=out) is out
    assert torch.equal(out, F.embedding(ids, whole))
    assert torch.equal(Ops().embedding(ids, weight, first=first), out)
    assert torch.equal(Ops().embedding(ids, weight, first=first, out=torch.empty_like(out)), out)
