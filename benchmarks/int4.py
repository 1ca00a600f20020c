"""Times of the products with weights of four bits on one CUDA device, next to bfloat16.

    python benchmarks/int4.py [--rows 1 8 64] [--symmetric] [--out DIR] [--tune]

The shapes are those of a layer of Qwen3-8B, as the layers call the kernels: the gate with the product of gate and up,
the residual stream with those that write to it. Each figure is the median over replays of a CUDA graph of many calls,
divided by their number; calls rotate over copies of the weights. "limit" is the longer of two times: to read the weight
and the tokens once, and to do the FLOPs. --tune tries tiles of `int4_triton` and prints the best of each shape and
number of rows: what its `tile_for` is to come from.

On a machine without a GPU, --check runs everything once in small sizes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

if "--check" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from torch import Tensor

from nanoengine.kernels import int4_triton
from nanoengine.kernels.int4 import Int4Weight, dequantise, fits_tiles, in_tiles
from nanoengine.kernels.int4_launch import int4_linear
from nanoengine.kernels.int4_triton import Int4Tile
from nanoengine.kernels.ops import TritonOps
from nanoengine.kernels.split_k_triton import tickets_on
from nanoengine.lab.bench.report import environment
from nanoengine.lab.bench.roofline import Limits
from nanoengine.lab.bench.timing import calls_over, copies, measured_limits, time_us

CHECKED = "--check" in sys.argv
DEVICE = torch.device("cpu" if CHECKED else "cuda")
DTYPE = torch.float32 if CHECKED else torch.bfloat16
GROUP = 32 if CHECKED else 128
ROWS = (1, 3) if CHECKED else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Shape:
    """A product: out lines of the weight, in. gated: half of them gate the others. added: the residual stream is."""

    name: str
    n: int
    k: int
    gated: bool = False
    added: bool = False

    @property
    def outputs(self) -> int:
        return self.n // 2 if self.gated else self.n


SHAPES = (
    (Shape("qkv", 32, 64), Shape("gate_up", 32, 64, gated=True))
    if CHECKED
    else (
        Shape("qkv", 6144, 4096), Shape("o", 4096, 4096, added=True),
        Shape("gate_up", 24576, 4096, gated=True), Shape("down", 4096, 12288, added=True),
    )
)  # fmt: skip


class Case:
    """Tokens of one shape, and several weights, so that none comes from the cache."""

    def __init__(self, shape: Shape, rows: int, *, zeros: bool, few: bool = False) -> None:
        self.shape = shape
        self.x, self.add = rand(rows, shape.k), rand(rows, shape.outputs) if shape.added else None
        self.tickets = tickets_on(DEVICE)
        count = 1 if few else copies(shape.n * shape.k // 2, DEVICE)
        self.plain = random_weight(shape, zeros=zeros)
        self.weights = [kept(random_weight(shape, zeros=zeros)) for _ in range(count)]

    def ours(self, weight: Int4Weight, tile: Int4Tile | None = None) -> Tensor:
        gate = "silu" if self.shape.gated else None
        around: Any = {"gate": gate, "add": self.add, "tickets": self.tickets}
        if tile:
            return int4_triton.int4_linear(self.x, weight, tile=tile, **around)
        return int4_linear(self.x, weight, **around)

    def us(self, tile: Int4Tile | None = None, replays: int = 15) -> float:
        return time_us(calls_over(self.weights, lambda each: self.ours(each, tile)), DEVICE, replays)[0]

    def plain_us(self) -> float:
        """The product in the model's dtype, as a layer calls it."""
        ops, n, k = TritonOps(), self.shape.n, self.shape.k
        dense = [rand(n, k) for _ in range(copies(n * k * DTYPE.itemsize, DEVICE))]

        def call(weight: Tensor) -> Any:
            if self.add is not None:
                return ops.linear_add(self.x, weight, None, self.add)
            y = ops.linear(self.x, weight)
            return ops.act_and_mul(y) if self.shape.gated else y

        return time_us(calls_over(dense, call), DEVICE)[0]

    def limit_us(self, limits: Limits) -> float:
        moved = self.weights[0].nbytes + self.x.nbytes + len(self.x) * self.shape.outputs * DTYPE.itemsize
        flops = 2 * len(self.x) * self.shape.n * self.shape.k
        return max(moved / limits.bandwidth, flops / limits.flops) * 1e6

    def off(self) -> float:
        """Relative error of our product, of a few lines."""
        weight = self.plain.rows(slice(0, min(256, self.shape.n)))
        want = self.x.float() @ dequantise(weight).t()
        got = int4_linear(self.x, kept(weight), tickets=self.tickets)
        return float((got.float() - want).norm() / want.norm())


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def random_weight(shape: Shape, *, zeros: bool) -> Int4Weight:
    def bytes_(*size: int, below: int) -> Tensor:
        return torch.randint(0, below, size, device=DEVICE, dtype=torch.uint8)

    groups = shape.k // GROUP
    scales = 0.01 * torch.rand(shape.n, groups, device=DEVICE).half()
    zero = bytes_(shape.n, groups, below=16) if zeros else None
    return Int4Weight(bytes_(shape.n, shape.k // 2, below=256), scales, zero, GROUP)


def kept(weight: Int4Weight) -> Int4Weight:
    """As layers keep it."""
    return in_tiles(weight) if fits_tiles(weight) else weight


def tiles(shape: Shape, rows: int) -> Iterator[Int4Tile]:
    """Those whose sums fit a program's registers, and whose copies fit shared memory."""
    most = max(8, triton.next_power_of_2(rows))
    sizes = [each for each in (8, 16, 32, 64, 128, 256) if each == most or (most > 32 and most // 4 < each < most)]
    for block_t, lines, warps, stages, splits in product(sizes, (32, 64, 128), (4, 8), (2, 3, 4, 6), (1, 2, 4, 8)):
        programs = triton.cdiv(shape.n, lines) * splits * triton.cdiv(rows, block_t)
        held, shared = 2 * lines * block_t * 4 / (32 * warps), stages * (lines * 64 + block_t * 256)
        if lines >= 8 * warps and held <= 600 and shared <= 220_000 and 100 <= programs <= 2000:
            yield Int4Tile(lines // 2 if shape.gated else lines, block_t, warps, stages, splits)


def compile_all(jobs: list[tuple[Shape, int, bool, Int4Tile]]) -> None:
    """In a child process: fills Triton's cache."""
    for shape, rows, zeros, tile in jobs:
        case = Case(shape, rows, zeros=zeros, few=True)
        try:
            case.ours(case.weights[0], tile)
        except triton.runtime.errors.OutOfResources:
            continue


def tune(rows: list[int], *, zeros: bool) -> Iterator[dict[str, Any]]:
    todo = [(shape, each, zeros, tile) for each in rows for shape in SHAPES for tile in tiles(shape, each)]
    print(f"{len(todo)} trials", flush=True)
    if not CHECKED:
        count = max(1, min(14, multiprocessing.cpu_count() - 2))
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            pool.map(compile_all, [todo[i::count] for i in range(count)], chunksize=1)
    for each in rows:
        for shape in SHAPES:
            case, found = Case(shape, each, zeros=zeros), list[dict[str, Any]]()
            for tile in tiles(shape, each):
                try:
                    us = case.us(tile, replays=5)
                except triton.runtime.errors.OutOfResources:
                    continue
                found.append({"rows": each, "shape": shape.name, "us": us, "tile": asdict(tile)})
            yield from found
            for best in sorted(found, key=lambda one: one["us"])[:4]:
                print(f"x{each:<5d} {shape.name:8s} {best['us']:8.2f} us  {best['tile']}", flush=True)


def measure(rows: list[int], limits: Limits, *, zeros: bool) -> Iterator[dict[str, Any]]:
    for each in rows:
        for shape in SHAPES:
            case = Case(shape, each, zeros=zeros)
            us, plain, limit = case.us(), case.plain_us(), case.limit_us(limits)
            yield {"rows": each, "shape": shape.name, "us": us, "plain": plain, "limit": limit, "off": case.off()}
            print(
                f"x{each:<5d} {shape.name:8s} {us:8.2f} us  plain {plain:8.2f} ({plain / us:4.2f}x)  "
                f"limit {limit:7.2f} {limit / us:4.0%}  off {case.off():.1e}", flush=True,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", help="tokens of a step; default: from 1 to 2048")
    parser.add_argument("--symmetric", action="store_true", help="weights without zeros")
    parser.add_argument("--out", type=Path, help="directory for the figures as JSON")
    parser.add_argument("--tune", action="store_true", help="try tiles instead")
    parser.add_argument("--check", action="store_true", help="small sizes, in Triton's interpreter")
    args = parser.parse_args()
    torch.manual_seed(0)
    header, rows = environment(), args.rows or list(ROWS)
    print(header["gpu"], "torch", header["torch"], "triton", header["triton"], flush=True)
    if args.tune:
        kernel_rows = [each for each in rows if each <= int4_triton.MAX_ROWS]
        results = list(tune(kernel_rows, zeros=not args.symmetric))
    else:
        limits = Limits(1e10, 1e10, 4) if CHECKED else measured_limits(DTYPE.itemsize)
        print(f"read {limits.bandwidth / 1e9:.0f} GB/s, products {limits.flops / 1e12:.0f} TFLOP/s", flush=True)
        results = list(measure(rows, limits, zeros=not args.symmetric))
    if args.out:
        name = "int4_tune.json" if args.tune else "int4.json"
        (args.out / name).write_text(json.dumps({**header, "results": results}, indent=1))


if __name__ == "__main__":
    main()
