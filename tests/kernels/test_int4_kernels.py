"""Products with weights of four bits, by Triton and in plain torch, against the dequantised weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from nanoengine.api.sources import cache_root
from nanoengine.kernels import int4, int4_triton
from nanoengine.kernels.activation import act_and_mul
from nanoengine.kernels.cpu import NotBuilt, load
from nanoengine.kernels.cpu.twin import product
from nanoengine.kernels.int4 import Int4Weight, dequantise, pack_codes, unpack_codes
from nanoengine.kernels.int4_cpu import int4_linear, int4_tiles
from nanoengine.kernels.int4_triton import Int4Tile
from nanoengine.kernels.split_k_triton import tickets_on


def weight_of(rand, outputs: int, inputs: int, group: int, *, zeros: bool = True) -> Int4Weight:
    """Random codes and zeros, scales of float16."""
    scales = 0.001 + 0.01 * rand(outputs, inputs // group).float().abs()
    codes = (rand(outputs, inputs).float() * 3 + 8).round().clamp(0, 15)
    zero = (rand(outputs, inputs // group).float() * 3 + 8).round().clamp(0, 15).to(torch.uint8) if zeros else None
    return Int4Weight(pack_codes(codes), scales.half(), zero, group)


def expected_of(x, weight, bias=None, *, gate=None, add=None) -> torch.Tensor:
    """The float32 product with values made one by one from the definition."""
    codes = unpack_codes(weight.codes).float()
    scales = weight.scales.float().repeat_interleave(weight.group, 1)
    zeros = 8.0 if weight.zeros is None else weight.zeros.float().repeat_interleave(weight.group, 1)
    y = F.linear(x.float(), (codes - zeros) * scales, None if bias is None else bias.float())
    y = act_and_mul(y, gate) if gate else y
    return y if add is None else y + add.float()


def test_codes_are_packed_in_units_of_32_inputs() -> None:
    codes = torch.arange(64).mul(7).remainder(16).repeat(3, 1)
    packed = pack_codes(codes)
    assert (packed.shape, packed.dtype) == ((3, 32), torch.uint8)
    words = packed.view(torch.int16).int() & 0xFFFF
    for word, inputs in ((1, (1, 9, 17, 25)), (8, (32, 40, 48, 56))):
        assert words[0, word].item() == sum(codes[0, k].item() << 4 * i for i, k in enumerate(inputs))
    assert torch.equal(unpack_codes(packed), codes.to(torch.uint8))


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("group", [32, 64, 96])
def test_plain_torch_agrees(rand, assert_close, monkeypatch, group, zeros) -> None:
    """In several tiles of outputs; each product of a row and the dequantised weight."""
    monkeypatch.setattr(int4, "_CPU_TILE", 7 * 192)
    monkeypatch.setattr(int4, "_GPU_TILE", 7 * 192)
    weight = weight_of(rand, 38, 192, group, zeros=zeros)
    x, bias, add = rand(5, 192), rand(38), rand(5, 19)
    assert_close(int4.int4_linear(x, weight, bias), expected_of(x, weight, bias))
    assert_close(
        int4.int4_linear(x, weight, bias, gate="silu", add=add),
        expected_of(x, weight, bias, gate="silu", add=add),
    )


@pytest.mark.parametrize("rows", [1, 3, 17, 70])
@pytest.mark.parametrize(
    ("gate", "with_bias", "with_add"), [(None, True, True), ("silu", True, False), ("gelu_tanh", False, True)]
)
def test_agrees(rand, assert_close, rows, gate, with_bias, with_add) -> None:
    n, k = 44, 192
    weight, x = weight_of(rand, n, k, 64), rand(rows, k)
    bias = rand(n) if with_bias else None
    add = rand(rows, n // 2 if gate else n) if with_add else None
    out = int4_triton.int4_linear(x, weight, bias, gate=gate, add=add)
    assert_close(out, expected_of(x, weight, bias, gate=gate, add=add))


@pytest.mark.parametrize(
    ("splits", "group", "k", "zeros", "gate"),
    [
        (1, 64, 192, True, None), (2, 192, 576, True, "silu"), (3, 128, 384, False, None), (3, 512, 512, True, None),
        (2, 64, 448, False, "silu"), (1, 64, 192, False, None),
    ],
)  # fmt: skip
def test_every_tile_agrees(rand, assert_close, splits, group, k, zeros, gate) -> None:
    """Outputs and tokens that do not fill a tile, several tiles of both, parts that do not divide K or are empty."""
    rows, n = 11, 76
    weight, x = weight_of(rand, n, k, group, zeros=zeros), rand(rows, k)
    tile = Int4Tile(block_n=16, block_t=8, warps=4, stages=2, splits=splits)
    tickets = tickets_on(x.device)
    out = int4_triton.int4_linear(x, weight, gate=gate, tile=tile, tickets=tickets)
    assert_close(out, expected_of(x, weight, gate=gate))
    assert tickets.count_nonzero() == 0
    assert torch.equal(int4_triton.int4_linear(x, weight, gate=gate, tile=tile, tickets=tickets), out)


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("rows", [1, 11])
@pytest.mark.parametrize("splits", [1, 2])
def test_a_norm_between_two_products_takes_no_launch(rand, assert_close, rows, gate, splits) -> None:
    """Outputs that do not fill the last tile, and several tiles of tokens."""
    n, k, eps = 192, 128, 1e-3
    first, second = weight_of(rand, n, k, 64), weight_of(rand, 44, n, 64)
    x, residual, bias, norm, last = rand(rows, k), rand(rows, n), rand(n), rand(n), rand(44)
    tile = Int4Tile(block_n=128, block_t=8, warps=4, stages=2, splits=splits)
    total, scaled = int4_triton.product(x, first, bias, add=residual, next_norm=norm, tile=tile)
    assert_close(total, expected_of(x, first, bias, add=residual))
    assert scaled is not None
    assert scaled.norm_weight is norm
    assert scaled.squares.shape == (2, rows)
    assert_close(scaled.squares.sum(0), total.float().square().sum(1), 1e-5)
    assert_close(scaled.values, (total.float() * norm.float()).to(x.dtype))
    normed = total.float() * norm.float() * torch.rsqrt(total.float().square().mean(1, keepdim=True) + eps)
    narrow = Int4Tile(block_n=16, block_t=8, warps=4, stages=2, splits=splits)
    y = int4_triton.int4_linear(scaled, second, last, eps=eps, gate=gate, tile=narrow)
    bound = 4e-6 if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps
    assert_close(y, expected_of(normed, second, last, gate=gate).to(x.dtype), bound)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("gate", [None, "silu"])
def test_very_many_rows_multiply_a_copy(rand, assert_close, monkeypatch, gate, zeros) -> None:
    monkeypatch.setattr(int4_triton, "MAX_ROWS", 4)
    monkeypatch.setattr(int4_triton, "product", None)
    n, k = 76, 192
    weight, x, bias = weight_of(rand, n, k, 64, zeros=zeros), rand(5, k), rand(n)
    add = rand(5, n // 2 if gate else n)
    assert_close(int4_triton.dequantised(weight, torch.float32), dequantise(weight), bound=1e-7)
    bound = 2e-6 if x.dtype == torch.float32 else 4 * torch.finfo(x.dtype).eps
    wanted = expected_of(x, weight, bias, gate=gate, add=add)
    assert_close(int4_triton.int4_linear(x, weight, bias, gate=gate, add=add), wanted, bound)
    out = torch.empty(5, n, dtype=x.dtype, device=x.device)
    assert int4_triton.int4_linear(x, weight, bias, out=out) is out
    assert_close(out, expected_of(x, weight, bias), bound)


@pytest.mark.parametrize(("group", "zeros"), [(32, True), (96, False)])
def test_groups_that_are_no_multiple_of_64_multiply_a_copy(rand, assert_close, monkeypatch, group, zeros) -> None:
    """A product of tensor cores takes 64 inputs, and they would have several scales."""
    monkeypatch.setattr(int4_triton, "product", None)
    weight, x = weight_of(rand, 44, 288, group, zeros=zeros), rand(3, 288)
    bound = 2e-6 if x.dtype == torch.float32 else 4 * torch.finfo(x.dtype).eps
    assert_close(int4_triton.int4_linear(x, weight, gate="silu"), expected_of(x, weight, gate="silu"), bound)


def test_strided_rows_and_a_place_for_the_result(rand, assert_close) -> None:
    weight, wide = weight_of(rand, 20, 64, 64), rand(3, 96)
    x, out = wide[:, :64], torch.empty(3, 20, dtype=wide.dtype, device=wide.device)
    assert int4_triton.int4_linear(x, weight, out=out) is out
    assert_close(out, expected_of(x, weight))
    assert int4_triton.int4_linear(x[:0], weight).shape == (0, 20)


@pytest.mark.parametrize(("rows", "gate"), [(1, None), (3, "silu"), (7, "gelu_tanh")])
@pytest.mark.parametrize(("n", "zeros"), [(64, True), (44, False)])  # 44: a gate beside the product
def test_by_kernels_in_c(rows, gate, n, zeros) -> None:
    """Against the product of the rounded inputs, with all that may be around it."""
    library = load(cache_root())
    if isinstance(library, NotBuilt):
        pytest.skip(library)
    generator = torch.Generator().manual_seed(5)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight = weight_of(rand, n, 192, 64, zeros=zeros)
    x, bias, norm, add = rand(rows, 192), rand(n), rand(192), rand(rows, n // 2 if gate else n)
    around = {"norm": norm, "eps": 1e-6, "gate": gate, "add": add}
    out = torch.empty(rows, n // 2 if gate else n)
    assert int4_linear(x, int4_tiles(library, weight), bias, out=out, **around) is out
    torch.testing.assert_close(out, product(x, dequantise(weight), bias, **around), rtol=1e-5, atol=1e-5)
