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
from nanoengine.kernels.split_k_triton import tickets_on

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
@pytest.mark.parametrize("rows", [2, 8, 20, 33, 70, 200])
@pytest.mark.parametrize(
    ("k", "group", "zeros", "gate"),
    [(384, 128, True, None), (1024, 256, False, "silu"), (3456, 128, True, "gelu_tanh"), (2048, 2048, True, None)],
)
def test_agrees(rand, assert_close, rows, k, group, zeros, gate) -> None:
    """Tokens, and outputs, that do not fill a tile; K that warps cannot share; groups of several steps."""
    n = 192
    weight, x, bias, add = (
        weight_of(rand, n, k, group, zeros=zeros),
        rand(rows, k),
        rand(n),
        rand(rows, n // (1 + (gate is not None))),
    )
    out = int4_launch.int4_linear(x, in_tiles(weight), bias, gate=gate, add=add)
    assert_close(out, expected_of(x, weight, bias, gate=gate, add=add))


@in_gluon
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("gate", [None, "gelu_tanh"])
@pytest.mark.parametrize(
    ("rows", "block_t", "consumers", "splits"),
    [(70, 128, 2, 1), (70, 128, 3, 2), (300, 128, 3, 1), (257, 128, 2, 2), (50, 64, 2, 2), (9, 32, 3, 2)],
)
def test_warps_with_roles(rand, assert_close, monkeypatch, rows, block_t, consumers, splits, gate) -> None:
    """Programs of several tiles of the weight, and those that share K, whose flags stay equal."""
    from nanoengine.kernels import int4_roles_gluon as roles

    if splits == 1:
        monkeypatch.setattr(roles, "_PROCESSORS", 5)
    weight, x = weight_of(rand, 768, 1536, 256 if rows > 256 else 128, zeros=rows <= 256), rand(rows, 1536)
    bias, add, tickets = rand(768), rand(rows, 384 if gate else 768), tickets_on(x.device)
    for _ in range(2):
        y = roles.product(
            x, in_tiles(weight), bias, gate=gate, add=add, tickets=tickets,
            tile=roles.RolesTile(block_t, consumers, 4, splits),
        )[0]  # fmt: skip
        assert_close(y, expected_of(x, weight, bias, gate=gate, add=add))
    assert not tickets[:512].any()
    assert torch.equal(tickets[512::2], tickets[513::2])


@in_gluon
@pytest.mark.usefixtures("no_other")
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("rows", [7, 80])
def test_a_norm_between_two_products_takes_no_launch(rand, assert_close, rows, gate) -> None:
    n, k, eps = 384, 256, 1e-3
    first, second = weight_of(rand, n, k, 128), weight_of(rand, 64, n, 128)
    x, residual, bias, norm, last = rand(rows, k), rand(rows, n), rand(n), rand(n), rand(64)
    total, scaled = int4_launch.product(x, in_tiles(first), bias, add=residual, next_norm=norm)
    assert_close(total, expected_of(x, first, bias, add=residual))
    assert isinstance(scaled, Scaled)
    assert scaled.norm_weight is norm
    assert_close(scaled.squares.sum(0), total.float().square().sum(1), 1e-5)
    assert_close(scaled.values, (total.float() * norm.float()).to(x.dtype))
    normed = total.float() * norm.float() * torch.rsqrt(total.float().square().mean(1, keepdim=True) + eps)
    y = int4_launch.int4_linear(scaled, in_tiles(second), last, eps=eps, gate=gate)
    assert_close(y, expected_of(normed, second, last, gate=gate).to(x.dtype), 2 * torch.finfo(x.dtype).eps)


@in_gluon
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [3, 73])
def test_strided_rows_and_a_place_for_the_result(rand, assert_close, rows) -> None:
    """Also rows that the copy engine cannot read."""
    weight, wide = weight_of(rand, 64, 256, 128), rand(rows, 333)
    tiles = in_tiles(weight)
    for x in (wide[:, 8:264], wide[:, :320].contiguous()[:, 64:]):
        out = torch.empty(rows, 64, dtype=wide.dtype, device=wide.device)
        assert int4_launch.int4_linear(x, tiles, out=out) is out
        assert_close(out, expected_of(x, weight))
    assert int4_launch.int4_linear(wide[:0, :256], tiles).shape == (0, 64)


@pytest.mark.parametrize(("rows", "group"), [(600, 128), (3, 64)])
def test_what_gluon_does_not_take_is_made_in_triton(rand, assert_close, monkeypatch, rows, group) -> None:
    """Very many rows, weights that do not lie in tiles; and everything where it is turned off."""
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
    monkeypatch.setitem(sys.modules, "nanoengine.kernels.int4_roles_gluon", None)
    monkeypatch.delattr(kernels, "int4_roles_gluon", raising=False)
    gluon.runs_gluon.cache_clear()
    try:
        codes, scales = torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 1, dtype=torch.float16)
        weight = Int4Weight(codes, scales, None, 128, tiled=True)
        assert not int4_launch._in_gluon(weight, torch.bfloat16)
        assert not int4_launch._in_gluon(weight, torch.bfloat16)
    finally:
        gluon.runs_gluon.cache_clear()
    assert caplog.text.count("another Gluon") == 1
