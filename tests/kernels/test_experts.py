"""Experts in Triton, by either route, and in torch.

Most data are small integers with gates so high that their sigmoid is 1: then every sum is exact in any order, what an
expert makes has at most the 8 bits of bfloat16, and all routes must give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from nanoengine.kernels import experts as reference
from nanoengine.kernels import experts_triton
from nanoengine.kernels.experts_few_triton import FewTile, down_tile, few, gate_up_tile
from nanoengine.kernels.experts_grouped_triton import GroupedTile, GroupedTiles, by_expert, grouped, grouped_tiles

SIZES = [(4, 2, 24, 20), (9, 3, 40, 36), (8, 5, 40, 66)]  # experts, top k, hidden, inner: no multiples of tiles
SMALL = GroupedTiles(16, GroupedTile(32, 32, warps=4, stages=2), GroupedTile(16, 16, warps=4, stages=2))
LARGE = GroupedTiles(
    32, GroupedTile(64, 64, warps=4, stages=3), GroupedTile(128, 32, warps=4, stages=3), float_parts=False
)
ROUTES = {
    "few": few,
    "few, other tiles": partial(few, tiles=(FewTile(8, 128, 4), FewTile(16, 16, 4))),
    "grouped, 16 pairs a tile": partial(grouped, tiles=SMALL),
    "grouped, 32 pairs a tile": partial(grouped, tiles=LARGE),
}


@dataclass(frozen=True)
class Case:
    """x, ids, weights, gate_up, down in order; and the biases."""

    tensors: tuple[Tensor, ...]
    biases: dict[str, Tensor | None]

    def run(self, kernel: Any, **around: Any) -> Tensor:
        x = self.tensors[0]
        given = {"activation": "silu", "first": 0, "add": None, **self.biases, **around}
        if kernel in (reference.experts, experts_triton.experts):
            return kernel(*self.tensors, **given)
        return kernel(*self.tensors, **given, out=torch.full_like(x.contiguous(), float("nan")))

    def wide(self) -> Case:
        """The same in float32."""
        x, ids, weights, gate_up, down = self.tensors
        biases = {name: None if bias is None else bias.float() for name, bias in self.biases.items()}
        return Case((x.float(), ids, weights, gate_up.float(), down.float()), biases)


def chosen(kind: str, rows: int, experts: int, top_k: int, random: torch.Generator) -> Tensor:
    """Which experts tokens go to."""
    ids = torch.rand(rows, experts, generator=random).argsort(1)[:, :top_k]
    if kind == "all to the same":
        ids = ids[:1].expand(rows, -1)
    if kind == "most experts idle":
        ids = torch.rand(rows, top_k, generator=random).argsort(1) + experts - top_k
    if kind == "padding":
        ids[1::3] = experts
    return ids.to(torch.int32).contiguous()


def integers(
    kind: str, rows: int, sizes: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Case:
    experts, top_k, hidden, inner = sizes
    random = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=random).to(device, dtype)

    x, gate_up, down = whole(0, 1, rows, hidden), whole(-1, 1, experts, 2 * inner, hidden), whole(
        0, 1, experts, hidden, inner)  # fmt: skip
    gate_up *= (torch.rand(gate_up.shape, generator=random) < 0.1).to(device)
    down *= (torch.rand(down.shape, generator=random) < 0.12).to(device)
    weights = torch.randint(1, 4, (rows, top_k), generator=random).float().to(device) / 4
    biases = {
        "gate_up_bias": torch.cat((whole(21, 23, experts, inner), whole(-1, 1, experts, inner)), 1),
        "down_bias": whole(-3, 3, experts, hidden),
    }
    ids = chosen(kind, rows, experts, top_k, random).to(device)
    return Case((x, ids, weights, gate_up, down), biases)


@pytest.mark.half
@pytest.mark.parametrize("kernel", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize(
    ("kind", "sizes", "many"),
    [
        ("spread", SIZES[0], 17),
        ("spread", SIZES[2], 5),
        ("all to the same", SIZES[1], 35),
        ("most experts idle", SIZES[1], 9),
        ("padding", SIZES[1], 8),
    ],
)
def test_agrees_to_the_bit(device, dtype, kernel, kind, sizes, many) -> None:
    for rows in (1, many if "grouped" in str(kernel) else 3):
        case = integers(kind, rows, sizes, device, dtype, seed=rows)
        add = torch.randint(-9, 9, (rows, sizes[2])).to(device, dtype)
        want = case.run(reference.experts, add=add)
        assert torch.equal(want, case.wide().run(reference.experts, add=add).to(dtype)), (
            "nothing but the result is rounded"
        )
        assert want.unique().numel() > 9
        assert torch.equal(case.run(kernel, add=add), want)


@pytest.mark.half
@pytest.mark.parametrize("kernel", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize(("activation", "with_bias"), [("silu", False), ("gelu_tanh", True), ("swiglu_clamped", True)])
def test_agrees(rand, assert_close, device, kernel, activation, with_bias) -> None:
    """Against float32. Rounded are what goes into down, perhaps what comes out of it, and the sum: each by half of the
    dtype's spacing at the most, and by a quarter of it in the mean square. The default bound is all of it."""
    rows, experts, top_k, hidden, inner = 3, 7, 3, 40, 36
    ids = chosen("spread", rows, experts, top_k, torch.Generator().manual_seed(3)).to(device)
    x, weights = rand(rows, hidden), rand(rows, top_k).float().abs()
    gate_up, down = rand(experts, 2 * inner, hidden), rand(experts, hidden, inner)
    biases = {"gate_up_bias": rand(experts, 2 * inner), "down_bias": rand(experts, hidden)}
    case = Case((x, ids, weights, gate_up, down), biases if with_bias else dict.fromkeys(biases))
    bound = 2e-5 if x.dtype == torch.float32 else None
    assert_close(
        case.run(kernel, activation=activation), case.wide().run(reference.experts, activation=activation), bound
    )
    other = case.wide().run(reference.experts, activation="gelu_tanh" if activation == "silu" else "silu")
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(case.run(kernel, activation=activation), other, bound)


