"""Times of the Triton kernels compared with torch, on one CUDA device.

    python benchmarks/kernels.py [--out DIR] [--tune MODEL]

Each figure is the median over replays of a CUDA graph of many calls, divided by their number. Calls rotate over copies
of what they read that together are several times the L2 cache, so every byte comes from memory. "share" is the bytes a
call must move (each input and output once) over its time, as part of the device's measured read bandwidth. --tune tries
tile sizes for the few-row products and prints the best of each shape: what the tiles in `matvec_triton` come from.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from nanoengine.kernels import activation, rms_norm, rope
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_and_mul
from nanoengine.kernels.matvec_held_triton import HeldTile, held
from nanoengine.kernels.matvec_large_triton import LargeTile, large, large_tile
from nanoengine.kernels.matvec_skinny_triton import SkinnyTile, skinny
from nanoengine.kernels.matvec_triton import GemvTile, Tile, gemv, matvec, norm_matvec
from nanoengine.kernels.rms_norm_triton import add_rms_norm
from nanoengine.kernels.rope_triton import qk_norm_rope_store
from nanoengine.kernels.split_k_triton import tickets_on
from nanoengine.lab.bench.report import environment
from nanoengine.lab.bench.timing import calls_over, copies, eager_us, read_bandwidth, time_us

DTYPE = torch.bfloat16
EPS = 1e-6
CUDA = torch.device("cuda")
# (name, N, K, gated): Qwen3-0.6B, Qwen3-8B, Llama-3.2-1B
SHAPES = [
    ("0.6B qkv", 4096, 1024, False), ("0.6B o", 1024, 2048, False), ("0.6B gate_up", 6144, 1024, False),
    ("0.6B gate_up gated", 6144, 1024, True), ("0.6B down", 1024, 3072, False), ("0.6B lm_head", 151936, 1024, False),
    ("8B qkv", 6144, 4096, False), ("8B o", 4096, 4096, False), ("8B gate_up gated", 24576, 4096, True),
    ("8B n28672", 28672, 4096, False), ("8B down", 4096, 12288, False), ("8B lm_head", 151936, 4096, False),
    ("1B qkv", 3072, 2048, False), ("1B o", 2048, 2048, False), ("1B gate_up gated", 16384, 2048, True),
    ("1B down", 2048, 8192, False), ("1B lm_head", 128256, 2048, False),
]  # fmt: skip


def us_of(calls: list[Callable[[], Any]], replays: int = 15) -> float:
    """Median microseconds of a call."""
    return time_us(calls, CUDA, replays)[0]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def row(name: str, what: str, us: float, nbytes: int, base: str, base_us: float, peak: float) -> dict[str, Any]:
    gbps = nbytes / us / 1e3
    return {"case": name, "kernel": what, "us": us, "gbps": gbps, "share": gbps / peak, base: base_us, "base": base}


ROWS = (1, 2, 4, 8, 16, 32, 64)
GATES: tuple[Activation | None, ...] = (None, "silu")  # by `gated`


def compile_products(shape: tuple[str, int, int, bool]) -> None:
    """Runs in a child process: fills Triton's cache with the kernels of `bench_products`."""
    _, n, k, gated = shape
    w = torch.empty(n, k, device="cuda", dtype=DTYPE)
    for rows in ROWS:
        matvec(rand(rows, k), w, gate=GATES[gated])
        matvec(rand(rows, k), w, gate=GATES[gated], add=rand(rows, n // 2 if gated else n))
        norm_matvec(rand(rows, k), None, rand(k), EPS, w, gate=GATES[gated])


def in_children(function: Callable[[Any], None], parts: list[Any]) -> None:
    processes = min(len(parts), max(1, multiprocessing.cpu_count() - 2))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(function, parts, chunksize=1)


def bench_products(peak: float) -> Iterator[dict[str, Any]]:
    """Compares plain and fused products with cuBLAS, and with cuBLAS together with the kernels before or after it."""
    in_children(compile_products, SHAPES)
    for name, n, k, gated in SHAPES:
        weights = [rand(n, k) / 32 for _ in range(copies(n * k * DTYPE.itemsize, CUDA))]
        for rows in ROWS:
            x, norm_weight, add = rand(rows, k), rand(k), rand(rows, n)
            nbytes = weights[0].nbytes + x.nbytes + rows * n * DTYPE.itemsize
            base = us_of(calls_over(weights, lambda w, x=x: F.linear(x, w)))
            if gated:
                us = us_of(
                    calls_over(weights, lambda w, x=x, nw=norm_weight: norm_matvec(x, None, nw, EPS, w, gate="silu"))
                )
                full = us_of(calls_over(weights, lambda w, x=x, nw=norm_weight: act_and_mul(F.linear(
                    add_rms_norm(x, None, nw, EPS)[0], w))))  # fmt: skip
                yield row(f"{name} x{rows}", "norm_matvec gated", us, nbytes, "cuBLAS + our norm, gate", full, peak)
                continue
            us = us_of(calls_over(weights, lambda w, x=x: matvec(x, w)))
            yield row(f"{name} x{rows}", "matvec", us, nbytes, "cuBLAS", base, peak)
            if name == "0.6B qkv":
                us = us_of(calls_over(weights, lambda w, x=x, nw=norm_weight: norm_matvec(x, None, nw, EPS, w)))
                full = us_of(calls_over(weights, lambda w, x=x, nw=norm_weight: F.linear(
                    add_rms_norm(x, None, nw, EPS)[0], w)))  # fmt: skip
                yield row(f"{name} x{rows}", "norm_matvec", us, nbytes, "cuBLAS + our norm", full, peak)
            if name in ("0.6B o", "0.6B down"):
                us = us_of(calls_over(weights, lambda w, x=x, a=add: matvec(x, w, add=a)))
                full = us_of(calls_over(weights, lambda w, x=x, a=add: F.linear(x, w).add_(a)))
                yield row(f"{name} x{rows}", "matvec + add", us, nbytes, "cuBLAS + add", full, peak)
        del weights


def bench_small(peak: float) -> Iterator[dict[str, Any]]:
    """Measures kernels without a weight matrix, from one token to a large prefill."""
    for tokens in (1, 8, 64, 256, 16384):
        few = min(64, copies(tokens * 1024 * 4, CUDA))
        for hidden in (1024, 4096):
            sets = [(rand(tokens, hidden), rand(tokens, hidden)) for _ in range(few)]
            w = rand(hidden)
            us = us_of(calls_over(sets, lambda s, w=w: add_rms_norm(*s, w, EPS)))
            base = us_of(calls_over(sets, lambda s, w=w: rms_norm.add_rms_norm(*s, w, EPS)))
            yield row(f"h{hidden} x{tokens}", "add_rms_norm", us, 4 * sets[0][0].nbytes, "torch", base, peak)
        sets = [rand(tokens, 2 * 3072) for _ in range(few)]
        us = us_of(calls_over(sets, act_and_mul))
        base = us_of(calls_over(sets, activation.act_and_mul))
        yield row(f"i3072 x{tokens}", "act_and_mul", us, sets[0].nbytes * 3 // 2, "torch", base, peak)
        sets = [rand(tokens, 32 * 128) for _ in range(few)]
        cache = torch.zeros(2, 2048, 16, 8, 128, device="cuda", dtype=DTYPE)
        positions, slots = torch.arange(tokens, device="cuda"), torch.randperm(2048 * 16, device="cuda")[:tokens]
        inv_freq, w = torch.rand(64, device="cuda"), rand(128)

        def store(
            kernel: Any, qkv: Tensor, common: Any = (positions, inv_freq, *cache, slots), w: Tensor = w
        ) -> Tensor:
            return kernel(qkv, *common, q_weight=w, k_weight=w, eps=EPS)

        us = us_of(calls_over(sets, lambda s, store=store: store(qk_norm_rope_store, s)))
        base = torch_rope_us(sets, store)
        yield row(f"16/8 x d128 x{tokens}", "qk_norm_rope_store", us, 2 * sets[0].nbytes, "torch", base, peak)


def torch_rope_us(sets: list[Tensor], store: Callable[[Any, Tensor], Tensor]) -> float:
    """The reference cannot be captured (it selects slots by a mask), so its launches are measured one by one."""
    few = sets[:8]
    return eager_us(lambda: [store(rope.qk_norm_rope_store, s) for s in few], repeats=3, calls=1) / len(few)


@dataclass(frozen=True, slots=True)
class Trial:
    """One tile size for one product, as a layer calls it: after a norm (qkv, gate_up), before a sum (o, down)."""

    shape: tuple[str, int, int, bool]
    rows: int
    tile: Tile

    def run(self, x: Tensor, w: Tensor, norm_weight: Tensor, add: Tensor, tickets: Tensor) -> Tensor:
        name, _, _, gated = self.shape
        normed = "qkv" in name or gated
        around: dict[str, Any] = {
            "gate": GATES[gated],
            "norm_weight": norm_weight if normed else None,
            "eps": EPS,
            "add": None if normed or "lm_head" in name else add,
        }
        if isinstance(self.tile, GemvTile):
            return gemv(x, w, None, tile=self.tile, **around)[0]
        if isinstance(self.tile, HeldTile):
            return held(x, w, tile=self.tile, **around)
        if isinstance(self.tile, LargeTile):
            x = add_rms_norm(x, None, norm_weight, EPS)[0] if normed else x
            return large(x, w, tile=self.tile, gate=around["gate"], add=around["add"])
        return skinny(x, w, tile=self.tile, tickets=tickets, **around)


def inputs(trial: Trial) -> tuple[Tensor, ...]:
    """The arguments of `Trial.run` after the weight, and x."""
    _, n, k, gated = trial.shape
    return rand(k), rand(trial.rows, n // 2 if gated else n), tickets_on(CUDA)


def trials(model: str) -> Iterator[Trial]:
    for shape in SHAPES:
        name, n, k, gated = shape
        if name.startswith(model):
            for rows in (1, 2, 8, 16, 32, 64):
                yield from (Trial(shape, rows, tile) for tile in tiles(rows, n // (1 + gated), k, 1 + gated))


def tiles(rows: int, outputs: int, k: int, width: int) -> Iterator[Tile]:
    """The tiles whose weights, tokens and programs fit on a GPU."""
    for block_n, warps in product((1, 2, 4, 8), (2, 4, 8)):
        held_bytes = triton.next_power_of_2(k) * width * block_n * 2 // (32 * warps)  # a thread
        if rows <= 2 and 64 <= held_bytes <= 256:
            yield GemvTile(block_n, warps)
    for block_n, warps, block_t in product((8, 16, 32, 64), (4, 8), (8, 16, 32)):
        programs = outputs // block_n * -(-rows // block_t)
        fits = (block_n * width + block_t) * k * 2 <= 220_000 and max(block_n * width, block_t) <= 16 * warps
        if fits and block_n * width >= 16 and min(32, max(8, rows)) // 2 <= block_t <= max(8, rows) and programs >= 32:
            yield HeldTile(block_n, warps, block_t)
    for (block_n, warps), (block_k, stages), splits, block_t in product(
        ((32, 4), (64, 4), (64, 8), (128, 8)), ((128, 3), (128, 5), (128, 7), (64, 8), (256, 3)), (1, 2, 4, 8),
        (8, 16, 32, 64),
    ):  # fmt: skip
        programs = outputs * width // block_n * splits * -(-rows // block_t)
        shared = (block_n + block_t) * block_k * 2 * stages
        useful = 60 <= programs <= 600 if outputs <= 8192 else block_n >= 64 and splits == 1
        if rows > 2 and useful and shared <= 220_000 and k // splits >= 2 * block_k and rows // 2 <= block_t <= rows:
            yield SkinnyTile(block_n // width, block_k, block_t, warps, stages, splits)
    if rows > 2:  # the others must be faster than this
        yield large_tile(rows, outputs, k, gated=width == 2, itemsize=DTYPE.itemsize)


def compile_all(part: list[Trial]) -> None:
    """Runs in a child process: fills Triton's cache."""
    for trial in part:
        _, n, k, _ = trial.shape
        try:
            trial.run(rand(trial.rows, k), torch.empty(n, k, device="cuda", dtype=DTYPE), *inputs(trial))
        except triton.runtime.errors.OutOfResources:
            continue


def tune(model: str) -> Iterator[dict[str, Any]]:
    todo = list(trials(model))
    print(f"{len(todo)} trials", flush=True)
    in_children(compile_all, [todo[i::14] for i in range(14)])
    weights: list[Tensor] = []
    for trial in todo:
        _, n, k, _ = trial.shape
        if not weights or weights[0].shape != (n, k):
            weights.clear()
            weights = [rand(n, k) / 32 for _ in range(copies(n * k * DTYPE.itemsize, CUDA))]
        x, more = rand(trial.rows, k), inputs(trial)
        try:
            calls = calls_over(weights, lambda w, t=trial, x=x, more=more: t.run(x, w, *more), at_least=12)
            us = us_of(calls, replays=5)
        except triton.runtime.errors.OutOfResources:
            continue
        yield {
            "shape": trial.shape[0],
            "rows": trial.rows,
            "kind": type(trial.tile).__name__,
            "us": us,
            "tile": asdict(trial.tile),
        }


def print_best(results: list[dict[str, Any]], keep: int = 3) -> None:
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["shape"], r["rows"], r["kind"]), []).append(r)
    for (shape, rows, kind), group in groups.items():
        group.sort(key=lambda r: r["us"])
        best = "; ".join(f"{r['us']:.2f} {tuple(r['tile'].values())}" for r in group[:keep])
        print(f"{shape:20s} x{rows:<3d} {kind:17s} {best}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for the figures as JSON")
    parser.add_argument(
        "--tune", metavar="MODEL", help="instead, try tile sizes of the few-row products of 0.6B, 8B or 1B"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    header = environment()
    print(header["gpu"], "torch", header["torch"], "triton", header["triton"], flush=True)
    results: list[dict[str, Any]] = []
    if args.tune:
        results += tune(args.tune)
        print_best(results)
    else:
        peak = read_bandwidth() / 1e9
        print(f"read bandwidth {peak:.0f} GB/s", flush=True)
        header["read_gbps"] = peak
        for r in (r for bench in (bench_small, bench_products) for r in bench(peak)):
            results.append(r)
            print(
                f"{r['case']:24s} {r['kernel']:20s} {r['us']:8.2f} us {r['gbps']:6.0f} GB/s {r['share']:5.0%}"
                f"   {r['base']}: {r[r['base']]:.2f} us",
                flush=True,
            )
    if args.out:
        name = f"kernels_tune_{args.tune}.json" if args.tune else "kernels.json"
        (args.out / name).write_text(json.dumps({**header, "results": results}, indent=1))


if __name__ == "__main__":
    main()
