"""Batches for measuring paged attention alone. Blocks of a row are at random places in the pool. Needs Triton."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor

from nanoengine.kernels import paged_attention
from nanoengine.kernels.paged_attention_triton import (
    DecodeConfig,
    DecodePlanner,
    DecodeScratch,
    PrefillConfig,
    SeveralConfig,
    attend_decode,
    attend_prefill,
    attend_several,
)

MAX_MODEL_LEN = 4096


@dataclass(frozen=True, slots=True)
class Heads:
    """Numbers of query heads and KV heads, and the head size."""

    query: int
    kv: int
    size: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """A named batch: new tokens and all tokens of each row. A decode batch has one new token per row; with `drafts` it
    has several."""

    name: str
    query: tuple[int, ...]
    seq: tuple[int, ...]
    drafts: bool = False

    @property
    def prefill(self) -> bool:
        return max(self.query) > 1 and not self.drafts

    def scaled(self, factor: float) -> Lengths:
        """A smaller batch: this share of the rows and of their tokens."""
        if factor == 1:
            return self
        count = max(1, round(len(self.seq) * factor))
        query = tuple(n if n == 1 or self.drafts else max(2, round(n * factor)) for n in self.query[:count])
        seq = tuple(max(q, round(n * factor)) for q, n in zip(query, self.seq[:count], strict=True))
        return replace(self, name=f"{self.name}*{factor:g}", query=query, seq=seq)


def batches() -> Iterator[Lengths]:
    """Decode batches (rows x context), longest rows first as in an engine, and some of rows with drafts; then prefill
    batches (rows x prompt)."""
    rng = Random(0)

    def decode(name: str, lens: list[int]) -> Lengths:
        return Lengths(f"decode {name}", (1,) * len(lens), tuple(sorted(lens, reverse=True)))

    def prefill(name: str, lens: list[int], before: int = 0) -> Lengths:
        return Lengths(f"prefill {name}", tuple(lens), tuple(n + before for n in lens))

    for rows, length in [(256, 1024), (32, 1024), (1, 8192), (1, 512), (8, 512), (64, 512), (256, 384)]:
        yield decode(f"{rows} x {length}", [length] * rows)
    for rows in (256, 32):
        yield decode(f"{rows} x 100..2048", [rng.randint(100, 2048) for _ in range(rows)])
    for rows, queries in itertools.product((1, 8, 64), (5, 16)):
        yield Lengths(f"drafts {rows} x 1024, {queries} each", (queries,) * rows, (1024,) * rows, drafts=True)
    for rows, length in [(8, 2048), (16, 1024), (1, 8192)]:
        yield prefill(f"{rows} x {length}", [length] * rows)
    yield prefill("8 x 512 after 4096", [512] * 8, 4096)
    yield prefill("4 x 100..512", [rng.randint(100, 512) for _ in range(4)])


@dataclass
class Batch:
    """A batch's tensors on a device."""

    lengths: Lengths
    block_size: int
    heads: Heads
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        seq_lens, query_lens = self.lengths.seq, self.lengths.query
        counts = [-(-n // self.block_size) for n in seq_lens]
        ids = torch.randperm(sum(counts)).to(self.device, torch.int32) + 1
        columns = max(max(counts), MAX_MODEL_LEN // self.block_size)
        self.tables = torch.zeros(len(counts), columns, dtype=torch.int32, device=self.device)
        for row, part in enumerate(torch.split(ids, counts)):
            self.tables[row, : len(part)] = part
        shape = (sum(counts) + 1, self.heads.kv, self.block_size, self.heads.size)
        self.k_cache, self.v_cache = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
        self.lens = torch.tensor(seq_lens, dtype=torch.int32, device=self.device)
        starts = list(itertools.accumulate(query_lens, initial=0))
        self.starts = torch.tensor(starts, dtype=torch.int32, device=self.device)
        self.q = torch.randn(starts[-1], self.heads.query, self.heads.size, device=self.device, dtype=self.dtype)
        self.out = torch.full_like(self.q, float("nan"))

    @property
    def kv_bytes(self) -> int:
        return sum(self.lengths.seq) * self.heads.kv * self.heads.size * 2 * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """FLOPs of the two products, for the keys that the causal mask allows."""
        seen = sum(q * n - q * (q - 1) // 2 for q, n in zip(self.lengths.query, self.lengths.seq, strict=True))
        return 4 * seen * self.heads.query * self.heads.size

    @cached_property
    def reference(self) -> Tensor:
        return paged_attention.attend_prefill(
            self.q, self.k_cache, self.v_cache, self.tables, self.lens, self.starts, scale=self.heads.size**-0.5
        )

    def error(self, call: Callable[[], Any]) -> float:
        """The largest absolute difference from the reference, of the result that `call` writes to `out`."""
        self.out.fill_(float("nan"))
        call()
        return float((self.out.float() - self.reference.float()).abs().nan_to_num(nan=float("inf")).max())

    def ours(self, config: DecodeConfig | PrefillConfig | SeveralConfig | None = None) -> Callable[[], None]:
        """A call of our kernels, with the engine's configuration or with `config`."""
        if self.lengths.drafts:
            assert config is None or isinstance(config, SeveralConfig)
            return self._ours_of_several(config)
        if self.lengths.prefill:
            assert config is None or isinstance(config, PrefillConfig)
            return lambda: attend_prefill(
                self.q, self.k_cache, self.v_cache, self.out, self.tables, self.lens, self.starts, config=config,
                scale=self.heads.size**-0.5, window=None, soft_cap=None,
            )  # fmt: skip
        assert config is None or isinstance(config, DecodeConfig)
        layout, scratch = self._decode_layout(config)
        return lambda: attend_decode(
            self.q, self.k_cache, self.v_cache, self.out, self.tables, self.lens, config=layout, scratch=scratch,
            scale=self.heads.size**-0.5, window=None, soft_cap=None,
        )  # fmt: skip

    def _ours_of_several(self, config: SeveralConfig | None) -> Callable[[], None]:
        rows, queries, group = len(self.lens), max(self.lengths.query), self.heads.query // self.heads.kv
        layout = config or self._planner().several(rows, queries)
        programs = rows * layout.programs(self.heads.kv, group, queries)
        tickets = torch.zeros(programs, dtype=torch.int32, device=self.device)
        return lambda: attend_several(
            self.q, self.k_cache, self.v_cache, self.out, self.tables, self.lens, self.starts, queries=queries,
            config=layout, tickets=tickets, scale=self.heads.size**-0.5, window=None, soft_cap=None,
        )  # fmt: skip

    def _decode_layout(self, config: DecodeConfig | None) -> tuple[DecodeConfig, DecodeScratch]:
        heads, rows = self.heads, len(self.lens)
        if config is not None:
            pairs = rows * heads.kv
            group = heads.query // heads.kv
            return config, DecodeScratch.make(pairs * config.splits, pairs, group, heads.size, self.device)
        planner = self._planner()
        return planner.config(rows), planner.scratch

    def _planner(self) -> DecodePlanner:
        heads = self.heads
        return DecodePlanner.make(
            num_heads=heads.query, num_kv_heads=heads.kv, head_size=heads.size, dtype=self.dtype,
            max_rows=len(self.lens), longest=max(MAX_MODEL_LEN, *self.lengths.seq), device=self.device,
        )  # fmt: skip

    def flash_attn(self, package: Any) -> Callable[[], Tensor]:
        """A call of the flash-attn package, whose cache is token-major."""
        k_cache, v_cache = (cache.transpose(1, 2).contiguous() for cache in (self.k_cache, self.v_cache))
        if self.lengths.prefill:
            ends = torch.nn.functional.pad(self.lens.cumsum(0, dtype=torch.int32), (1, 0))
            longest = (max(self.lengths.query), max(self.lengths.seq))
            return lambda: package.flash_attn_varlen_func(
                self.q, k_cache, v_cache, self.starts, ends, *longest, causal=True, block_table=self.tables
            )
        q = self.q.view(len(self.lens), -1, self.heads.query, self.heads.size)  # of drafts all rows have as many
        return lambda: package.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=self.lens, block_table=self.tables, causal=True
        )