@pytest.mark.parametrize("kernel", [reference.experts, few, grouped], ids=["torch", "few", "grouped"])
def test_padding_reads_no_expert_and_keeps_its_nan(device, dtype, kernel) -> None:
    """Of tokens that go nowhere nothing is left, and no other token's sum has a bit of theirs."""
    case = integers("padding", 5, SIZES[1], device, dtype)
    x, ids, weights, *layers = case.tensors
    padding = (ids == SIZES[1][0]).all(1)
    assert padding.tolist() == [False, True, False, False, True]
    dirty = x.masked_fill(padding.unsqueeze(1), float("nan"))
    out = Case((dirty, ids, weights, *layers), case.biases).run(kernel)
    assert torch.equal(out, case.run(reference.experts))
    assert out[padding].count_nonzero() == 0


@pytest.mark.parametrize("kernel", [reference.experts, few, grouped], ids=["torch", "few", "grouped"])
def test_a_token_of_nan_fails_alone(device, dtype, kernel) -> None:
    """One that is real: its experts are shared with the others."""
    case = integers("all to the same", 4, SIZES[1], device, dtype)
    x, ids, weights, *layers = case.tensors
    dirty, shares = x.clone(), weights.clone()
    dirty[2], shares[2] = float("nan"), float("nan")
    out = Case((dirty, ids, shares, *layers), case.biases).run(kernel)
    kept = torch.tensor([0, 1, 3], device=device)
    assert torch.equal(out[kept], case.run(reference.experts)[kept])
    assert out[2].isnan().all()


