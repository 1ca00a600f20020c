"""Few-row matrix products against torch, with what is fused to them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")
from nanoengine.kernels import matvec_triton
from nanoengine.kernels.matvec import matvec as reference
from nanoengine.kernels.matvec import norm_matvec as norm_reference
from nanoengine.kernels.matvec_triton import SkinnyTile, gemv, matvec, norm_matvec, skinny

EPS = 1e-6
ROWS = [1, 2, 3, 9, 17]


def upcast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.float() for t in tensors]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("gate", "with_bias", "with_add"),
    [(None, True, True), ("silu", True, False), ("silu", False, True), ("gelu_tanh", True, True)],
)
def test_agrees(rand, assert_close, rows, gate, with_bias, with_add) -> None:
    n, k = 44, 72
    x, weight = rand(rows, k), rand(n, k)
    bias = rand(n) if with_bias else None
    add = rand(rows, n // 2 if gate else n) if with_add else None
    expected = reference(*upcast(x, weight, bias), gate=gate, add=upcast(add)[0])
    assert_close(matvec(x, weight, bias, gate=gate, add=add), expected)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_agrees(rand, assert_close, rows, with_residual) -> None:
    n, k = 20, 576
    x, weight, norm_weight = rand(rows, k), rand(n, k), rand(k)
    residual = rand(rows, k) if with_residual else None
    y, total = norm_matvec(x, residual, norm_weight, EPS, weight)
    assert torch.equal(total, x if residual is None else x + residual)
    expected, _ = norm_reference(total.float(), None, norm_weight.float(), EPS, weight.float())
    assert_close(y, expected)


@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_parts_of_k(rand, assert_close, splits, gate) -> None:
    """Parts that do not divide K, the last one short; outputs that do not fill a tile."""
    rows, n, k = 5, 38, 200
    x, weight, bias, add = rand(rows, k), rand(n, k), rand(n), rand(rows, n // 2 if gate else n)
    tile = SkinnyTile(block_n=16, block_k=32, warps=4, stages=2, splits=splits)
    out = skinny(x, weight, bias, gate=gate, add=add, tile=tile)
    assert_close(out, reference(*upcast(x, weight, bias), gate=gate, add=add.float()))


def test_residual_is_not_written_in_place(rand) -> None:
    x, residual, weight, norm_weight = rand(2, 64), rand(2, 64), rand(48, 64), rand(64)
    before = residual.clone(), x.clone()
    _, total = norm_matvec(x, residual, norm_weight, EPS, weight)
    assert torch.equal(residual, before[0])
    assert torch.equal(x, before[1])
    assert total.data_ptr() not in (x.data_ptr(), residual.data_ptr())


@pytest.mark.parametrize(("low", "high"), [(1, 2), (3, 8), (5, 33)])
def test_a_row_does_not_depend_on_the_others(rand, low, high) -> None:
    """Small integers, whose sums are exact in any order: the interpreter multiplies with a library whose rounding
    depends on the shape and on the processor."""
    x, weight = ((2 * rand(*shape)).round().clamp(-3, 3) for shape in ((high, 128), (32, 128)))
    assert x.unique().numel() == 7
    together = matvec(x, weight)
    assert torch.equal(together.float(), x.float() @ weight.float().T)
    assert torch.equal(together[:low], matvec(x[:low], weight))


@pytest.mark.gpu
@pytest.mark.parametrize(("low", "high"), [(1, 2), (3, 8), (5, 33)])
def test_a_row_has_the_same_bits_beside_others(rand, low, high) -> None:
    x, weight = rand(high, 128), rand(32, 128)
    assert torch.equal(matvec(x, weight)[:low], matvec(x[:low], weight))


def test_rows_may_be_strided_or_absent(rand, assert_close) -> None:
    wide, weight = rand(6, 100), rand(24, 40)
    for rows in (2, 6):
        x, add = wide[:rows, :40], wide[:rows, 60:84]
        assert_close(matvec(x, weight, add=add), reference(*upcast(x, weight), add=add.float()))
    assert matvec(wide[:0, :40], weight).shape == (0, 24)


SHAPES = [(4096, 1024), (1024, 3072), (6144, 1024), (1000, 576), (4096, 12288), (151936, 1024)]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 13, 32, 64])
def test_agrees_large(rand, assert_close, rows, n, k) -> None:
    x, weight, add = rand(rows, k), rand(n, k), rand(rows, n)
    out = matvec(x, weight, add=add)
    # a float32 sum of k terms, one after the other, strays like a random walk of roundings
    bound = max(2e-6, 2**-24 * k**0.5) if out.dtype == torch.float32 else None
    assert_close(out, reference(*upcast(x, weight), add=add.float()), bound)
    for _ in range(3):
        assert torch.equal(out, matvec(x, weight, add=add)), "differs from run to run"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 8, 64])
def test_gated_norm_large(rand, assert_close, rows) -> None:
    x, residual, weight, norm_weight = rand(rows, 1024), rand(rows, 1024), rand(6144, 1024), rand(1024)
    y, total = norm_matvec(x, residual, norm_weight, EPS, weight, gate="silu")
    assert torch.equal(total, x + residual)
    expected, _ = norm_reference(*upcast(total, None, norm_weight), EPS, weight.float(), gate="silu")
    # silu is steep: a rounding of its operand, 1024 long, counts up to its size times the slope
    assert_close(y, expected, bound=2e-5 if y.dtype == torch.float32 else 2 * torch.finfo(y.dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_chain_in_a_graph_keeps_its_order(rand, rows) -> None:
    """Kernels that start before their predecessor ends must still read what it wrote: a chain of products, each on
    the last one's result, replayed many times, gives what it gives step by step."""
    x = rand(rows, 1024) / 8
    first, second, norm_weight = rand(3072, 1024) / 32, rand(1024, 3072) / 64, rand(1024)

    def chain() -> torch.Tensor:
        h = x
        for _ in range(8):
            y, _ = norm_matvec(h, None, norm_weight, EPS, first)
            h = matvec(y, second, add=h)
        return h

    torch.cuda.synchronize()
    step = x
    for _ in range(8):
        y, _ = norm_matvec(step, None, norm_weight, EPS, first)
        torch.cuda.synchronize()
        step = matvec(y, second, add=step)
        torch.cuda.synchronize()
    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(200):
        out.zero_()
        graph.replay()
        assert torch.equal(out, step)


