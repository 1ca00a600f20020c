"""Paged attention kernels against the plain-torch reference, on caches whose unused slots hold NaN."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanoengine.kernels import paged_attention as reference

pytest.importorskip("triton")

from nanoengine.kernels import paged_attention_decode_triton
from nanoengine.kernels import paged_attention_several_triton as several
from nanoengine.kernels import paged_attention_triton as kernels
from nanoengine.kernels.paged_attention_triton import (
    DecodeConfig,
    DecodePlanner,
    DecodeScratch,
    NewTokens,
    PrefillConfig,
    SeveralConfig,
)
from nanoengine.plugins.attention_backends.triton_paged import TritonPaged
from nanoengine.setup.start.graph_sizes import decode_sizes

# of values around 1: rounding of the output and of the probabilities
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    with_sinks: bool = False

    @property
    def arguments(self) -> dict[str, float | int | None]:
        return {"scale": self.head_size**-0.5, "window": self.window, "soft_cap": self.soft_cap}


class Batch:
    """Rows of (query length, context length), stored by `store_kv` into a cache full of NaN but for the dummy block."""

    def __init__(self, shape: Shape, rows: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        rng, generator = random.Random(len(rows)), torch.Generator().manual_seed(7)
        size, columns = shape.block_size, 3 + max(-(-n // shape.block_size) for _, n in rows)
        ids = list(range(1, 1 + sum(-(-n // size) for _, n in rows)))
        rng.shuffle(ids)
        tables = torch.zeros(len(rows), columns, dtype=torch.int32)
        slots: list[int] = []
        for row, (_, length) in enumerate(rows):
            mine = [ids.pop() for _ in range(-(-length // size))]
            tables[row, : len(mine)] = torch.tensor(mine)
            slots += [mine[p // size] * size + p % size for p in range(length)]
        self.shape, self.rows, self.num_blocks = shape, rows, max(1, len(slots))

        def rand(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(dtype).to(device)

        pool = (1 + sum(-(-n // size) for _, n in rows), shape.kv_heads, size, shape.head_size)
        self.k_cache, self.v_cache = (torch.full(pool, float("nan"), dtype=dtype, device=device) for _ in range(2))
        self.k_cache[0] = self.v_cache[0] = 0
        self.slots = torch.tensor(slots, device=device)
        self.k, self.v = (rand(len(slots), shape.kv_heads, shape.head_size) for _ in range(2))
        self.q = rand(sum(q for q, _ in rows), shape.heads, shape.head_size) * 2
        self.tables, self.lens = tables.to(device), torch.tensor([n for _, n in rows], dtype=torch.int32, device=device)
        starts = torch.tensor([0] + [q for q, _ in rows]).cumsum(0)
        self.starts = starts.to(torch.int32).to(device)
        self.sinks = torch.linspace(-1, 4, shape.heads).to(dtype).to(device) if shape.with_sinks else None
        kernels.store_kv(self.k, self.v, self.k_cache, self.v_cache, self.slots)

    def want(self) -> Tensor:
        args = (self.q, self.k_cache, self.v_cache, self.tables, self.lens, self.starts)
        return reference.attend_prefill(*args, **self.shape.arguments, sinks=self.sinks)

    def decode(self, config: DecodeConfig | None = None, scratch: DecodeScratch | None = None) -> Tensor:
        shape, pairs = self.shape, len(self.rows) * self.shape.kv_heads
        out = torch.full_like(self.q, float("nan"))
        if config is None:
            planner = DecodePlanner.make(
                num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_size=shape.head_size, dtype=self.q.dtype,
                max_rows=len(self.rows), longest=max(n for _, n in self.rows), device=self.q.device,
            )  # fmt: skip
            config, scratch = planner.config(len(self.rows)), planner.scratch
        scratch = scratch or DecodeScratch.make(
            pairs * config.splits, pairs, shape.heads // shape.kv_heads, shape.head_size, self.q.device
        )
        kernels.attend_decode(
            self.q, self.k_cache, self.v_cache, out, self.tables, self.lens, config=config, scratch=scratch,
            **shape.arguments,
        )  # fmt: skip
        assert not scratch.tickets.any()  # ready for the next launch
        return out

    def several(self, queries: int, config: SeveralConfig | None = None, extra: int = 0) -> Tensor:
        """What rows of up to `queries` queries come out as; behind them `extra` tokens of padding, and one more."""
        shape = self.shape
        planner = DecodePlanner.make(
            num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_size=shape.head_size, dtype=self.q.dtype,
            max_rows=len(self.rows), longest=max(n for _, n in self.rows), device=self.q.device,
        )  # fmt: skip
        q = torch.cat([self.q, torch.full_like(self.q[:1], float("nan")).expand(extra + 1, -1, -1)])
        config = config or planner.several(len(self.rows), queries)
        programs = len(self.rows) * config.programs(shape.kv_heads, shape.heads // shape.kv_heads, queries)
        out, tickets = torch.full_like(q, float("nan")), torch.zeros(programs, dtype=torch.int32, device=q.device)
        kernels.attend_several(
            q, self.k_cache, self.v_cache, out, self.tables, self.lens, self.starts, queries=queries,
            config=config, tickets=tickets, pad_tokens=len(self.q) + extra, sinks=self.sinks, **shape.arguments,
        )  # fmt: skip
        assert not tickets.any()  # ready for the next launch
        assert out[-1].isnan().all()
        assert (out[len(self.q) : -1] == 0).all()
        return out[: len(self.q)]

    def prefill(self, config: PrefillConfig | None = None) -> Tensor:
        out = torch.full_like(self.q, float("nan"))
        args = (self.q, self.k_cache, self.v_cache, out, self.tables, self.lens, self.starts)
        kernels.attend_prefill(*args, config=config, **self.shape.arguments)
        return out


def agree(out: Tensor, want: Tensor) -> None:
    error = (out.float() - want.float()).abs().max().item()  # NaN fails
    assert error <= TOLERANCE[out.dtype], error


def small(splits: int, tile: int = 16) -> DecodeConfig:
    return DecodeConfig(tile=tile, splits=splits, min_tiles=1, warps=4, stages=3)


def test_store(dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch(Shape(kv_heads=3, heads=3, head_size=24), [(1, 20), (1, 3)], dtype, device)
    want = [torch.full_like(batch.k_cache, float("nan")) for _ in range(2)]
    for cache in want:
        cache[0] = 0
    reference.store_kv(batch.k, batch.v, *want, batch.slots)
    assert torch.equal(batch.k_cache.nan_to_num(99), want[0].nan_to_num(99))
    assert torch.equal(batch.v_cache.nan_to_num(99), want[1].nan_to_num(99))
    fused = torch.cat([batch.k.flatten(1), batch.v.flatten(1)], dim=1)
    k, v = (part.unflatten(1, (3, 24)) for part in fused.chunk(2, dim=1))  # strided, as a fused projection leaves them
    batch.k_cache.zero_()
    kernels.store_kv(k, v, batch.k_cache, batch.v_cache, batch.slots)
    assert torch.equal(batch.k_cache[1:], want[0][1:].nan_to_num(0))


@pytest.mark.half
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(heads=3, kv_heads=1, head_size=80, soft_cap=3.0),
        Shape(window=20, head_size=24, block_size=32),
        Shape(heads=2, block_size=12, head_size=10),  # tiles and blocks divide each other neither way
    ],
    ids=str,
)
def test_decode(shape: Shape, splits: int, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch(shape, [(1, 70), (1, 1), (1, 16), (1, 33)], dtype, device)
    agree(batch.decode(small(splits)), batch.want())


@pytest.mark.half
@pytest.mark.parametrize(
    ("held", "splits", "norm"), [(True, 1, True), (False, 4, True), (True, 4, False), (False, 1, False)]
)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(heads=6, head_size=24, block_size=8),
        Shape(window=20, head_size=32, block_size=32),
        Shape(window=1, head_size=32),
        Shape(soft_cap=3.0, head_size=32, kv_heads=4),
    ],
    ids=str,
)
def test_decode_of_qkv(
    shape: Shape, held: bool, splits: int, norm: bool, dtype: torch.dtype, device: torch.device
) -> None:
    batch = Batch(shape, [(1, n) for n in (1, 17, 40)], dtype, device)
    qkv_agrees(batch, replace(small(splits), held=held), norm)


def qkv_agrees(batch: Batch, config: DecodeConfig, norm: bool) -> None:
    """What norm, rotation and store, and then attention, give; nothing else of the cache is written. The second
    row is stored nowhere."""
    shape, dtype, device = batch.shape, batch.q.dtype, batch.q.device
    heads, size, generator = shape.heads + 2 * shape.kv_heads, shape.head_size, torch.Generator().manual_seed(3)
    qkv = torch.randn(len(batch.rows), heads * size, generator=generator).to(dtype).to(device)
    slots = batch.slots[batch.lens.long().cumsum(0) - 1]
    block, offset = slots // shape.block_size, slots % shape.block_size
    inv_freq = (10000.0 ** -(torch.arange(0, size, 2) / size)).to(device)
    weights = [(torch.rand(size, generator=generator) + 0.5).to(dtype).to(device) if norm else None for _ in range(2)]
    around = {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-6}
    for cache in (batch.k_cache, batch.v_cache):  # what is to come is not there yet
        cache[block, :, offset] = float("nan")
    caches, tables = [cache.clone() for cache in (batch.k_cache, batch.v_cache)], (batch.tables, batch.lens)
    want = reference.attend_decode_qkv(qkv, *caches, *tables, slots, inv_freq, **around, **shape.arguments)
    for cache in caches:
        cache[block[1:2], :, offset[1:2]] = float("nan")
    slots[1:2] = -1  # attended to, and stored nowhere
    pairs, out = len(batch.rows) * shape.kv_heads, torch.full_like(batch.q, float("nan"))
    kernels.attend_decode(
        qkv, batch.k_cache, batch.v_cache, out, *tables, config=config,
        scratch=DecodeScratch.make(pairs * config.splits, pairs, shape.heads // shape.kv_heads, size, device),
        new=NewTokens(slots=slots, inv_freq=inv_freq, **around), **shape.arguments,
    )  # fmt: skip
    agree(out, want)
    for got, cache in zip((batch.k_cache, batch.v_cache), caches, strict=True):
        torch.testing.assert_close(got, cache, equal_nan=True, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.half
@pytest.mark.parametrize("longest", [512, 8192])
@pytest.mark.parametrize("heads", [4, 3])
def test_one_row_of_up_to_four_heads_a_kv_head_is_read_from_qkv(
    heads: int, longest: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a kernel with little shared memory: one stage where each program asks for all of its keys in front. In
    float32 it would spill, and not be used."""
    monkeypatch.setattr("nanoengine.kernels.paged_attention_plan._INTERPRETED_MULTIPROCESSORS", 8)
    planner = DecodePlanner.make(
        num_heads=heads, num_kv_heads=1, head_size=64, dtype=dtype, max_rows=2, longest=longest, device=device
    )
    config = planner.fused(1)
    if dtype == torch.float32:
        assert config is None
        return
    assert config is not None
    assert config.held
    if device.type == "cpu":
        assert (config.tile, config.stages, config.splits) == ((128, 1, 4) if longest == 512 else (64, 2, 8))
    for length in (1, 129, 500):
        qkv_agrees(Batch(Shape(heads, 1, 64), [(1, length)], dtype, device), config, norm=heads == 4)


