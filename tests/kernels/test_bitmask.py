"""Bit masks over the vocabulary: the kernel against torch, and torch against the definition."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from nanoengine.kernels import bitmask as reference
from nanoengine.kernels.bitmask_triton import mask_bits_

NEG_INF = float("-inf")


def words(rows: int, vocab: int, device: str) -> torch.Tensor:
    made = torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), generator=torch.Generator().manual_seed(vocab))
    made[0] = -1
    made[-1, ::3] = 0 if rows > 1 else -1
    return made.to(torch.int32).to(device)


def is_allowed(row: list[int], token: int) -> bool:
    return bool(row[token // 32] >> token % 32 & 1)


@pytest.mark.parametrize(("rows", "vocab", "start", "count"), [(1, 1, 0, 1), (3, 97, 0, 97), (4, 5000, 1030, 2077)])
def test_agrees_with_the_definition(rand, device, rows, vocab, start, count) -> None:
    logits, masks = rand(rows, count), words(rows, vocab, device)
    expected = logits.clone()
    for row, bits in enumerate(masks.tolist()):
        removed = [j for j in range(count) if not is_allowed(bits, start + j)]
        expected[row, removed] = NEG_INF
    for function in (mask_bits_, reference.mask_bits_):
        own = logits.clone()
        assert function(own, masks, start).data_ptr() == own.data_ptr()
        assert torch.equal(own, expected)
    assert torch.equal(expected[0], logits[0])
    assert rows == 1 or (expected[-1] == NEG_INF).any()


def test_rows_may_be_strided_or_absent(rand, device) -> None:
    """What is beside a shard's own columns stays as it is."""
    logits, masks = rand(3, 200), words(3, 200, device)
    expected = logits.clone()
    expected[:, 40:140] = reference.mask_bits_(logits[:, 40:140].clone(), masks, 40)
    for function in (mask_bits_, reference.mask_bits_):
        own = logits.clone()
        function(own[:, 40:140], masks, 40)
        assert torch.equal(own, expected)
        assert function(own[:0], masks[:0]).shape == (0, 200)
        assert function(own[:, :0], masks, 200).shape == (3, 0)


def test_infinity_is_removed_and_nan_stays_where_the_mask_allows_it(device) -> None:
    logits = torch.tensor([[float("nan"), float("inf"), float("inf"), 1.0]], device=device)
    for function in (mask_bits_, reference.mask_bits_):
        own = function(logits.clone(), torch.tensor([[0b1011]], dtype=torch.int32, device=device))
        assert own[0, 0].isnan()
        assert own[0, 1:].tolist() == [float("inf"), NEG_INF, 1.0]


def test_shifts_and_bytes_agree(rand, device, monkeypatch) -> None:
    """Torch goes by bytes on a CPU, and by shifts elsewhere."""
    logits, masks = rand(5, 1000), words(5, 1000, device)
    own = reference.mask_bits_(logits.clone(), masks)
    monkeypatch.setattr(reference, "on_host", lambda tensor: False)
    assert torch.equal(reference.mask_bits_(logits, masks), own)
