"""Products with weights of four bits by the kernels in Gluon, against the dequantised weight. Gluon has no interpreter;
`test_compiles.py` compiles them everywhere."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from test_int4_kernels import expected_of, weight_of

from nanoengine import kernels
from nanoengine.kernels import gluon, int4_launch, int4_triton
from nanoengine.kernels.int4 import Int4Weight, in_tiles
from nanoengine.kernels.matmul import Scaled

ON_HOPPER = torch.cuda.is_available() and gluon.runs_gluon(
    torch.device("cuda", torch.cuda.current_device()), "some products run on slower kernels", "matmul_gluon"
)
in_gluon = pytest.mark.skipif(not ON_HOPPER, reason="Gluon has no interpreter, and the kernels are for Hopper GPUs")
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.fixture
def no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made by the kernel in Triton."""
    monkeypatch.setattr(int4_triton, "product", None)
    monkeypatch.setattr(int4_triton, "int4_linear", None)


@in_gluon
@pytest.mark.usefixtures("no_other")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 8, 70, 200])
@pytest.mark.parametrize(
    ("k", "group", "zeros", "gate"),
    [(384, 128, True, None), (1024, 256, False, "silu"), (3456, 128, True, "gelu_tanh"), (2048, 2048, True, None)],
)
def test_agrees(rand, assert_close, rows, k, group, zeros, gate) -> None:
    """Outputs and tokens that do not fill a tile, K that its warps cannot share, groups of several steps."""
    n = 152
    weight, x, bias, add = (
        weight_of(rand, n, k, group, zeros=zeros),
        rand(rows, k),
        rand(n),
        rand(rows, n // (1 + (gate is not None))),
    )
    out = int4_launch.int4_linear(x, weight, bias, gate=gate, add=add)
    assert_close(out, expected_of(x, weight, bias, gate=gate, add=add))


@in_gluon
@pytest.mark.usefixtures("no_other")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [2, 8, 70, 200])
@pytest.mark.parametrize(
    ("k", "group", "zeros", "gate"), [(384, 128, True, None), (1024, 256, False, "silu"), (3456, 128, True, "silu")]
)
def test_weights_in_tiles(rand, assert_close, rows, k, group, zeros, gate) -> None:
    n = 192
    weight, x, bias = weight_of(rand, n, k, group, zeros=zeros), rand(rows, k), rand(n)
    assert_close(int4_launch.int4_linear(x, in_tiles(weight), bias, gate=gate), expected_of(x, weight, bias, gate=gate))


@in_gluon
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("gate", [None, "silu"])
def test_a_tile_of_256_tokens(rand, assert_close, gate) -> None:
    """Of weights of very many rows."""
    from nanoengine.kernels import int4_many_gluon

    weight, x = weight_of(rand, 192, 1152, 128), rand(200, 1152)
    tile = int4_many_gluon.tile_for(200, 24576)
    assert tile.block_t == 256
    assert_close(int4_many_gluon.product(x, weight, gate=gate, tile=tile)[0], expected_of(x, weight, gate=gate))


@in_gluon
@pytest.mark.usefixtures("no_other")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("rows", [1, 7, 80])
def test_a_norm_between_two_products_takes_no_launch(rand, assert_close, rows, gate) -> None:
    n, k, eps = 384, 256, 1e-3
    first, second = weight_of(rand, n, k, 128), weight_of(rand, 44, n, 128)
    x, residual, bias, norm, last = rand(rows, k), rand(rows, n), rand(n), rand(n), rand(44)
    total, scaled = int4_launch.product(x, first, bias, add=residual, next_norm=norm)
    assert_close(total, expected_of(x, first, bias, add=residual))
    assert isinstance(scaled, Scaled)
    assert scaled.norm_weight is norm
    assert_close(scaled.squares.sum(0), total.float().square().sum(1), 1e-5)
    assert_close(scaled.values, (total.float() * norm.float()).to(x.dtype))
    normed = total.float() * norm.float() * torch.rsqrt(total.float().square().mean(1, keepdim=True) + eps)
    y = int4_launch.int4_linear(scaled, second, last, eps=eps, gate=gate)
    assert_close(y, expected_of(normed, second, last, gate=gate).to(x.dtype), 2 * torch.finfo(x.dtype).eps)


@in_gluon
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [3, 73])
def test_strided_rows_and_a_place_for_the_result(rand, assert_close, rows) -> None:
    """Also rows that the copy engine cannot read."""
    weight, wide = weight_of(rand, 48, 256, 128), rand(rows, 333)
    for x in (wide[:, 8:264], wide[:, :320].contiguous()[:, 64:]):
        out = torch.empty(rows, 48, dtype=wide.dtype, device=wide.device)
        assert int4_launch.int4_linear(x, weight, out=out) is out
        assert_close(out, expected_of(x, weight))
    assert int4_launch.int4_linear(wide[:0, :256], weight).shape == (0, 48)


@pytest.mark.parametrize(("rows", "group"), [(600, 128), (3, 64)])
def test_what_gluon_does_not_take_is_made_in_triton(rand, assert_close, monkeypatch, rows, group) -> None:
    """Very many rows, and groups that are no multiple of 128; and everything where it is turned off."""
    weight, x = weight_of(rand, 20, 128, group), rand(rows, 128)
    wanted, made = expected_of(x, weight), list[Any]()
    real = int4_triton.int4_linear
    monkeypatch.setattr(int4_triton, "int4_linear", lambda *a, **k: made.append(a) or real(*a, **k))
    bound = None if x.dtype == torch.float32 and rows < 64 else 4 * torch.finfo(x.dtype).eps
    assert_close(int4_launch.int4_linear(x, weight), wanted, bound)
    assert_close(int4_launch.int4_linear(x[:3], weight, gluon=False), wanted[:3])
    assert len(made) == 2


def test_another_gluon_costs_speed_only_and_is_logged(monkeypatch, caplog) -> None:
    monkeypatch.setattr(gluon, "is_hopper", lambda _: True)
    monkeypatch.setitem(sys.modules, "nanoengine.kernels.int4_many_gluon", None)
    monkeypatch.delattr(kernels, "int4_many_gluon", raising=False)
    gluon.runs_gluon.cache_clear()
    try:
        codes, scales = torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 1, dtype=torch.float16)
        weight = Int4Weight(codes, scales, None, 128)
        assert not int4_launch._in_gluon(weight, torch.bfloat16)
        assert not int4_launch._in_gluon(weight, torch.bfloat16)
    finally:
        gluon.runs_gluon.cache_clear()
    assert caplog.text.count("another Gluon") == 1
