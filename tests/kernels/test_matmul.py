"""Products of many rows against torch, with what is fused to them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")
from nanoengine.kernels import all_reduce
from nanoengine.kernels import matmul as twin
from nanoengine.kernels.matmul import MatmulTile, Scaled, matmul_tile
from nanoengine.kernels.matmul_launch import Products
from nanoengine.kernels.matmul_triton import matmul, takes
from nanoengine.kernels.matvec import matvec as reference
from nanoengine.kernels.matvec import norm_matvec as norm_reference
from nanoengine.kernels.ops import Ops, TritonOps

EPS = 1e-6
TILES = [
    MatmulTile(16, 16, 16, warps=4, stages=2),
    MatmulTile(32, 16, 32, warps=4, stages=2),
    MatmulTile(16, 32, 64, warps=4, stages=2),
]


def upcast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.float() for t in tensors]


@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_agrees(rand, assert_close, tile, gate) -> None:
    """Rows, outputs and K that do not fill a tile, with bias, gate and residual stream."""
    rows, n, k = 37, 72, 200
    x, weight, bias, add = rand(rows, k), rand(n, k), rand(n), rand(rows, n // 2 if gate else n)
    out, scaled = matmul(x, weight, bias, gate=gate, add=add, tile=tile)
    assert scaled is None
    assert_close(out, reference(*upcast(x, weight, bias), gate=gate, add=add.float()))


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("tile", TILES)
def test_a_norm_between_two_products_takes_no_launch(rand, assert_close, tile, gate) -> None:
    """The first writes its result, and what the second needs of it to be the product of the normalised result."""
    rows, k, hidden, n = 37, 48, 72, 64
    x, first, add, norm_weight, second = (
        rand(rows, k),
        rand(hidden, k),
        rand(rows, hidden),
        rand(hidden),
        rand(n, hidden),
    )
    total, scaled = matmul(x, first, add=add, next_norm=norm_weight, tile=tile)
    assert isinstance(scaled, Scaled)
    assert scaled.norm_weight is norm_weight
    assert_close(total, reference(*upcast(x, first), add=add.float()))
    assert_close(scaled.values, total.float() * norm_weight.float())
    assert_close(scaled.squares.sum(0), total.float().square().sum(1), bound=1e-5)
    out, _ = matmul(scaled, second, gate=gate, eps=EPS, tile=tile)
    expected, _ = norm_reference(*upcast(total, None, norm_weight), EPS, second.float(), gate=gate)
    assert_close(out, expected, bound=4e-3 if out.dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("gate", [None, "gelu_tanh"])
def test_the_reference_agrees(rand, assert_close, gate) -> None:
    x, weight, add, norm_weight = rand(37, 48), rand(48, 48), rand(37, 24 if gate else 48), rand(24 if gate else 48)
    for given in (x, twin.matmul(x, weight, next_norm=rand(48))[1]):
        (y, s), (want, t) = (
            make(given, weight, gate=gate, add=add, next_norm=norm_weight, eps=EPS, **tile)
            for make, tile in ((matmul, {"tile": TILES[0]}), (twin.matmul, {}))
        )
        assert_close(y, want)
        assert_close(s.values, t.values, bound=4 * torch.finfo(y.dtype).eps)
        assert_close(s.squares.sum(0), t.squares.sum(0), bound=4 * torch.finfo(y.dtype).eps)


def test_it_writes_where_asked(rand, assert_close) -> None:
    x, weight = rand(20, 32), rand(24, 32)
    out = torch.empty(20, 24, dtype=torch.float32, device=x.device)
    y, _ = matmul(x, weight, out=out, tile=TILES[0])
    assert y is out
    assert_close(out, x.float() @ weight.float().T)


def test_rows_with_a_stride(rand, assert_close) -> None:
    x, weight = rand(20, 96)[:, 32:64], rand(24, 32)
    assert takes(x, weight)
    assert_close(matmul(x, weight, tile=TILES[0])[0], reference(*upcast(x, weight)))


def test_what_the_copy_engine_cannot_read_is_not_taken(rand) -> None:
    wide, weight = rand(20, 99), rand(24, 32)
    assert not takes(wide[:, :32], weight)  # rows at odd multiples of the element
    assert not takes(rand(20, 96)[:, 1:33], weight)  # a start that is not aligned
    assert not takes(rand(32, 20).T, weight)


LAYER = {
    "qkv": (4096, 1024, False),
    "o": (1024, 2048, False),
    "gate_up": (3072, 1024, True),
    "down": (1024, 3072, False),
}  # of Qwen3-0.6B: outputs, K, gated


@pytest.mark.parametrize("rows", [1, 32, 33, 64, 65, 192, 193, 256, 257, 512, 513, 576, 577, 832, 833, 4096, 16384])
def test_only_what_was_measured_has_a_tile(rows) -> None:
    """The four products of a layer, from 33 rows to 512, some of them beyond."""
    last = {"qkv": 512, "o": 512, "gate_up": 16384, "down": 512}
    for name, (n, k, gated) in LAYER.items():
        tile = matmul_tile(rows, n, k, gated=gated, itemsize=2, normed=name in ("qkv", "gate_up"))
        owned = 33 <= rows <= last[name] or (name == "down" and 576 < rows <= 832)
        assert (tile is not None) == owned, name
        assert matmul_tile(rows, n, k, gated=gated, itemsize=4) is None
        if tile is None:
            continue
        by_triton = (name == "qkv" and 192 < rows <= 256) or (name == "gate_up" and 576 < rows <= 832)
        assert tile.gluon == (not by_triton), name
        split = n == 1024 and (rows <= 64 or (name == "down" and rows <= 256))
        assert tile.splits == ((4 if rows <= 64 else 2) if split else 1), name
        stage = (tile.block_m + tile.block_n * (1 + gated)) * tile.block_k * 2
        assert tile.stages >= 3
        assert stage * tile.stages <= 227 << 10
        assert (n % tile.block_n, k % (tile.block_k * tile.splits)) == (0, 0)
        if 256 < rows <= 512:  # one wave, of one or two programs to a multiprocessor
            programs = -(-rows // tile.block_m) * (n // tile.block_n)
            assert programs <= 132 * (2 if stage * tile.stages <= 112 << 10 else 1), name


@pytest.mark.parametrize("rows", [32, 33, 64, 65, 192, 193, 256, 257])
def test_tiles_of_one_of_two_ranks_are_those_measured(rows) -> None:
    """Of Qwen3-8B; whole ones, and what stands before the norm in attention, have others."""
    few, many = 33 <= rows <= 64, 192 < rows <= 256
    for n, k, gated, tile in (
        (3072, 4096, False, MatmulTile(64, 32, 128, warps=4, stages=8, gluon=True) if few else None),
        (6144, 4096, True, MatmulTile(64, 32, 64, warps=4, stages=6, gluon=True) if few else None),
        (4096, 6144, False, MatmulTile(64, 32, 128, warps=4, stages=8, gluon=True) if few else None),
        (4096, 2048, False, None),
        (4096, 4096, False, None),
        (6144, 4096, False, None),
        (12288, 4096, True, None),
        (4096, 12288, False, None),
    ):
        if many and (n, k) == (4096, 6144):
            tile = MatmulTile(128, 64, 64, warps=4, stages=8, gluon=True)
        assert matmul_tile(rows, n, k, gated=gated, itemsize=2) == tile, (n, k)
        assert matmul_tile(rows, n, k, gated=gated, itemsize=4) is None


@pytest.mark.parametrize(
    ("rows", "block"),
    [
        *((1, None), (32, None), (33, (64, 32)), (64, (64, 32)), (65, (64, 64)), (128, (64, 64))),
        *((129, (128, 64)), (256, (128, 64)), (257, None)),
    ],
)
def test_tiles_of_products_that_are_summed_over_ranks(rows, block) -> None:
    for n, k in ((4096, 2048), (4096, 6144), (2048, 1024), (2560, 4864)):
        tile = twin.tile_over_ranks(rows, n, k, itemsize=2)
        assert (tile and (tile.block_m, tile.block_n)) == block
        assert tile is None or (tile.gluon and tile.staged and tile.splits == 1)
        assert twin.tile_over_ranks(rows, n, k, itemsize=4) is None
    for n, k in ((1024, 2048), (4160, 2048), (5120, 2048), (4096, 896), (4096, 2080), (4064, 2048)):
        assert twin.tile_over_ranks(rows, n, k, itemsize=2) is None


def test_other_sizes_and_gpus_have_no_tiles_that_need_measuring() -> None:
    """Larger models' products, odd ones, and those of parts on a GPU that cannot hold all programs at a time: none may
    wait for another."""
    assert matmul_tile(64, 1024, 3072, gated=False, itemsize=2, normed=True).splits == 1
    for few in (16, 100):
        assert matmul_tile(256, 1024, 3072, gated=False, itemsize=2, multiprocessors=few).splits == 1
    for n, k in [(6144, 4096), (3072, 2048), (1000, 1024), (1024, 1000), (151936, 1024)]:
        for rows in (64, 400, 700):
            assert matmul_tile(rows, n, k, gated=False, itemsize=2) is None
    assert matmul_tile(64, 8192, 1024, gated=False, itemsize=2) is not None
    assert matmul_tile(400, 8192, 1024, gated=False, itemsize=2) is None


@pytest.mark.parametrize("rows", [260, 600])
def test_many_rows_take_their_gate_in_the_product(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, rows: int
) -> None:
    """Behind a norm that adds to the residual stream: in the place of two launches there is one."""
    ops, generator = TritonOps(), torch.Generator().manual_seed(1)
    shapes = (rows, 128), (rows, 128), (256, 128)
    x, residual, weight = (torch.randn(*shape, generator=generator).half().to(device) for shape in shapes)
    norm_weight = torch.ones(128, device=device).half()
    want, total = Ops().norm_linear(x.float(), residual.float(), norm_weight.float(), EPS, weight.float(), gate="silu")
    monkeypatch.setattr(ops, "act_and_mul", None)
    found, stream = ops.norm_linear(x, residual, norm_weight, EPS, weight, gate="silu")
    assert float((found.float() - want).norm() / want.norm()) < 2e-3
    assert float((stream.float() - total).norm() / total.norm()) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rows", [33, 64, 100, 128, 192, 193, 256, 257, 300, 384, 447, 448, 500, 512, 600, 704, 832, 833, 1088]
)
def test_the_products_of_a_layer_on_a_gpu(rows) -> None:
    """By the kernel of each tile, Gluon's too: with residual stream and the norm that follows, behind a norm, gated."""
    generator, products = torch.Generator("cuda").manual_seed(1), Products()

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    def close(out: torch.Tensor, expected: torch.Tensor) -> None:
        assert float((out.float() - expected.float()).norm() / expected.float().norm()) < 4e-3

    add, norm_weight = rand(rows, 1024), rand(1024)
    behind = [(rand(4096, 1024), None), (rand(6144, 1024), "silu"), (rand(1024, 1024), None)]
    for k in (2048, 3072):
        x, weight = rand(rows, k), rand(1024, k)
        y, scaled = twin.matmul(x, weight, add=add, next_norm=norm_weight)
        if products.takes(x, weight):
            want, wanted = y, scaled
            y, scaled = products(x, weight, add=add, next_norm=norm_weight)
            assert torch.equal(products(x, weight, add=add)[0], y)
            close(products(x, weight)[0], twin.matmul(x, weight)[0])
            close(y, want)
            close(scaled.values, wanted.values)
            close(scaled.squares.sum(0), wanted.squares.sum(0))
        for given, (after, gate) in product((scaled, y), behind):
            if products.takes(y, after, gate=gate):
                out, _ = products(given, after, gate=gate, eps=EPS)
                close(out, twin.matmul(given, after, gate=gate, eps=EPS)[0])