@pytest.mark.parametrize("kernel", [reference.experts, few, grouped], ids=["torch", "few", "grouped"])
def test_shares_of_the_experts_add_up(assert_close, device, dtype, kernel) -> None:
    """As ranks hold them: whole experts, with the numbers that they have among all. bfloat16 rounds their sums."""
    ranks = 3
    case = integers("padding", 4, (9, 3, 40, 20), device, dtype)
    x, ids, weights, gate_up, down = case.tensors
    total = torch.zeros_like(x, dtype=torch.float32)
    for rank in range(ranks):
        held = slice(9 * rank // ranks, 9 * (rank + 1) // ranks)
        share = Case((x, ids, weights, gate_up[held], down[held]), {k: b[held] for k, b in case.biases.items()})
        total += share.run(kernel, first=held.start).float()
    assert_close(total.to(dtype), case.run(reference.experts), None if dtype == torch.bfloat16 else 0.0)


@pytest.mark.parametrize("rows", [3, 9])
def test_a_token_does_not_depend_on_the_others(device, dtype, rows) -> None:
    case = integers("spread", rows, SIZES[1], device, dtype)
    together = case.run(experts_triton.experts)
    for t in (0, 2):
        x, ids, weights, *layers = case.tensors
        alone = Case((x[t : t + 1], ids[t : t + 1], weights[t : t + 1], *layers), case.biases)
        assert torch.equal(together[t : t + 1], alone.run(experts_triton.experts))


def test_few_tokens_read_their_experts_one_by_one(device, monkeypatch) -> None:
    ran = []
    for name in ("few", "grouped"):
        kernel = getattr(experts_triton, name)
        monkeypatch.setattr(
            experts_triton, name, lambda *a, _k=kernel, _n=name, **kw: (ran.append(_n), _k(*a, **kw))[1]
        )
    for rows in (1, 2, 3):
        case = integers("spread", rows, SIZES[0], device, torch.float32)
        assert torch.equal(case.run(experts_triton.experts), case.run(reference.experts))
    assert ran == ["few", "few", "grouped"]
    assert not experts_triton.takes_few(1, 8, 1 << 14, 2)  # more than a program can hold


def test_rows_may_be_strided_or_absent_and_the_result_has_a_place(device) -> None:
    for rows in (2, 7):
        case = integers("spread", rows, SIZES[0], device, torch.float32)
        x, *others = case.tensors
        hidden = x.shape[1]
        wide = torch.cat((x, torch.full_like(x, 3.0)), 1)
        strided = Case((wide[:, :hidden], *others), case.biases)
        out = torch.full_like(x, float("nan"))
        got = strided.run(experts_triton.experts, add=wide[:, hidden:], out=out)
        assert got.data_ptr() == out.data_ptr()
        assert torch.equal(out, case.run(reference.experts) + 3.0)
    empty = Case((x[:0], *(each[:0] for each in others[:2]), *others[2:]), case.biases)
    assert empty.run(experts_triton.experts).shape == (0, hidden)


@pytest.mark.parametrize("pairs", [1, 300, 5000, 20000])  # the last two in two blocks
@pytest.mark.parametrize("block_t", [16, 64])
@pytest.mark.parametrize("kind", ["any", "one", "none"])
def test_pairs_in_order_by_expert(device, pairs, block_t, kind) -> None:
    """Each once, in the slots of its expert, in order; experts of other ranks are left out."""
    experts, first = 5, 2
    random = torch.Generator().manual_seed(pairs)
    ids = torch.randint(0, 9, (pairs, 1), generator=random)
    ids = {"any": ids, "one": torch.full_like(ids, 4), "none": torch.full_like(ids, 8)}[kind].to(device, torch.int32)
    pair, owner = by_expert(ids, experts, first, block_t)
    slots = pair.view(-1, block_t)
    assert len(owner) == len(slots) == pairs // block_t + experts
    for expert in range(experts):
        used = slots[owner == expert].flatten()
        want = (ids.flatten() == expert + first).nonzero().flatten()
        assert torch.equal(used[: len(want)].long(), want)
        assert (used[len(want) :] == -1).all()
        assert len(used) == -(-len(want) // block_t) * block_t
    assert set(owner.tolist()) <= {-1, *range(experts)}


def test_tiles_hold_what_a_program_can() -> None:
    """Over known sizes: (experts, top k, hidden, inner) of Qwen3-30B-A3B, Mixtral-8x7B, DeepSeek-V3, GPT-OSS, OLMoE."""
    known = [(128, 8, 2048, 768), (8, 2, 4096, 14336), (256, 8, 7168, 2048), (128, 4, 2880, 2880), (64, 8, 2048, 1024)]
    for experts, top_k, hidden, inner in known:
        for itemsize in (2, 4):
            tile, down = gate_up_tile(hidden, itemsize), down_tile(inner, top_k, itemsize)
            held = 2 * tile.block_n * tile.block_k * itemsize / (32 * tile.warps)
            assert held <= 256, tile
            if experts_triton.takes_few(1, top_k, inner, itemsize):
                pieces = -(-inner // down.block_k) * top_k
                assert pieces * down.block_n * down.block_k * itemsize / (32 * down.warps) <= 512, down
            for rows in (8, 64, 256, 2048, 8192):
                tiles = grouped_tiles(rows * top_k, experts, itemsize)
                for product in (tiles.gate_up, tiles.down):
                    shared = product.stages * (product.width + tiles.block_t) * product.block_k * itemsize
                    assert shared <= 220_000, (rows, tiles)


@pytest.mark.parametrize("kind", ["spread", "all to the same", "most experts idle", "padding"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_torchs_grouped_products_are_the_loop(kind, with_bias) -> None:
    """What plain operations run on a GPU."""
    case = integers(kind, 7, SIZES[1], torch.device("cpu"), torch.float32)
    x, ids, _, gate_up, down = case.tensors
    biases = case.biases.values() if with_bias else (None, None)
    local = ids.long()
    loop = reference._looped(x, local, gate_up, down, "silu", *biases)
    torch.testing.assert_close(reference._grouped(x, local, gate_up, down, "silu", *biases), loop)
    assert loop[local == len(down)].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 16, 64, 256, 2048])
@pytest.mark.parametrize("sizes", [(128, 8, 2048, 768), (8, 2, 4096, 1792), (32, 4, 2880, 2880)])
def test_agrees_large(rand, assert_close, device, dtype, rows, sizes) -> None:
    experts, top_k, hidden, inner = sizes
    ids = chosen("spread", rows, experts, top_k, torch.Generator().manual_seed(rows)).to(device)
    weights = torch.rand(rows, top_k, device=device)
    gate_up = torch.randn(experts, 2 * inner, hidden, device=device, dtype=dtype) / hidden**0.5
    down = torch.randn(experts, hidden, inner, device=device, dtype=dtype) / inner**0.5
    x = rand(rows, hidden)
    out = experts_triton.experts(x, ids, weights, gate_up, down)
    assert torch.equal(out, experts_triton.experts(x, ids, weights, gate_up, down))
    few_rows = slice(0, min(rows, 64))
    wide = (x[few_rows].float(), ids[few_rows], weights[few_rows], gate_up.float(), down.float())
    assert_close(out[few_rows], reference.experts(*wide), 5e-6 if dtype == torch.float32 else None)