def test_more_heads_or_rows_are_not_read_from_qkv() -> None:
    def taken(heads: int, rows: int) -> bool:
        planner = DecodePlanner.make(
            num_heads=heads, num_kv_heads=1, head_size=64, dtype=torch.bfloat16, max_rows=4, longest=4096,
            device=torch.device("cpu"),
        )  # fmt: skip
        return replace(planner, multiprocessors=132).fused(rows) is not None

    assert [heads for heads in (1, 2, 3, 4, 5, 8) if taken(heads, 1)] == [1, 2, 3, 4]
    assert [heads for heads in (1, 2, 3, 4) if taken(heads, 2)] == [1, 2]


# Queries and tokens of a context: padding in a graph has none of either; a step begins with its row, or goes on.
RAGGED = [(5, 70), (1, 1), (0, 0), (3, 3), (4, 33), (5, 17), (1, 48), (0, 0)]


@pytest.mark.half
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("shape", "block_m"),
    [
        (Shape(), 16),
        (Shape(heads=3, kv_heads=1, head_size=80, soft_cap=3.0, with_sinks=True), 16),
        (Shape(window=20, head_size=24, block_size=32), 16),
        (Shape(window=2, head_size=16, with_sinks=True), 32),
        (Shape(heads=12, kv_heads=1, block_size=12, head_size=10), 16),  # each query has a tile of its own
    ],
    ids=str,
)
def test_decode_of_several_queries(
    shape: Shape, block_m: int, splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    batch = Batch(shape, RAGGED, dtype, device)
    spare = len(RAGGED) * 5 - len(batch.q)
    assert spare > len(RAGGED)
    out = batch.several(5, SeveralConfig(block_m, small(splits)), spare)
    agree(out, batch.want())


@pytest.mark.parametrize("queries", [2, 7, 16])
def test_the_layout_that_is_chosen_fits_any_number_of_queries(queries: int, device: torch.device) -> None:
    rows = [(queries, 130), (1, 130), (queries - 1, 40)]
    batch = Batch(Shape(heads=6, head_size=32), rows, torch.float32, device)
    agree(batch.several(queries), batch.want())


@pytest.mark.parametrize(
    ("line", "mutant"),
    [
        ("keys[None, :] <= position[:, None]", "keys[None, :] <= position[:, None] + 1"),
        ("keys[None, :] <= position[:, None]", "keys[None, :] < position[:, None]"),
        ("keys[None, :] > position[:, None] - WINDOW", "keys[None, :] > position[:, None] - WINDOW - 1"),
        ("keys[None, :] > position[:, None] - WINDOW", "keys[None, :] > position[:, None] - WINDOW + 1"),
        ("lowest - WINDOW + 1, 0)", "lowest - WINDOW + 1 + TILE, 0)"),
        ("stop - tile * BLOCK_Q, BLOCK_Q)", "stop - tile * BLOCK_Q - 1, BLOCK_Q)"),
        ("row.to(tl.int32) * queries - start", "row.to(tl.int32) * queries - stop"),
        ("pad_tokens - padding)", "pad_tokens - padding + 1)"),
        ("pairs = tl.minimum(stop - first, BLOCK_Q) * GROUP", "pairs = BLOCK_Q * GROUP"),
        ("if split == 0:  # a key", "if True:  # a key"),
    ],
    ids=[
        "sees-one-ahead", "misses-itself", "window-wide", "window-narrow", "window-begins-late", "padding-unwritten",
        "padding-of-other-rows", "padding-beyond", "queries-of-the-next-row", "a-sink-a-part",
    ],
)  # fmt: skip
def test_mutants_of_several_queries_are_caught(
    line: str, mutant: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(Shape(window=20, with_sinks=True), [(4, 60), (0, 0), (3, 40), (2, 9)], torch.float32, device)
    want, config = batch.want(), SeveralConfig(16, small(2))
    agree(batch.several(4, config, 6), want)  # of 7 tokens of padding
    source = Path(several.__file__).read_text()
    assert source.count(line) == 1
    (tmp_path / "mutant_triton.py").write_text(source.replace(line, mutant))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mutant_triton", raising=False)
    monkeypatch.setattr(kernels, "attend_several", importlib.import_module("mutant_triton").attend_several)
    with pytest.raises(AssertionError):
        agree(batch.several(4, config, 6), want)


def test_splits_are_used_and_each_is_counted_once(device: torch.device) -> None:
    """With a part left out, or twice in, this would not agree: the parts differ much."""
    batch = Batch(Shape(), [(1, 64)], torch.float32, device)
    scratch = DecodeScratch.make(8, 2, 2, 64, device)
    scratch.lse.fill_(float("nan"))
    agree(batch.decode(small(4), scratch), batch.want())
    assert scratch.lse[: 2 * 4 * 2].isfinite().all()  # two KV heads of four parts with two heads
    scratch.part.fill_(float("nan"))
    scratch.lse.fill_(float("nan"))
    agree(batch.decode(small(1), scratch), batch.want())
    assert scratch.lse.isnan().all()


@pytest.mark.parametrize(("length", "parts"), [(64, []), (80, [48, 32]), (90, [48, 42]), (128, [64, 64])])
def test_parts_of_a_row_are_even(length: int, parts: list[int], device: torch.device) -> None:
    """Two of at least four tiles of 16 keys at the most; a part of a query of zeros weighs as many as it has keys."""
    batch = Batch(Shape(), [(1, length)], torch.float32, device)
    batch.q.zero_()
    scratch = DecodeScratch.make(4, 2, 2, 64, device)
    scratch.lse.fill_(float("nan"))
    agree(batch.decode(replace(small(2), min_tiles=4), scratch), batch.want())
    keys = scratch.lse[:8].view(2, 2, 2).exp2().round()  # KV head, part, head
    assert keys.isnan().all() if not parts else keys[:, :, 0].tolist() == [parts] * 2


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(heads=3, kv_heads=1, head_size=80, soft_cap=3.0, block_size=32),
        Shape(window=20, head_size=24),
        Shape(heads=2, block_size=12, head_size=16, window=5),
    ],
    ids=str,
)
def test_prefill(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    rows = [(5, 5), (1, 30), (19, 60), (2, 17), (33, 33)]
    batch = Batch(shape, rows, dtype, device)
    agree(batch.prefill(PrefillConfig(block_m=16, tile=16, warps=4, stages=2)), batch.want())


def test_prefill_leaves_earlier_tokens_alone_and_zeroes_later_ones(device: torch.device) -> None:
    batch = Batch(Shape(), [(1, 9), (1, 4), (7, 20), (3, 3)], torch.float32, device)
    want = batch.want()
    batch.q = torch.cat([batch.q, batch.q[:6]])
    out = torch.full_like(batch.q, 7.0)
    kernels.attend_prefill(
        batch.q, batch.k_cache, batch.v_cache, out, batch.tables[2:], batch.lens[2:], batch.starts[2:],
        config=PrefillConfig(block_m=16, tile=16, warps=4, stages=2), **batch.shape.arguments,
    )  # fmt: skip
    assert (out[:2] == 7).all()
    agree(out[2:12], want[2:])
    assert (out[12:] == 0).all()


def test_decode_layouts_fit_the_scratch() -> None:
    shape = (8, 128, 4096, 2, 132)
    assert kernels.decode_config(256, *shape).splits == 1
    assert kernels.decode_config(1, *shape).splits >= 16
    planner = DecodePlanner.make(
        num_heads=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, max_rows=64, longest=4096,
        device=torch.device("cpu"),
    )  # fmt: skip
    for rows in range(1, 65):
        for config in (planner.config(rows), planner.fused(rows)):
            assert config is None or rows * 8 * config.splits * 2 <= len(planner.scratch.lse)


def test_layouts_of_several_queries_fit_the_scratch() -> None:
    """One tile reads the keys of a row once, up to 128 (query, head) pairs; the parts stay small beside long tables."""
    assert TritonPaged.capabilities.decode_queries == kernels.MAX_QUERIES
    for group, queries in ((1, 16), (2, 5), (8, 16), (20, 7), (64, 16)):
        planner = DecodePlanner.make(
            num_heads=8 * group, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, max_rows=256, longest=131072,
            device=torch.device("cpu"),
        )  # fmt: skip
        for rows in (1, 7, 64, 256):
            config = planner.several(rows, queries)
            programs = rows * config.programs(8, group, queries)
            assert programs <= len(planner.scratch.tickets)
            assert (programs == rows * 8) is (group * queries <= 128)
            assert programs * config.keys.splits * config.block_m * 128 * 4 <= 64 << 20 or config.keys.splits == 1
    assert planner.several(1, 5).keys.splits > 1


def test_few_rows_take_qkv_in_parts_and_many_whole() -> None:
    shape = (8, 128, 4096, 2, 132)
    assert [(rows, config.splits) for rows in (1, 2, 4) if (config := kernels.fused_config(rows, *shape))] == [
        (1, 16), (2, 8), (4, 4)
    ]  # fmt: skip
    assert [rows for rows in (8, 96, 256) if kernels.fused_config(rows, *shape)] == []
    assert all(kernels.fused_config(rows, *shape) for rows in (16, 32, 48, 64))


VARIANTS = [(None, None), (300, None), (None, 20.0), (37, 5.0)]
SIZES = [(head, block) for head in (64, 80, 96, 128, 256) for block in (16, 256)]
SIZES += [(128, 32), (128, 64), (128, 128), (20, 16)]


def test_prefill_layouts_fit_smaller_gpus() -> None:
    assert kernels.prefill_config(2, 256, 2, 232_448).block_m == 128
    for shared_memory in (101_376, 166_912):
        for head_size in (64, 128, 256):
            fit = kernels.prefill_config(2, head_size, 2, shared_memory)
            copies = 2 if fit.stages < 5 else 4  # of a tile of K and of V, as the compiler pipelines them
            assert 2 * head_size * (fit.block_m + 2 * fit.tile * copies) <= shared_memory


@pytest.mark.gpu
@pytest.mark.parametrize(("head_size", "block_size"), SIZES)
def test_many_shapes(dtype: torch.dtype, device: torch.device, head_size: int, block_size: int) -> None:
    at = SIZES.index((head_size, block_size)) + list(TOLERANCE).index(dtype)
    for window, soft_cap in (VARIANTS[at % 4], VARIANTS[(at + 1) % 4]):
        many_rows(Shape(16, 8, head_size, block_size, window, soft_cap), dtype, device)


def many_rows(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    rng = random.Random(0)
    rows = [(1, 1), (1, 4000), *((1, rng.randint(1, 1500)) for _ in range(14))]
    decode = Batch(shape, rows, dtype, device)
    agree(decode.decode(), decode.want())
    rows = [(1, 700), (130, 130), (17, 900), (513, 1100), (2, 2), (64, 64)]
    prefill = Batch(shape, rows, dtype, device)
    agree(prefill.prefill(), prefill.want())


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (9, 3), (32, 4), (20, 1), (64, 1)])
@pytest.mark.parametrize("rows", [1, 3, 40, 300])
def test_head_groups_and_batch_sizes(device: torch.device, heads: int, kv_heads: int, rows: int) -> None:
    dtype = torch.bfloat16
    rng = random.Random(rows)
    shape = Shape(heads, kv_heads, 128, 16)
    decode = Batch(shape, [(1, rng.randint(1, 900)) for _ in range(rows)], dtype, device)
    agree(decode.decode(), decode.want())
    prefill = Batch(
        shape, [(q, q + rng.randint(0, 50)) for q in (rng.randint(1, 90) for _ in range(rows))], dtype, device
    )
    agree(prefill.prefill(), prefill.want())


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (9, 3), (32, 4), (64, 1)])
@pytest.mark.parametrize("queries", [2, 5, 16])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_several_queries_of_any_group(device: torch.device, heads: int, kv_heads: int, queries: int, rows: int) -> None:
    rng = random.Random(rows)
    shape = Shape(heads, kv_heads, 128, 16, *VARIANTS[(queries + rows) % 4])
    counts = [(n, n + rng.randint(0, 900)) for n in (rng.randint(0, queries) for _ in range(rows))]
    batch = Batch(
        shape, [(queries, 700), *((n, length if n else 0) for n, length in counts[1:])], torch.bfloat16, device
    )
    agree(batch.several(queries, extra=rows * queries - len(batch.q)), batch.want())


