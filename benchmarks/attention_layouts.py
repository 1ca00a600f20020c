"""Tries layouts of the attention kernels one by one; the fixed ones were chosen in this way. Needs a CUDA GPU.

    python benchmarks/attention_layouts.py [--only 'decode 256'] [--block-size 16] [--shape qwen3-0.6b] [--json FILE]

`nanoengine bench attention` measures the kernels as the engine launches them, and compares them with flash-attn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from nanoengine.kernels.paged_attention_triton import DecodeConfig, PrefillConfig, SeveralConfig
from nanoengine.lab.bench.paged_batches import Batch, Heads, batches
from nanoengine.lab.bench.report import environment
from nanoengine.lab.bench.shapes import SHAPES

SHOWN = 5


def decode_layouts(batch: Batch) -> Iterator[DecodeConfig]:
    rows, longest = len(batch.lens), max(batch.lengths.seq)
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


def several_layouts(batch: Batch) -> Iterator[SeveralConfig]:
    group, queries = batch.heads.query // batch.heads.kv, max(batch.lengths.query)
    pairs = max(16, triton.next_power_of_2(group * queries))
    for block_m, keys in itertools.product({min(pairs, most) for most in (64, 128)}, decode_layouts(batch)):
        if block_m >= group:
            yield SeveralConfig(block_m, keys)


def layouts_of(batch: Batch) -> Iterator[Any]:
    if batch.lengths.drafts:
        return several_layouts(batch)
    return prefill_layouts() if batch.lengths.prefill else decode_layouts(batch)


def sweep(batch: Batch) -> Iterator[dict[str, Any]]:
    """Microseconds and error of each layout that fits; None: the layout of the engine."""
    for config in (None, *layouts_of(batch)):
        try:
            call = batch.ours(config)
            us = 1e3 * triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")
        except (triton.runtime.errors.OutOfResources, RuntimeError) as failed:
            print(f"{batch.lengths.name}: {config}: {str(failed)[:100]}", file=sys.stderr)
            continue
        yield {"batch": batch.lengths.name, "us": us, "config": config and str(config), "error": batch.error(call)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="batches whose name contains this")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape, device = SHAPES[options.shape], torch.device("cuda")
    heads = Heads(shape.heads, shape.kv_heads, shape.head_size)
    results: list[dict[str, Any]] = []
    for lengths in batches():
        if options.only not in lengths.name:
            continue
        found = list(sweep(Batch(lengths, options.block_size, heads, torch.bfloat16, device)))
        results += found
        own = [row for row in found if row["config"] is None]
        for row in own + sorted(found, key=lambda row: row["us"])[:SHOWN]:
            layout = row["config"] or "as the engine does"
            print(f"{row['batch']:30} {row['us']:9.1f} us  error {row['error']:.1e}  {layout}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
