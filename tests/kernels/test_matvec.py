"""Few-row matrix products against torch, with what is fused to them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")
from nanoengine.kernels import matvec_large_triton, matvec_triton
from nanoengine.kernels.matvec import matvec as reference
from nanoengine.kernels.matvec import norm_matvec as norm_reference
from nanoengine.kernels.matvec_held_triton import SLICES, HeldTile, held
from nanoengine.kernels.matvec_large_triton import LargeTile, large
from nanoengine.kernels.matvec_skinny_triton import SkinnyTile, skinny
from nanoengine.kernels.matvec_triton import GemvTile, gemv, matvec, norm_matvec
from nanoengine.kernels.split_k_triton import tickets_on

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


@pytest.mark.half
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("kernel", "tile"),
    [
        (held, HeldTile(block_n=16, warps=4, block_t=8)),
        (held, HeldTile(block_n=64, warps=8, block_t=16)),
        (skinny, SkinnyTile(block_n=16, block_k=32, block_t=16, warps=4, stages=2)),
        (skinny, SkinnyTile(block_n=16, block_k=32, block_t=8, warps=4, stages=2, splits=2)),
        (skinny, SkinnyTile(block_n=16, block_k=32, block_t=16, warps=4, stages=2, splits=3)),  # that do not divide K
    ],
)
def test_every_tile_agrees(rand, assert_close, kernel, tile, gate, with_norm) -> None:
    """Outputs and tokens that do not fill a tile, several tiles of both, with all that may stand around a product."""
    rows, n, k = 9, 76, 200
    x, weight, bias, add = rand(rows, k), rand(n, k), rand(n), rand(rows, n // 2 if gate else n)
    norm_weight = rand(k) if with_norm else None
    out = kernel(x, weight, bias, gate=gate, add=add, norm_weight=norm_weight, eps=EPS, tile=tile)
    if with_norm:
        expected = norm_reference(*upcast(x, None, norm_weight), EPS, *upcast(weight, bias), gate=gate)[0] + add.float()
    else:
        expected = reference(*upcast(x, weight, bias), gate=gate, add=add.float())
    assert_close(out, expected)


@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_every_tile_of_large_weights_agrees(rand, assert_close, splits, gate) -> None:
    """Parts that do not divide K, the last one short; outputs that do not fill a tile."""
    rows, n, k = 5, 38, 200
    x, weight, bias, add = rand(rows, k), rand(n, k), rand(n), rand(rows, n // 2 if gate else n)
    tile = LargeTile(block_n=16, block_k=32, warps=4, stages=2, splits=splits)
    out = large(x, weight, bias, gate=gate, add=add, tile=tile)
    assert_close(out, reference(*upcast(x, weight, bias), gate=gate, add=add.float()))


@pytest.mark.parametrize("rows", [3, 9, 17, 64])
@pytest.mark.parametrize(("gate", "with_residual"), [(None, True), ("silu", False), ("silu", True)])
def test_large_weights_have_the_norm_and_many_rows_the_gate_beside_them(
    rand, assert_close, monkeypatch, rows, gate, with_residual
) -> None:
    """As if any weight of rows as long as these were large."""
    launched = []
    for module, name in (
        (matvec_triton, "add_rms_norm"), (matvec_triton, "large"), (matvec_large_triton, "act_and_mul"),
    ):  # fmt: skip
        kernel = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, _k=kernel, _n=name, **kwargs: (launched.append(_n), _k(*args, **kwargs))[1]
        )
    for name in ("_SMALL_K", "_SMALL_WEIGHTS"):
        monkeypatch.setattr(matvec_triton, name, 0)
    n, k = 76, 200
    x, weight, bias, norm_weight = rand(rows, k), rand(n, k), rand(n), rand(k)
    residual, add = rand(rows, k) if with_residual else None, rand(rows, n // 2 if gate else n)
    y, total = norm_matvec(x, residual, norm_weight, EPS, weight, bias, gate=gate)
    assert launched == ["add_rms_norm", "large"] + ["act_and_mul"] * (gate is not None and rows > 16)
    expected, _ = norm_reference(*upcast(total, None, norm_weight), EPS, *upcast(weight, bias), gate=gate)
    # rounded after the norm, and before the gate if that is a kernel of its own
    bound = 2e-5 if y.dtype == torch.float32 else 2 * torch.finfo(y.dtype).eps
    assert_close(y, expected, bound)
    out = matvec(x, weight, bias, gate=gate, add=add)
    assert_close(out, reference(*upcast(x, weight, bias), gate=gate, add=add.float()), bound)


@pytest.mark.parametrize("gate", [None, "silu"])
def test_a_weight_held_in_pieces(rand, assert_close, gate) -> None:
    """The last piece of K is short."""
    x, norm_weight, weight = rand(9, 1100), rand(1100), rand(40, 1100)
    tile = HeldTile(8 if gate else 16, warps=8, block_t=16)
    out = held(x, weight, gate=gate, norm_weight=norm_weight, eps=EPS, tile=tile)
    assert_close(out, norm_reference(*upcast(x, None, norm_weight), EPS, weight.float(), gate=gate)[0])


@pytest.mark.parametrize("splits", [2, 4])
def test_tickets_are_zero_again(rand, splits) -> None:
    """So that launches can share them: the second gives what the first gave."""
    x, weight = rand(9, 256), rand(48, 256)
    tile = SkinnyTile(block_n=16, block_k=32, block_t=8, warps=4, stages=2, splits=splits)
    tickets = tickets_on(x.device)
    first = skinny(x, weight, tile=tile, tickets=tickets)
    assert tickets.count_nonzero() == 0
    assert torch.equal(skinny(x, weight, tile=tile, tickets=tickets), first)
    assert torch.equal(skinny(x, weight, tile=tile), first)


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64])
def test_a_norm_in_front_is_no_kernel_of_its_own(rand, assert_close, monkeypatch, rows) -> None:
    monkeypatch.setattr(matvec_triton, "add_rms_norm", None)
    x, weight, norm_weight = rand(rows, 64), rand(16, 64), rand(64)
    y, total = norm_matvec(x, None, norm_weight, EPS, weight, gate="silu")
    assert total is x
    expected, _ = norm_reference(*upcast(x, None, norm_weight), EPS, weight.float(), gate="silu")
    assert_close(y, expected, bound=2e-5 if y.dtype == torch.float32 else 2 * torch.finfo(y.dtype).eps)


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
@pytest.mark.parametrize("k", [128, 2048, 3072])
@pytest.mark.parametrize(("low", "high"), [(1, 2), (3, 8), (5, 16), (7, 32), (9, 17), (33, 64)])
def test_a_row_has_the_same_bits_beside_others(rand, low, high, k) -> None:
    """As long as the same kernel serves both numbers of rows."""
    x, weight, norm_weight = rand(high, k), rand(64, k), rand(k)
    for gate, outputs in ((None, 64), ("silu", 32)):
        shape = {"gated": gate is not None, "itemsize": x.element_size()}
        kinds = {type(matvec_triton.tile_for(rows, outputs, k, **shape)) for rows in (low, high)}
        if len(kinds) == 1:
            few, many = (
                (matvec(part, weight, gate=gate), norm_matvec(part, None, norm_weight, EPS, weight, gate=gate)[0])
                for part in (x[:low], x)
            )
            assert torch.equal(many[0][:low], few[0])
            assert torch.equal(many[1][:low], few[1])


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
@pytest.mark.parametrize("rows", [1, 4, 8, 16, 17, 40, 64])
def test_gated_norm_large(rand, assert_close, rows) -> None:
    x, residual, weight, norm_weight = rand(rows, 1024), rand(rows, 1024), rand(6144, 1024), rand(1024)
    y, total = norm_matvec(x, residual, norm_weight, EPS, weight, gate="silu")
    assert torch.equal(total, x + residual)
    expected, _ = norm_reference(*upcast(total, None, norm_weight), EPS, weight.float(), gate="silu")
    # silu is steep: a rounding of its operand, 1024 long, counts up to its size times the slope
    assert_close(y, expected, bound=2e-5 if y.dtype == torch.float32 else 2 * torch.finfo(y.dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 64])
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


@pytest.mark.parametrize("rows", [2, 6, 17])
def test_these_tests_notice_a_lost_tail(rand, assert_close, monkeypatch, rows) -> None:
    """The mutant: the product forgets the last 8 of K."""
    for name, kernel in (("gemv", gemv), ("held", held), ("skinny", skinny)):

        def forgetful(x, weight, *args, _kernel=kernel, **kwargs):
            return _kernel(x[:, :-8], weight[:, :-8].contiguous(), *args, **kwargs)

        monkeypatch.setattr(matvec_triton, name, forgetful)
    with pytest.raises(AssertionError, match="relative error"):
        test_agrees(rand, assert_close, rows, gate=None, with_bias=True, with_add=True)


LARGE = [  # (N, K, gated): Qwen3-8B, Llama-3.2-1B
    (6144, 4096, False), (4096, 4096, False), (24576, 4096, True), (4096, 12288, False), (151936, 4096, False),
    (3072, 2048, False), (2048, 2048, False), (16384, 2048, True), (2048, 8192, False), (128256, 2048, False),
]  # fmt: skip
SMALL = [  # Qwen3-0.6B, without its lm_head, which is too large to be held
    (4096, 1024, False), (1024, 2048, False), (6144, 1024, True), (1024, 3072, False),
]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 32, 64])
def test_large_products_keep_their_kernels(rows) -> None:
    """Those that were measured to lose, or not measured, by what is faster for a small model."""
    for n, k, gated in LARGE:
        tile = matvec_triton.tile_for(rows, n // (1 + gated), k, gated=gated, itemsize=2)
        assert type(tile) is (GemvTile if rows == 1 or (rows == 2 and k <= 8192) else LargeTile), (n, k)
    for n, k, gated in SMALL:
        tile = matvec_triton.tile_for(rows, n // (1 + gated), k, gated=gated, itemsize=2)
        assert type(tile) in ((HeldTile, SkinnyTile) if rows > 1 or k <= 2048 else (GemvTile,)), (n, k)


@pytest.mark.parametrize(
    ("rows", "n", "k", "gated", "tile"),
    [
        (8, 6144, 4096, False, LargeTile(64, 128, warps=4, stages=7)),
        (64, 4096, 4096, False, LargeTile(64, 128, warps=4, stages=5, splits=2)),
        (16, 24576, 4096, True, LargeTile(32, 256, warps=2, stages=5, block_t=8)),
        (17, 24576, 4096, True, LargeTile(64, 128, warps=4, stages=7)),
        (8, 4096, 12288, False, LargeTile(64, 128, warps=4, stages=7, splits=2)),
        (8, 2048, 8192, False, LargeTile(64, 128, warps=4, stages=7, splits=4)),
        (8, 1024, 4096, True, LargeTile(32, 256, warps=2, stages=5, block_t=8)),
    ],
)
def test_tiles_of_large_products(rows, n, k, gated, tile) -> None:
    assert matvec_triton.tile_for(rows, n // (1 + gated), k, gated=gated, itemsize=2) == tile


def test_tiles_cover_what_models_ask_for() -> None:
    """Tile sides are powers of two, parts of K are not empty, and shared memory holds a pipeline or a held weight."""
    for n, k, gated, itemsize in product((64, 576, 1024, 28672, 151936), (64, 576, 1024, 12288), (False, True), (2, 4)):
        tile = matvec_triton.gemv_tile(k, gated=gated, itemsize=itemsize)
        assert tile.block_n in (1, 2, 4, 8, 16)
        assert tile.warps in (2, 4, 8)
        shape = {"gated": gated, "itemsize": itemsize}
        for rows in (3, 8, 16, 32, 64):
            whole = matvec_triton.held_tile(rows, n, k, **shape)
            if whole is not None:
                assert (whole.block_n * (1 + gated) + whole.block_t) * min(k, 4096) * itemsize <= 227 << 10
                assert SLICES % whole.warps == 0
            wide = matvec_triton.skinny_tile(rows, n, k, **shape)
            assert wide.splits * wide.block_k <= max(k, wide.block_k)
            stage = (wide.block_n * (1 + gated) + min(wide.block_t, max(8, rows))) * wide.block_k * itemsize
            assert stage * wide.stages <= 227 << 10
            big = matvec_large_triton.large_tile(rows, n, k, **shape)
            assert big.splits * big.block_k <= max(k, big.block_k)
            columns = big.block_n * (1 + (gated and rows <= 16)) + max(big.block_t, rows)
            assert columns * big.block_k * itemsize * big.stages <= 227 << 10
