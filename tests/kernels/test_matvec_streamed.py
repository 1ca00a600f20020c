"""Products of one row by programs that walk through a large weight, against torch, and what chooses them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from nanoengine.kernels import matvec_streamed_triton, matvec_triton
from nanoengine.kernels.choice import KernelChoice
from nanoengine.kernels.matvec import matvec as reference
from nanoengine.kernels.matvec import norm_matvec as norm_reference
from nanoengine.kernels.matvec_streamed_triton import StreamedTile, streamed, streamed_tile, tile_of
from nanoengine.kernels.ops import TritonOps

EPS = 1e-6


def upcast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.float() for t in tensors]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(matvec_streamed_triton, "_PIECE", 64)


@pytest.mark.half
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize(("n", "k"), [(44, 64), (76, 200), (64, 192)])  # one piece, a short last one, whole ones
@pytest.mark.parametrize(
    "tile",
    [
        StreamedTile(rows=1, stages=3, programs=5),  # shares of which the last is short
        StreamedTile(rows=2, stages=4, warps=4, programs=64),  # fewer rows than programs, steps than stages
        StreamedTile(rows=4, stages=3, programs=2, ahead=2, other=4),
    ],
)
def test_agrees(rand, assert_close, small_pieces, tile, n, k, gate, with_norm) -> None:
    x, weight, bias, add = rand(1, k), rand(n, k), rand(n), rand(1, n // 2 if gate else n)
    norm_weight = rand(k) if with_norm else None
    out = streamed(x, weight, bias, tile=tile, gate=gate, add=add, norm_weight=norm_weight, eps=EPS)
    if with_norm:
        expected = norm_reference(*upcast(x, None, norm_weight), EPS, *upcast(weight, bias), gate=gate)[0] + add.float()
    else:
        expected = reference(*upcast(x, weight, bias), gate=gate, add=add.float())
    assert_close(out, expected)


def test_neither_bias_nor_sum(rand, assert_close, small_pieces) -> None:
    """And an input that is a row of a wider one."""
    x, weight = rand(1, 300)[:, :200], rand(50, 200)
    out = torch.full((1, 50), float("nan"), dtype=torch.float32, device=x.device)
    tile = StreamedTile(rows=2, stages=3, programs=7)
    assert streamed(x, weight, tile=tile, out=out) is out
    assert_close(out, reference(*upcast(x, weight)), 2e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("k", [2048, 4096, 5120, 8192, 12288, 14336, 28672])
def test_two_rings_fit_a_multiprocessor(k, itemsize, gated) -> None:
    tile = streamed_tile(k, gated=gated, itemsize=itemsize)
    if tile is None:
        assert k * itemsize * (1 + gated) > 40_000
        return
    piece = min(k, 4096 if k % 4096 == 0 else 2048)
    row = -(-k // piece) * piece * itemsize * (1 + gated)
    ring = (tile.stages - 1) * tile.rows * row
    assert 64 << 10 <= ring <= 96 << 10  # of 227 KiB


def test_what_is_worth_it() -> None:
    def takes(rows, outputs, k, *, gated=False):
        return tile_of(rows, outputs, k, gated=gated, itemsize=2) is not None

    for outputs, k, gated in ((6144, 4096, False), (4096, 4096, False), (12288, 4096, True), (4096, 12288, False)):
        assert takes(1, outputs, k, gated=gated)  # Qwen3-8B
        assert not takes(2, outputs, k, gated=gated)
    for outputs, k, gated in ((4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False)):
        assert not takes(1, outputs, k, gated=gated)  # Qwen3-0.6B
    assert not takes(1, 151936, 4096)


@pytest.mark.parametrize(
    ("outputs", "k", "gated", "tile"),
    [
        (6144, 4096, False, StreamedTile(rows=2, stages=5, warps=8, programs=264)),
        (4096, 4096, False, StreamedTile(rows=2, stages=4, warps=8, programs=528)),
        (12288, 4096, True, StreamedTile(rows=1, stages=7, warps=8, programs=264)),
        (4096, 12288, False, StreamedTile(rows=1, stages=5, warps=4, programs=264)),
        (3072, 4096, False, StreamedTile(rows=2, stages=3, warps=4, programs=528)),
        (6144, 4096, True, StreamedTile(rows=1, stages=7, warps=8, programs=264)),
        (4096, 6144, False, StreamedTile(rows=1, stages=5, warps=8, programs=528)),
    ],
)
def test_tiles_of_a_layer_are_those_measured(outputs, k, gated, tile) -> None:
    """Of Qwen3-8B, and of one of two ranks."""
    assert tile_of(1, outputs, k, gated=gated, itemsize=2) == tile


def test_other_gpus_hold_weights_in_registers(monkeypatch) -> None:
    ops = TritonOps(products=False)
    monkeypatch.setattr("nanoengine.kernels.ops.is_hopper", lambda device: device.index == 1)
    assert [ops._streams_on(torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")] == [True, False, True]


@pytest.mark.parametrize("on", [False, True])
def test_the_switch(rand, assert_close, monkeypatch, on) -> None:
    """As if any weight were large: one row's products are streamed if it is on, unless a residual is to be added first.
    Others never are."""
    launched: list[str] = []

    def spy(name):
        kernel = getattr(matvec_triton, name)
        monkeypatch.setattr(
            matvec_triton, name, lambda *args, **kwargs: (launched.append(name), kernel(*args, **kwargs))[1]
        )

    spy("streamed")
    tile = streamed_tile(64, gated=False, itemsize=4)
    assert tile is not None
    tile = dataclasses.replace(tile, programs=3)
    monkeypatch.setattr(matvec_triton, "streamed_tile_of", lambda rows, *_, **__: tile if rows == 1 else None)
    ops = TritonOps(products=False, kernels=KernelChoice.of({"matvec_streamed": on}))
    weight, norm_weight, residual = rand(24, 64), rand(64), rand(1, 64)
    for rows in (1, 2):
        launched.clear()
        x, add = rand(rows, 64), rand(rows, 24)
        y, total = ops.norm_linear(x, None, norm_weight, EPS, weight, gate="silu")
        assert total is x
        assert_close(y, norm_reference(*upcast(x, None, norm_weight), EPS, weight.float(), gate="silu")[0])
        assert_close(ops.linear(x, weight), reference(*upcast(x, weight)))
        assert_close(ops.linear_add(x, weight, None, add)[0], reference(*upcast(x, weight), add=add.float()))
        assert launched == ["streamed"] * (3 if on and rows == 1 else 0)
    x = rand(1, 64)
    launched.clear()
    y, total = ops.norm_linear(x, residual, norm_weight, EPS, weight)
    assert torch.equal(total, x + residual)
    assert not launched
