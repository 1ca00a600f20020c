"""GGUF blocks in plain torch: decoded as the gguf package does, and their products."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf_blocks import KINDS, expected, random_blocks

from nanoengine.kernels import gguf as kernels
from nanoengine.kernels.gguf import BLOCK_TYPES, dequantise, dummy_blocks, gguf_linear, gguf_rows

pytestmark = pytest.mark.parametrize("kind", KINDS)


def test_sizes_are_those_of_the_package(kind: str) -> None:
    type_ = BLOCK_TYPES[kind]
    assert (type_.block, type_.size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert type_.width(type_.row_bytes(512)) == 512


def test_decoded_bit_for_bit(kind: str) -> None:
    """Any bytes: also scales that are infinite or subnormal. A NaN is one in both."""
    type_ = BLOCK_TYPES[kind]
    blocks = np.random.default_rng(3).integers(0, 256, (40, 4 * type_.size), np.uint8)
    with np.errstate(all="ignore"):
        want = expected(blocks, kind)
    got = dequantise(torch.from_numpy(blocks), kind)
    assert got.dtype == torch.float32
    assert want.isfinite().float().mean() > 0.5
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int32), want[~nan].view(torch.int32))


def test_dummy_blocks_are_weights_of_the_deviation_that_was_asked_for(kind: str) -> None:
    bits = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (64, 4 * BLOCK_TYPES[kind].size), np.uint8))
    weights = dequantise(dummy_blocks(bits, kind, 0.02), kind)
    assert weights.std().item() == pytest.approx(0.02, rel=0.03)
    assert weights.mean().abs() < 0.003


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_product(kind: str, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CPU_TILE", 7 * 512)  # 20 outputs: tiles of 7, 7 and 6
    blocks = random_blocks(kind, 20, 512)
    x, added = torch.randn(rows, 512), torch.randn(20) if bias else None
    got = gguf_linear(x, torch.from_numpy(blocks), kind, added)
    torch.testing.assert_close(got, F.linear(x, expected(blocks, kind), added), atol=1e-5, rtol=1e-5)


def test_product_goes_where_it_is_asked_to(kind: str) -> None:
    """A fused layer's parts of different types write into columns of one result."""
    blocks, x, result = torch.from_numpy(random_blocks(kind, 20, 512)), torch.randn(3, 512), torch.zeros(3, 30)
    out = result[:, 5:25]
    assert gguf_linear(x, blocks, kind, out=out) is out
    assert torch.equal(out, gguf_linear(x, blocks, kind))
    assert not result[:, :5].any()
    assert not result[:, 25:].any()


def test_product_of_a_narrow_dtype_is_rounded_once(kind: str) -> None:
    blocks, x = random_blocks(kind, 20, 512), torch.randn(3, 512).bfloat16()
    got = gguf_linear(x, torch.from_numpy(blocks), kind)
    want = F.linear(x.float(), expected(blocks, kind))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=1e-4, rtol=2**-8)


def test_rows_of_an_embedding(kind: str) -> None:
    blocks, ids = random_blocks(kind, 20, 512), torch.tensor([3, 19, 3, 0], dtype=torch.int32)
    got = gguf_rows(ids, torch.from_numpy(blocks), kind, torch.float32)
    assert torch.equal(got, expected(blocks, kind)[ids.long()])
    assert gguf_rows(ids, torch.from_numpy(blocks), kind, torch.bfloat16).dtype == torch.bfloat16
