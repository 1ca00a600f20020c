"""Times of the experts' kernels on one CUDA device, from one token to a large prefill.

    python benchmarks/experts.py [--model qwen3-30b-a3b] [--rows 1 8 64] [--out DIR] [--tune]

Each figure is the median over replays of a CUDA graph of many calls, divided by their number; the tokens of a call go
to experts of their own. "limit" is the longer of two times: to read the experts that are hit, the tokens and what
becomes of them once, and to do their FLOPs; "share" is the limit over the time. What a layer adds to the experts is
listed apart: the router behind its norm, and the choice. --tune tries tile sizes and prints the best of each number of
rows: what the tiles in `experts_few_triton` and `experts_grouped_triton` are to come from.

On a machine without a GPU, --check runs everything once in small sizes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

if "--check" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from torch import Tensor

from nanoengine.kernels import experts as plain
from nanoengine.kernels.experts_few_triton import FewTile, down_tile, few, gate_up_tile
from nanoengine.kernels.experts_grouped_triton import GroupedTile, GroupedTiles, grouped, grouped_tiles
from nanoengine.kernels.ops import Routing, TritonOps
from nanoengine.lab.bench.report import environment
from nanoengine.lab.bench.roofline import Limits
from nanoengine.lab.bench.timing import calls_over, measured_limits, time_us

CHECKED = "--check" in sys.argv
DEVICE = torch.device("cpu" if CHECKED else "cuda")
DTYPE = torch.float32 if CHECKED else torch.bfloat16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048, 8192)
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Sizes:
    """Experts of one layer on one rank."""

    experts: int
    top_k: int
    hidden: int
    inner: int

    def bytes_and_flops(self, ids: Tensor, itemsize: int) -> tuple[int, int]:
        """What a call must move and compute at the least."""
        hit = len(ids.unique())
        weights, tokens = 3 * hit * self.hidden * self.inner, 2 * len(ids) * self.hidden
        return (weights + tokens) * itemsize, 2 * ids.numel() * 3 * self.hidden * self.inner


MODELS = {
    "qwen3-30b-a3b": Sizes(128, 8, 2048, 768),
    "qwen3-30b-a3b-2-ranks": Sizes(128, 8, 2048, 384),
    "mixtral-8x7b": Sizes(8, 2, 4096, 14336),
    "gpt-oss-20b": Sizes(32, 4, 2880, 2880),
    "deepseek-v2-lite": Sizes(64, 6, 2048, 1408),
    "check": Sizes(4, 2, 32, 32),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Weights of one layer, and the tokens of several calls: x [rows, hidden], ids and weights [rows, top k]."""

    sizes: Sizes
    gate_up: Tensor
    down: Tensor
    calls: tuple[tuple[Tensor, Tensor, Tensor], ...]

    def us(self, call: Callable[[Tensor, Tensor, Tensor], Any], replays: int = 15) -> float:
        """Median microseconds of call(x, ids, weights)."""
        return time_us(calls_over(self.calls, lambda one: call(*one), at_least=2 if CHECKED else 12), DEVICE, replays)[
            0
        ]

    def limit_us(self, limits: Limits) -> float:
        found = [self.sizes.bytes_and_flops(ids, DTYPE.itemsize) for _, ids, _ in self.calls]
        return sum(max(b / limits.bandwidth, f / limits.flops) for b, f in found) / len(found) * 1e6


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def weights_of(sizes: Sizes) -> tuple[Tensor, Tensor]:
    gate_up, down = rand(sizes.experts, 2 * sizes.inner, sizes.hidden), rand(sizes.experts, sizes.hidden, sizes.inner)
    return gate_up.div_(sizes.hidden**0.5), down.div_(sizes.inner**0.5)


def case(sizes: Sizes, rows: int, weights: tuple[Tensor, Tensor]) -> Case:
    """Experts at random, each as likely as the others."""
    calls = 2 if CHECKED else 6
    logits = torch.rand(calls, rows, sizes.experts, device=DEVICE)
    ids = logits.topk(sizes.top_k).indices.to(torch.int32)
    shares = torch.rand(calls, rows, sizes.top_k, device=DEVICE)
    made = tuple((rand(rows, sizes.hidden), ids[i].contiguous(), shares[i].contiguous()) for i in range(calls))
    return Case(sizes, *weights, made)