@pytest.mark.parametrize("max_rows", [100, 256])
def test_steps_of_any_number_of_rows_need_no_kernel_but_those_of_the_graphs(
    max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each set of constants is compiled by itself, and mixed steps that run eagerly have any number of decode rows."""
    module = importlib.import_module("nanoengine.kernels.paged_attention_decode_triton")
    seen, least = set[tuple[tuple[str, object], ...]](), set[int]()

    class Seen:
        def __getitem__(self, grid: tuple[int, ...]) -> Seen:
            return self

        def __call__(self, *given: object, **constants: object) -> None:
            seen.add(tuple(constants.items()))
            least.add(int(given[14]))  # type: ignore[call-overload]

    monkeypatch.setattr(module, "_decode", Seen())
    monkeypatch.setattr("nanoengine.kernels.paged_attention_plan._INTERPRETED_MULTIPROCESSORS", 132)
    planner = DecodePlanner.make(
        num_heads=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, max_rows=max_rows, longest=4096,
        device=torch.device("cpu"),
    )  # fmt: skip

    def run(rows: int) -> None:
        q, tables = torch.zeros(rows, 16, 128), torch.zeros(rows, 1, dtype=torch.int32)
        caches = torch.zeros(2, 1, 8, 16, 128)
        for config in (planner.config(rows), planner.fused(rows)):
            if config is not None:
                module.attend_decode(
                    q, *caches, q, tables, tables[:, 0], scale=1.0, window=None, soft_cap=None, config=config,
                    scratch=planner.scratch,
                )  # fmt: skip
                assert rows * 8 * config.splits * 2 <= len(planner.scratch.lse)

    for size in decode_sizes(max_rows):
        run(size.decode_rows)
    captured = set(seen)
    for rows in range(1, max_rows + 1):
        run(rows)
    assert seen == captured
    assert len(least) > 5


@pytest.mark.parametrize("copied", [False, True])
def test_decode_that_reads_a_copy_of_q_waits_for_it(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the launch in front runs what reads nothing of it."""
    seen = list[bool]()

    class Launches:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, BESIDE, **__: seen.append(BESIDE)  # noqa: N803

    monkeypatch.setattr(paged_attention_decode_triton, "_decode", Launches())
    cache, numbers = torch.zeros(2, 2, 16, 32), torch.ones(3, 1, dtype=torch.int32)
    q = torch.zeros(3, 4, 40)[:, :, :32] if copied else torch.zeros(3, 4, 32)
    config, scratch = DecodeConfig(16, 1, 1, 4, 2), DecodeScratch.make(6, 6, 2, 32, q.device)
    around = {"scale": 1.0, "window": None, "soft_cap": None, "config": config, "scratch": scratch}
    out = torch.zeros(3, 4, 32)
    kernels.attend_decode(q, cache, cache, out, numbers, numbers[:, 0], beside=True, **around)
    assert seen == [not copied]