@pytest.mark.parametrize("rows", [2, 6])
def test_these_tests_notice_a_lost_tail(rand, assert_close, monkeypatch, rows) -> None:
    """The mutant: the product forgets the last 8 of K."""
    kernel = gemv if rows <= 2 else skinny

    def forgetful(x, weight, *args, **kwargs):
        return kernel(x[:, :-8], weight[:, :-8].contiguous(), *args, **kwargs)

    monkeypatch.setattr(matvec_triton, "gemv" if rows <= 2 else "skinny", forgetful)
    with pytest.raises(AssertionError, match="relative error"):
        test_agrees(rand, assert_close, rows, gate=None, with_bias=True, with_add=True)


def test_tiles_cover_what_models_ask_for() -> None:
    """Tile sides are powers of two, parts of K are not empty, and a pipeline fits a multiprocessor's shared memory."""
    for n, k, gated, itemsize in product((64, 576, 1024, 28672, 151936), (64, 576, 1024, 12288), (False, True), (2, 4)):
        tile = matvec_triton.gemv_tile(k, gated=gated, itemsize=itemsize)
        assert tile.block_n in (1, 2, 4, 8, 16)
        assert tile.warps in (2, 4, 8)
        for rows in (3, 8, 16, 32, 64):
            wide = matvec_triton.skinny_tile(rows, n, k, gated=gated, itemsize=itemsize)
            assert wide.splits * wide.block_k <= max(k, wide.block_k)
            tokens = max(wide.block_t, rows if not gated else 16)
            stage = (wide.block_n * (2 if gated else 1) + tokens) * wide.block_k * itemsize
            assert stage * wide.stages <= 227 << 10
