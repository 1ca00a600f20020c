"""Kernels for GGUF blocks in planes against plain torch: every type, few rows and many, tiles that are not full."""

from __future__ import annotations

import pytest
import torch
from gguf_blocks import KINDS, random_blocks

pytest.importorskip("triton")
from nanoengine.kernels import gguf, gguf_triton
from nanoengine.kernels.activation import act_and_mul
from nanoengine.kernels.gguf import BLOCK_TYPES
from nanoengine.kernels.gguf_decode_triton import PLANES, planar
from nanoengine.kernels.gguf_triton import BlockTile, one, tiled
from nanoengine.kernels.rms_norm import add_rms_norm

EPS = 1e-6


def blocks_of(kind: str, rows: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(random_blocks(kind, rows, width)).to(device)


@pytest.mark.half
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 17])
def test_products_agree(rand, assert_close, device, kind, rows) -> None:
    """Three superblocks: units that do not fill a tile. 37 outputs: nor do rows."""
    blocks, x, bias = blocks_of(kind, 37, 768, device), rand(rows, 768), rand(37) if rows % 2 else None
    expected = gguf.gguf_linear(x.float(), blocks, kind, None if bias is None else bias.float())
    assert_close(gguf_triton.gguf_linear(x, planar(blocks, kind), kind, bias), expected)


@pytest.mark.half
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_products_behind_a_norm_agree(rand, assert_close, device, kind, with_residual, gate, rows) -> None:
    blocks, x, norm_weight, bias = blocks_of(kind, 44, 768, device), rand(rows, 768), rand(768), rand(44)
    residual = rand(rows, 768) if with_residual else None
    planes = planar(blocks, kind)
    y, total = gguf_triton.gguf_norm_linear(x, residual, norm_weight, EPS, planes, kind, bias, gate=gate)
    assert torch.equal(total, x if residual is None else x + residual)
    normed, _ = add_rms_norm(total.float(), None, norm_weight.float(), EPS)
    expected = gguf.gguf_linear(normed, blocks, kind, bias.float())
    # of several rows the normed x, the weight and the product before the gate are rounded, too
    bound = None if rows == 1 or x.dtype == torch.float32 else 3 * torch.finfo(x.dtype).eps
    assert_close(y, act_and_mul(expected, gate) if gate else expected, bound)


@pytest.mark.parametrize("tile", [BlockTile(2, 2, 1, warps=4), BlockTile(8, 8, 1, warps=4)])
@pytest.mark.parametrize("kind", ["Q5_1", "Q6_K"])
def test_every_tile_of_one_row_agrees(rand, assert_close, device, kind, tile) -> None:
    """Rows that are longer than a tile, with a norm: squares are summed over tiles."""
    blocks, x, norm_weight = blocks_of(kind, 11, 1280, device), rand(1, 1280), rand(1280)
    out, _ = one(x, planar(blocks, kind), kind, norm_weight=norm_weight, eps=EPS, tile=tile)
    normed, _ = add_rms_norm(x.float(), None, norm_weight.float(), EPS)
    assert_close(out, gguf.gguf_linear(normed, blocks, kind))


@pytest.mark.parametrize("tile", [BlockTile(16, 1, 16, warps=4), BlockTile(32, 8, 32, warps=8)])
@pytest.mark.parametrize("kind", ["Q5_1", "Q6_K"])
def test_every_tile_of_tokens_agrees(rand, assert_close, device, kind, tile) -> None:
    """Tokens that do not fill the last of several tiles."""
    blocks, x = blocks_of(kind, 35, 512, device), rand(37, 512)
    out = tiled(x, planar(blocks, kind), kind, None, torch.empty_like(x[:, :35]), tile)
    assert_close(out, gguf.gguf_linear(x.float(), blocks, kind))


def test_very_many_rows_are_multiplied_in_slices(rand, assert_close, device, monkeypatch) -> None:
    monkeypatch.setattr(gguf_triton, "TILED_ROWS", 8)
    monkeypatch.setattr(gguf_triton, "_SLICE", 7 * 512)
    monkeypatch.setattr(gguf_triton, "_LINES", 7)
    blocks, x, bias = blocks_of("Q4_K", 20, 512, device), rand(9, 512), rand(20)
    monkeypatch.setattr(gguf_triton, "tiled", None)
    out = gguf_triton.gguf_linear(x, planar(blocks, "Q4_K"), "Q4_K", bias)
    assert_close(out, gguf.gguf_linear(x.float(), blocks, "Q4_K", bias.float()))


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_a_product_goes_into_columns_of_a_wider_result(rand, device, monkeypatch, rows) -> None:
    monkeypatch.setattr(gguf_triton, "TILED_ROWS", 8)
    planes, x = planar(blocks_of("Q5_1", 20, 64, device), "Q5_1"), rand(rows, 64)
    wide = torch.zeros(rows, 40, dtype=x.dtype, device=device)
    gguf_triton.gguf_linear(x, planes, "Q5_1", out=wide[:, 8:28])
    assert torch.equal(wide[:, 8:28], gguf_triton.gguf_linear(x, planes, "Q5_1"))
    assert not wide[:, :8].any()
    assert not wide[:, 28:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_agree(device, dtype, kind) -> None:
    """Up to one rounding: a product and a sum may be one operation here."""
    blocks, ids = blocks_of(kind, 9, 1280, device), torch.tensor([8, 0, 3, 3], device=device)
    planes, expected = planar(blocks, kind), gguf.dequantise(blocks, kind)
    near = {"rtol": 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(gguf_triton.dequantise(planes, kind, dtype), expected.to(dtype), **near)
    torch.testing.assert_close(gguf_triton.gguf_rows(ids, planes, kind, dtype), expected[ids].to(dtype), **near)


@pytest.mark.parametrize("kind", KINDS)
def test_planes_are_the_same_bytes(device, kind) -> None:
    blocks = blocks_of(kind, 3, 1280, device)
    planes = planar(blocks, kind)
    assert planes.shape == blocks.shape
    assert torch.equal(planes.sort().values, blocks.sort().values)
    assert sorted(PLANES[kind])[0][0] == 0
    assert sum(stop - start for start, stop in PLANES[kind]) == BLOCK_TYPES[kind].size


def test_a_mutant_that_reads_the_next_scale_is_seen(rand, device, monkeypatch) -> None:
    """The scales' plane moved on by a block."""
    blocks, x = blocks_of("Q8_0", 9, 128, device), rand(1, 128)
    planes = planar(blocks, "Q8_0")
    planes[:, 128:] = planes[:, 128:].roll(2, dims=1)
    expected = gguf.gguf_linear(x.float(), blocks, "Q8_0")
    error = (gguf_triton.gguf_linear(x, planes, "Q8_0").float() - expected).norm() / expected.norm()
    assert error > 0.1
