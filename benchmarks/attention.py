"""Paged attention kernels by themselves: microseconds, GB/s of KV read (decode), TFLOP/s (prefill), L2 flushed.

    python benchmarks/attention.py [--out FILE.json] [--sweep] [--quick] [--heads 16 8 128]

By default 16 query heads, 8 KV heads, head size 128, bf16, at KV block sizes 16 and 256; flash-attn beside it where it
is installed. `--sweep` times other layouts of the launches too, which is how the fixed ones were chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from nanoengine.kernels import paged_attention
from nanoengine.kernels.paged_attention_triton import (
    DecodeConfig,
    DecodePlanner,
    DecodeScratch,
    PrefillConfig,
    attend_decode,
    attend_prefill,
    store_kv,
)

DTYPE = torch.bfloat16
MAX_MODEL_LEN = 4096
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    size: int


@dataclass
class Batch:
    """`query_lens` and `seq_lens` of rows whose caches lie at random in a pool of blocks."""

    name: str
    query_lens: list[int]
    seq_lens: list[int]
    block_size: int
    heads: Heads

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        counts = [-(-n // self.block_size) for n in self.seq_lens]
        ids = torch.randperm(sum(counts), device=CUDA).to(torch.int32) + 1
        columns = max(max(counts), MAX_MODEL_LEN // self.block_size)
        self.tables = torch.zeros(len(counts), columns, dtype=torch.int32, device=CUDA)
        for row, part in enumerate(ids.split(counts)):
            self.tables[row, : len(part)] = part
        shape = (sum(counts) + 1, self.heads.kv, self.block_size, self.heads.size)
        self.k_cache, self.v_cache = (torch.randn(shape, device=CUDA, dtype=DTYPE) for _ in range(2))
        self.lens = torch.tensor(self.seq_lens, dtype=torch.int32, device=CUDA)
        starts = list(itertools.accumulate(self.query_lens, initial=0))
        self.starts = torch.tensor(starts, dtype=torch.int32, device=CUDA)
        self.q = torch.randn(starts[-1], self.heads.query, self.heads.size, device=CUDA, dtype=DTYPE)
        self.out = torch.full_like(self.q, float("nan"))

    @property
    def kv_bytes(self) -> int:
        return sum(self.seq_lens) * self.heads.kv * self.heads.size * 2 * DTYPE.itemsize

    @property
    def flops(self) -> int:
        """Of the two products over the keys that the causal mask leaves."""
        seen = sum(q * n - q * (q - 1) // 2 for q, n in zip(self.query_lens, self.seq_lens, strict=True))
        return 4 * seen * self.heads.query * self.heads.size

    def token_major(self) -> tuple[Tensor, Tensor]:
        return self.k_cache.transpose(1, 2).contiguous(), self.v_cache.transpose(1, 2).contiguous()

    @cached_property
    def reference(self) -> Tensor:
        return paged_attention.attend_prefill(
            self.q, self.k_cache, self.v_cache, self.tables, self.lens, self.starts, scale=self.heads.size**-0.5
        )


def batches(block_size: int, heads: Heads) -> Iterator[Batch]:
    rng = random.Random(0)

    def decode(name: str, seq_lens: list[int], block_size: int) -> Batch:
        return Batch(name, [1] * len(seq_lens), seq_lens, block_size, heads)

    def prefill(name: str, rows: list[tuple[int, int]], block_size: int) -> Batch:
        return Batch(name, [q for q, _ in rows], [n for _, n in rows], block_size, heads)

    for rows, length in [(256, 1024), (32, 1024), (1, 8192), (1, 512), (8, 512), (64, 512), (256, 384)]:
        yield decode(f"decode {rows} x {length}", [length] * rows, block_size)
    yield decode("decode 256 x 100..2048", [rng.randint(100, 2048) for _ in range(256)], block_size)
    yield decode("decode 32 x 100..2048", [rng.randint(100, 2048) for _ in range(32)], block_size)
    for rows, length in [(8, 2048), (16, 1024), (1, 8192)]:
        yield prefill(f"prefill {rows} x {length}", [(length, length)] * rows, block_size)
    yield prefill("prefill 8 x 512 behind 4096", [(512, 4608)] * 8, block_size)
    yield prefill("prefill 4 x 100..512", [(n, n) for n in (rng.randint(100, 512) for _ in range(4))], block_size)


def ours(batch: Batch, config: DecodeConfig | PrefillConfig | None = None) -> Callable[[], None]:
    shared: dict[str, Any] = {"scale": batch.heads.size**-0.5, "window": None, "soft_cap": None}
    lens, tables = batch.lens, batch.tables
    if max(batch.query_lens) > 1:
        assert not isinstance(config, DecodeConfig)
        return lambda: attend_prefill(
            batch.q, batch.k_cache, batch.v_cache, batch.out, tables, lens, batch.starts, config=config, **shared
        )
    heads = batch.heads
    planner = DecodePlanner.make(
        num_heads=heads.query, num_kv_heads=heads.kv, head_size=heads.size, dtype=DTYPE, max_rows=len(lens),
        longest=max(MAX_MODEL_LEN, *batch.seq_lens), device=CUDA,
    )  # fmt: skip
    chosen, scratch = planner.config(len(lens)), planner.scratch
    if isinstance(config, DecodeConfig):
        pairs = len(lens) * heads.kv
        chosen, scratch = (
            config,
            DecodeScratch.make(pairs * config.splits, pairs, heads.query // heads.kv, heads.size, CUDA),
        )
    return lambda: attend_decode(
        batch.q, batch.k_cache, batch.v_cache, batch.out, tables, lens, config=chosen, scratch=scratch, **shared
    )


def flash_attn(batch: Batch) -> Callable[[], Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
    except ImportError as error:
        print(f"no flash-attn: {error}", file=sys.stderr)
        return None
    k_cache, v_cache = batch.token_major()
    if max(batch.query_lens) > 1:
        ends = torch.nn.functional.pad(batch.lens.cumsum(0, dtype=torch.int32), (1, 0))
        longest = (max(batch.query_lens), max(batch.seq_lens))
        return lambda: flash_attn_varlen_func(
            batch.q, k_cache, v_cache, batch.starts, ends, *longest, causal=True, block_table=batch.tables
        )
    q = batch.q.unsqueeze(1)
    return lambda: flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=batch.lens, block_table=batch.tables, causal=True
    )


def microseconds(call: Callable[[], Any], quick: bool) -> float:
    warm, repeat = (10, 40) if quick else (25, 150)
    return 1000 * float(triton.testing.do_bench(call, warmup=warm, rep=repeat, return_mode="median"))


def runs(call: Callable[[], Any]) -> bool:
    """Whether flash-attn does this; a build of it may lack a head size."""
    try:
        call()
    except RuntimeError as error:
        print(f"flash-attn: {error}", file=sys.stderr)
        return False
    return True


def figures(batch: Batch, us: float, kind: str, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"batch": batch.name, "block_size": batch.block_size, "kernel": kind, "us": round(us, 2)}
    if max(batch.query_lens) > 1:
        row["tflops"] = round(batch.flops / us / 1e6, 1)
    else:
        row["gb_s"] = round(batch.kv_bytes / us / 1e3)
    return row | more


def error(batch: Batch, call: Callable[[], Any]) -> float:
    """Largest absolute difference from the float32 reference."""
    batch.out.fill_(float("nan"))
    call()
    return float((batch.out.float() - batch.reference.float()).abs().nan_to_num(nan=float("inf")).max())


def decode_layouts(batch: Batch) -> Iterator[DecodeConfig]:
    rows, longest = len(batch.seq_lens), max(batch.seq_lens)
    splits = [
        s for s in (1, 2, 3, 4, 8, 16, 32, 64) if rows * s <= 1024 and s * 64 <= max(longest, 64) and rows * s >= 8
    ]
    for (tile, stages, warps), count in itertools.product(
        [(64, 3, 4), (64, 5, 4), (32, 5, 4), (128, 3, 4), (128, 3, 8), (128, 5, 4), (256, 3, 8), (32, 3, 4)], splits
    ):
        yield DecodeConfig(tile=tile, splits=count, min_tiles=1, warps=warps, stages=stages)


def prefill_layouts() -> Iterator[PrefillConfig]:
    for block_m, tile, warps, stages in [
        (128, 64, 8, 3), (128, 64, 8, 5), (128, 64, 8, 8), (128, 128, 8, 3), (128, 128, 8, 2), (128, 32, 8, 5),
        (64, 64, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3), (64, 32, 4, 5), (128, 64, 4, 3), (64, 32, 4, 2),
    ]:  # fmt: skip
        yield PrefillConfig(block_m=block_m, tile=tile, warps=warps, stages=stages)


def sweep(batch: Batch) -> Iterator[dict[str, Any]]:
    layouts = prefill_layouts() if max(batch.query_lens) > 1 else decode_layouts(batch)
    for config in layouts:
        try:
            call = ours(batch, config)
            us = microseconds(call, quick=True)
        except (triton.runtime.errors.OutOfResources, RuntimeError) as failed:
            print(f"{batch.name}: {config}: {str(failed)[:100]}", file=sys.stderr)
            continue
        yield figures(batch, us, "triton sweep", config=str(config), error=error(batch, call))


def storing(block_size: int, tokens: int, heads: Heads) -> dict[str, Any]:
    batch = Batch(f"store {tokens}", [1], [tokens], block_size, heads)
    k, v = (torch.randn(tokens, heads.kv, heads.size, device=CUDA, dtype=DTYPE) for _ in range(2))
    slots = torch.randperm(tokens, device=CUDA)
    us = microseconds(lambda: store_kv(k, v, batch.k_cache, batch.v_cache, slots), quick=True)
    moved = 4 * k.nbytes
    return {
        "batch": batch.name, "block_size": block_size, "kernel": "triton", "us": round(us, 2),
        "gb_s": round(moved / us / 1e3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--only", default="", help="batches whose name holds this")
    parser.add_argument("--heads", type=int, nargs=3, default=[16, 8, 128], metavar=("QUERY", "KV", "SIZE"))
    options = parser.parse_args()
    heads = Heads(*options.heads)
    results: list[dict[str, Any]] = []

    def say(row: dict[str, Any]) -> None:
        results.append(row)
        rate = f"{row['gb_s']:>7} GB/s   " if "gb_s" in row else f"{row['tflops']:>7} TFLOP/s"
        beside = f"{row['of_flash_attn']:.0%} of flash-attn" if "of_flash_attn" in row else ""
        wrong = f"error {row['error']:.1e}" if "error" in row else ""
        what = f"{row['batch']:30} bs {row['block_size']:<4} {row['kernel']:12}"
        print(f"{what} {row['us']:9.1f} us {rate} {beside} {wrong} {row.get('config', '')}", flush=True)

    flash: dict[str, float] = {}
    for size in sorted(options.block_sizes, reverse=True):  # flash-attn has its figures at 256
        for batch in batches(size, heads):
            if options.only not in batch.name:
                continue
            theirs = flash_attn(batch) if size % 256 == 0 else None
            if theirs is not None and runs(theirs):
                flash[batch.name] = microseconds(theirs, options.quick)
                say(figures(batch, flash[batch.name], "flash-attn"))
            call = ours(batch)
            us = microseconds(call, options.quick)
            more: dict[str, Any] = {"error": error(batch, call)}
            if batch.name in flash:
                more["of_flash_attn"] = round(flash[batch.name] / us, 3)
            say(figures(batch, us, "triton", **more))
            if options.sweep and size == min(options.block_sizes):
                best = sorted(sweep(batch), key=lambda row: row["us"])
                results.extend(best)
                for row in best[:5]:
                    say(row)
        for tokens in (1, 256, 16384):
            say(storing(size, tokens, heads))
    if options.out:
        header: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        header |= {"heads": options.heads, "dtype": str(DTYPE)}
        options.out.write_text(json.dumps(header | {"results": results}, indent=1))


if __name__ == "__main__":
    main()