# Every kind of end, by tiles of both numbers of warps; K of fewer steps than there are stages, and of more. All fit
# shared memory with a gate, too.
ENDS = {
    "few outputs": MatmulTile(64, 32, 128, warps=4, stages=6, gluon=True),
    "square": MatmulTile(64, 64, 64, warps=4, stages=8, gluon=True),
    "whole lines": MatmulTile(64, 128, 64, warps=4, stages=4, gluon=True, staged=True),
    "eight warps": MatmulTile(128, 64, 64, warps=8, stages=3, gluon=True),
    "eight warps, whole lines": MatmulTile(128, 64, 64, warps=8, stages=3, gluon=True, staged=True),
    "four warps of 128 rows": MatmulTile(128, 64, 64, warps=4, stages=6, gluon=True),
    "parts": MatmulTile(64, 64, 128, warps=4, stages=6, gluon=True, splits=2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ENDS)
def test_every_end_of_a_tile_on_a_gpu(assert_close, name, dtype) -> None:
    """Rows and outputs that do not fill a tile, rows of x and of the residual stream with a stride, sums of squares in
    one part, in 16 and in 40, and a gate: against the twin."""
    from nanoengine.kernels import matmul_gluon

    tile, generator = ENDS[name], torch.Generator("cuda").manual_seed(1)
    tickets, bound = torch.zeros(64, dtype=torch.int32, device="cuda"), 4 * torch.finfo(dtype).eps

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    for rows, n, k in ((65, 192, 256), (200, 448, 1024)):
        x, weight, add, norm = rand(rows, 2 * k)[:, k:], rand(n, k), rand(rows, 2 * n)[:, :n], rand(n)
        y, scaled = matmul_gluon.matmul(x, weight, tile=tile, add=add, next_norm=norm, tickets=tickets)
        want, wanted = twin.matmul(x, weight, add=add, next_norm=norm)
        assert_close(y, want, bound=bound)
        assert_close(scaled.values, wanted.values, bound=bound)
        assert_close(scaled.squares.sum(0), wanted.squares.sum(0), bound=bound)
        for parts, gate in ((1, "silu"), (16, None), (40, "silu")) if tile.splits == 1 else ():
            squares = (torch.rand(parts, rows, device="cuda", generator=generator) + 0.5) * k / parts
            given, both = Scaled(norm, rand(rows, k), squares), rand(2 * n if gate else n, k)
            out, _ = matmul_gluon.matmul(given, both, tile=tile, eps=EPS, silu=gate is not None)
            assert_close(out, twin.matmul(given, both, gate=gate, eps=EPS)[0], bound=bound)


def following(turn: int) -> int:
    wrapped = (turn + 1 + 2**31) % 2**32 - 2**31
    return wrapped or 2


@pytest.mark.gpu
@pytest.mark.parametrize("turn", [0, 7, 2**31 - 1, -2])
@pytest.mark.parametrize("name", ["few outputs", "whole lines", "four warps of 128 rows", "parts"])
def test_the_sum_over_ranks_at_the_end_on_a_gpu(assert_close, name, turn) -> None:
    """One process plays both ranks, one after the other: what the other one sends is written beforehand. Two sums, of
    which the second uses the other half; of turns behind `turn`, which wraps around and leaves 0 out."""
    from nanoengine.kernels import matmul_gluon
    from nanoengine.kernels.inboxes_triton import PLACES, Inboxes

    tile, dtype, (rows, n, k), size = ENDS[name], torch.bfloat16, (100, 192, 256), 2
    generator, half = torch.Generator("cuda").manual_seed(1), 1 << 16
    tickets = torch.zeros(64, dtype=torch.int32, device="cuda")

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    data = [torch.zeros(2, size, half // 2, dtype=dtype, device="cuda") for _ in range(size)]
    signals = [torch.zeros(size, PLACES, dtype=torch.int32, device="cuda") for _ in range(size)]
    turns = [torch.full((PLACES,), turn, dtype=torch.int32, device="cuda") for _ in range(size)]
    there = [torch.tensor([each.data_ptr() for each in of], device="cuda") for of in (data, signals)]
    add, norm = rand(rows, n), rand(n)
    given = [(rand(rows, k), rand(n, k)) for _ in range(size)]
    alone = [matmul_gluon.matmul(x, weight, tile=tile, tickets=tickets)[0] for x, weight in given]
    want = all_reduce.all_reduce_add(alone, add)
    wanted = twin.matmul(want, torch.eye(n, device="cuda", dtype=dtype), next_norm=norm)[1]
    for rank, (x, weight) in enumerate(given):
        inboxes, now = Inboxes(rank, size, there[0], *there, turns[rank], (half, half)), turn
        for _ in range(2):
            now = following(now)
            data[rank][now & 1, 1 - rank, : rows * n].copy_(alone[1 - rank].flatten())
            signals[rank][1 - rank].fill_(now)
            y, scaled = matmul_gluon.matmul(
                x, weight, tile=tile, add=add, next_norm=norm, tickets=tickets, inboxes=lambda own=inboxes: own
            )
            assert torch.equal(y, want)
            assert_close(scaled.values, wanted.values, bound=4 * torch.finfo(dtype).eps)
            assert_close(scaled.squares.sum(0), wanted.squares.sum(0), bound=4 * torch.finfo(dtype).eps)
            assert torch.equal(data[1 - rank][now & 1, rank, : rows * n].view(rows, n), alone[rank])
            used = -(-rows // tile.block_m) * (n // tile.block_n) * tile.splits
            assert (signals[1 - rank][rank, :used] == now).all()
            assert (turns[rank] == now).all()


@pytest.mark.gpu
@pytest.mark.parametrize("behind", [1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 4])
def test_the_sum_over_ranks_waits_for_late_signals_on_a_gpu(behind) -> None:
    """However old a signal is that another rank left: so many turns. What it sends comes by another stream, later."""
    from nanoengine.kernels import matmul_gluon
    from nanoengine.kernels.inboxes_triton import PLACES, Inboxes

    tile, dtype, (rows, n, k), turn = ENDS["whole lines"], torch.bfloat16, (100, 192, 256), 7
    data = torch.full((2, 2, 1 << 15), float("nan"), dtype=dtype, device="cuda")
    signals = torch.full((2, PLACES), (turn - behind + 2**31) % 2**32 - 2**31, dtype=torch.int32, device="cuda")
    there = [torch.tensor([each.data_ptr()] * 2, device="cuda") for each in (data, signals)]
    turns = torch.full((PLACES,), turn - 1, dtype=torch.int32, device="cuda")
    x, weight, theirs = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((rows, k), (n, k), (rows, n)))
    add, sent = torch.zeros_like(theirs), torch.full_like(signals[1], turn)
    alone = matmul_gluon.matmul(x, weight, tile=tile)[0]
    # rank 0 would write into its own memory, as there is one process: into another place than it reads
    inboxes = Inboxes(0, 2, there[0], *there, turns, (1 << 16, 1 << 16))
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(20_000_000)
        data[turn & 1, 1, : rows * n].copy_(theirs.flatten())
        signals[1].copy_(sent)
    y, _ = matmul_gluon.matmul(x, weight, tile=tile, add=add, inboxes=lambda: inboxes)
    torch.cuda.synchronize()
    assert torch.equal(y, all_reduce.all_reduce_add([alone, theirs], add))