def ours(
    run: Any, one: Case, x: Tensor, ids: Tensor, weights: Tensor, tiles: Any = None, out: Tensor | None = None
) -> Tensor:
    """One of both routes, whatever the number of rows."""
    return run(
        x, ids, weights, one.gate_up, one.down, activation="silu", gate_up_bias=None, down_bias=None, first=0, add=x,
        out=torch.empty_like(x) if out is None else out, tiles=tiles,
    )  # fmt: skip


def measure(sizes: Sizes, rows: int, weights: tuple[Tensor, Tensor], limits: Limits) -> Iterator[dict[str, Any]]:
    """What a layer runs, the other route, torch's grouped products, and what is beside the experts."""
    one, ops = case(sizes, rows, weights), TritonOps()
    limit = one.limit_us(limits)
    moved, flops = sizes.bytes_and_flops(one.calls[0][1], DTYPE.itemsize)
    routes: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
        "experts": lambda x, ids, w: ops.experts(x, ids, w, one.gate_up, one.down, add=x),
        "grouped": partial(ours, grouped, one),
        "torch grouped_mm": lambda x, ids, w: grouped_mm(one, x, ids, w),
    }
    if rows <= 16:
        routes["few"] = partial(ours, few, one)
    for name, call in routes.items():
        us = one.us(call)
        yield {"rows": rows, "kernel": name, "us": us, "limit": limit, "bytes": moved, "flops": flops}
    router, norm = rand(sizes.experts, sizes.hidden), rand(sizes.hidden)
    routing = Routing(top_k=sizes.top_k, renormalise=True)
    logits = torch.randn(rows, sizes.experts, device=DEVICE)
    for name, call in {
        "norm, router": lambda x, *_: ops.norm_router(x, None, norm, EPS, router),
        "route": lambda *_: ops.route(logits, routing),
    }.items():
        yield {"rows": rows, "kernel": name, "us": one.us(call)}


