"""Weights of four bits whose codes lie in tiles, as operands of tensor cores. The interpreter cannot run the assembly:
it is emulated here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from emulated_mma import inline_asm_elementwise
from test_int4_kernels import expected_of, weight_of

from nanoengine.kernels import int4_launch, int4_tiles_triton, int4_triton
from nanoengine.kernels.int4 import Int4Weight, dequantise, fits_tiles, in_rows, in_tiles
from nanoengine.kernels.int4_product import Int4Product
from nanoengine.kernels.int4_tiles_triton import TilesTile, product

EPS = 1e-3


class WithAssembly(Int4Product):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.constants["ASM"] = True


@pytest.fixture
def rand(rand, device, dtype):
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("tensor cores round float32")
    return rand


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program for all units."""
    monkeypatch.setattr(int4_tiles_triton, "_PROCESSORS", 1)


def before_nan(weight: Int4Weight) -> Int4Weight:
    """The same, with NaN in the memory behind its scales."""
    scales = weight.scales
    room = torch.cat((scales.flatten(), torch.full((256,), float("nan"), dtype=scales.dtype, device=scales.device)))
    return replace(weight, scales=room[: scales.numel()].view(scales.shape))


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(
    ("n", "k", "group", "zeros", "gate"), [(64, 1152, 128, True, None), (128, 768, 256, False, "silu")]
)
def test_agrees(rand, assert_close, n, k, group, zeros, gate) -> None:
    """Several units for a program; K that its warps cannot share, or not in the steps that each asks for at once. What
    is behind the weight does not count."""
    weight, x, bias, add = weight_of(rand, n, k, group, zeros=zeros), rand(1, k), rand(n), rand(1, n // 2)
    add, tiles = add if gate else rand(1, n), before_nan(in_tiles(weight))
    y, none = product(x, tiles, bias, gate=gate, add=add, tile=TilesTile(2, 1, 2))
    assert none is None
    assert_close(y, expected_of(x, weight, bias, gate=gate, add=add))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the test above runs the assembly")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_the_assembly_agree(dtype, monkeypatch) -> None:
    """Emulated. Triton's interpreter truncates bfloat16."""
    ran = set[str]()

    def emulated(asm: Any, *given: Any, **options: Any) -> Any:
        ran.add(getattr(asm, "value", asm))
        return inline_asm_elementwise(asm, *given, **options)

    monkeypatch.setattr(tl, "inline_asm_elementwise", emulated)
    monkeypatch.setattr(int4_tiles_triton, "Int4Product", WithAssembly)
    generator = torch.Generator().manual_seed(1)
    weight = weight_of(lambda *shape: torch.randn(shape, generator=generator), 64, 256, 128)
    x = torch.randn(1, 256, generator=generator).to(dtype)
    expected = expected_of(x, weight)
    error = (product(x, in_tiles(weight), tile=TilesTile(1, 1, 2))[0].float() - expected).norm() / expected.norm()
    assert error < torch.finfo(dtype).eps
    assert ran == set(int4_tiles_triton.assembly(dtype))


@pytest.mark.parametrize(("rows", "gate"), [(1, None), (3, "silu")])
def test_a_norm_between_two_products_takes_no_launch(rand, assert_close, rows, gate) -> None:
    first, second = weight_of(rand, 128, 256, 128), weight_of(rand, 64, 128, 128)
    x, residual, norm = rand(rows, 256), rand(rows, 128), rand(128)
    total, scaled = int4_launch.product(x, in_tiles(first), add=residual, next_norm=norm)
    assert_close(total, expected_of(x, first, add=residual))
    assert scaled is not None
    assert_close(scaled.squares.sum(0), total.float().square().sum(1), 1e-5)
    assert_close(scaled.values, (total.float() * norm.float()).to(x.dtype))
    normed = total.float() * norm.float() * torch.rsqrt(total.float().square().mean(1, keepdim=True) + EPS)
    y = int4_launch.int4_linear(scaled, in_tiles(second), eps=EPS, gate=gate)
    bound = 4e-6 if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps
    assert_close(y, expected_of(normed, second, gate=gate).to(x.dtype), bound)


@pytest.mark.parametrize(("rows", "group"), [(0, 128), (2, 128), (8, 256), (11, 128), (11, 256), (70, 128)])
def test_other_kernels_read_tiles(rand, assert_close, rows, group) -> None:
    """Of more rows, whether codes or a copy are multiplied."""
    weight, x = weight_of(rand, 64, 512, group), rand(rows, 512)
    tiles = in_tiles(weight)
    assert_close(int4_triton.dequantised(tiles, torch.float32), dequantise(weight), bound=1e-7)
    bound = None if x.dtype == torch.float32 and rows <= int4_triton.MAX_ROWS else 4 * torch.finfo(x.dtype).eps
    assert_close(int4_launch.int4_linear(x, tiles, gate="silu"), expected_of(x, weight, gate="silu"), bound)


def test_tiles_are_the_same_bits(rand) -> None:
    weight = weight_of(rand, 64, 384, 128)
    again = in_rows(in_tiles(weight))
    assert not again.tiled
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(again, name), getattr(weight, name))
    assert fits_tiles(weight)
    assert not fits_tiles(weight_of(rand, 32, 384, 128))
    assert not fits_tiles(weight_of(rand, 64, 384, 96))


def test_a_mutant_that_takes_the_scale_of_another_row_is_seen(rand) -> None:
    """Of the row that is eight further."""
    weight, x = weight_of(rand, 64, 256, 128), rand(1, 256)
    tiles, expected = in_tiles(weight), expected_of(x, weight)
    scales = tiles.scales.view(-1, 2).flip(1).reshape(tiles.scales.shape)
    y = product(x, Int4Weight(tiles.codes, scales, tiles.zeros, 128, tiled=True))[0]
    assert (y.float() - expected).norm() / expected.norm() > 0.1