def grouped_mm(one: Case, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """By torch, with what it takes around its products."""
    parts = plain._grouped(x, ids.long(), one.gate_up, one.down, "silu", None, None)
    return (parts.float() * weights.unsqueeze(-1)).sum(1).add_(x.float()).to(x.dtype)


def show(row: dict[str, Any]) -> str:
    text = f"x{row['rows']:<5d} {row['kernel']:18s} {row['us']:9.2f} us"
    if "limit" in row:
        speed = f"{row['bytes'] / row['us'] / 1e3:6.0f} GB/s {row['flops'] / row['us'] / 1e6:6.1f} TFLOP/s"
        text += f" {speed}   limit {row['limit']:8.2f} us {row['limit'] / row['us']:5.0%}"
    return text


Tiles = tuple[FewTile, FewTile] | GroupedTiles


@dataclass(frozen=True, slots=True)
class Trial:
    """Tiles of both products of one number of rows. Only one of them is varied at a time."""

    rows: int
    which: str
    tiles: Tiles

    def run(self, one: Case, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return ours(few if isinstance(self.tiles, tuple) else grouped, one, x, ids, weights, self.tiles)


def trials(sizes: Sizes, rows: int) -> Iterator[Trial]:
    base = (gate_up_tile(sizes.hidden, DTYPE.itemsize), down_tile(sizes.inner, sizes.top_k, DTYPE.itemsize))
    if rows <= 8:
        for block_n, warps in product((1, 2, 4, 8), (1, 2, 4, 8)):
            held = 2 * base[0].block_k * block_n * DTYPE.itemsize / (32 * warps)
            if 64 <= held <= 512:
                yield Trial(rows, "few gate_up", (FewTile(block_n, base[0].block_k, warps), base[1]))
        for block_n, block_k, warps in product((1, 2, 4, 8), (256, 512, 1024, 2048), (1, 2, 4, 8)):
            padded = -(-sizes.inner // block_k) * block_k
            held = padded * sizes.top_k * block_n * DTYPE.itemsize / (32 * warps)
            if 64 <= held <= 640 and padded <= 1.4 * sizes.inner:
                yield Trial(rows, "few down", (base[0], FewTile(block_n, block_k, warps)))
    if rows > 2:
        yield from grouped_trials(sizes, rows)


def grouped_trials(sizes: Sizes, rows: int) -> Iterator[Trial]:
    """Tiles of tokens near what an expert has, and of weights that leave room for one to four programs."""
    each = rows * sizes.top_k / sizes.experts
    given = grouped_tiles(rows * sizes.top_k, sizes.experts, DTYPE.itemsize)
    for block_t in (8, 16, 32, 64, 128, 256):
        if not each / 4 <= block_t <= max(16, 4 * each):
            continue
        for width, block_k, warps, stages in product((64, 128, 256), (64, 128), (4, 8), (3, 4, 5, 6)):
            shared = stages * (width + block_t) * block_k * DTYPE.itemsize
            sums = width * block_t * 4 / (32 * warps)  # bytes a thread
            if 40_000 <= shared <= 220_000 and sums <= 512 and width >= 16 * warps:
                tile = GroupedTile(width, block_k, warps, stages)
                yield Trial(rows, "gate_up", replace(given, block_t=block_t, gate_up=tile))
                yield Trial(rows, "down", replace(given, block_t=block_t, down=tile))


def compile_all(job: tuple[Sizes, list[Trial]]) -> None:
    """In a child process: fills Triton's cache."""
    sizes, part = job
    weights = (
        torch.empty(sizes.experts, 2 * sizes.inner, sizes.hidden, device=DEVICE, dtype=DTYPE),
        torch.empty(sizes.experts, sizes.hidden, sizes.inner, device=DEVICE, dtype=DTYPE),
    )
    for trial in part:
        one = case(sizes, trial.rows, weights)
        try:
            trial.run(one, *one.calls[0])
        except triton.runtime.errors.OutOfResources:
            continue


def tune(sizes: Sizes, rows: list[int]) -> Iterator[dict[str, Any]]:
    todo = [trial for count in rows for trial in trials(sizes, count)]
    print(f"{len(todo)} trials", flush=True)
    if not CHECKED:
        count = max(1, min(14, multiprocessing.cpu_count() - 2))
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            pool.map(compile_all, [(sizes, todo[i::count]) for i in range(count)], chunksize=1)
    weights = weights_of(sizes)
    made: dict[int, Case] = {}
    for trial in todo:
        one = made.setdefault(trial.rows, case(sizes, trial.rows, weights))
        try:
            us = one.us(partial(trial.run, one), replays=5)
        except triton.runtime.errors.OutOfResources:
            continue
        tiles = [asdict(tile) for tile in trial.tiles] if isinstance(trial.tiles, tuple) else asdict(trial.tiles)
        yield {"rows": trial.rows, "which": trial.which, "us": us, "tiles": tiles}


def print_best(results: list[dict[str, Any]], keep: int = 4) -> None:
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["rows"], result["which"]), []).append(result)
    for (rows, which), group in groups.items():
        for result in sorted(group, key=lambda each: each["us"])[:keep]:
            print(f"x{rows:<5d} {which:12s} {result['us']:8.2f} us  {result['tiles']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--rows", type=int, nargs="+", help="tokens of a step; default: from 1 to 8192")
    parser.add_argument("--out", type=Path, help="directory for the figures as JSON")
    parser.add_argument("--tune", action="store_true", help="try tile sizes instead")
    parser.add_argument("--check", action="store_true", help="small sizes, in Triton's interpreter")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes, rows = MODELS["check" if CHECKED else args.model], args.rows or ([1, 3] if CHECKED else list(ROWS))
    header, results = environment(), list[dict[str, Any]]()
    print(header["gpu"], "torch", header["torch"], "triton", header["triton"], sizes, flush=True)
    if args.tune:
        results += tune(sizes, rows)
        print_best(results)
    else:
        limits = Limits(1e10, 1e10, 4) if CHECKED else measured_limits(DTYPE.itemsize)
        print(f"read {limits.bandwidth / 1e9:.0f} GB/s, products {limits.flops / 1e12:.0f} TFLOP/s", flush=True)
        weights = weights_of(sizes)
        for result in (each for count in rows for each in measure(sizes, count, weights, limits)):
            results.append(result)
            print(show(result), flush=True)
    if args.out:
        name = f"experts_{'tune_' if args.tune else ''}{args.model}.json"
        (args.out / name).write_text(json.dumps({**header, "results": results}, indent=1))


if __name__ == "__main__":
    main()
