"""Times of the products with GGUF blocks on one CUDA device, next to bfloat16.

    python benchmarks/gguf.py [--kinds Q4_K Q6_K] [--rows 1 8 64] [--out DIR] [--tune]

The shapes are those of a layer of Qwen3-8B. Up to 16 rows go as the layers call them: x of qkv, gate and up is what the
product before has prepared, o and down are added to the residual stream and prepare the norm behind it. Each figure is
the median over replays of a CUDA graph of many calls, divided by their number; calls rotate over copies of the weights.
"limit": the time to read the blocks and the tokens once, or to do the FLOPs. --tune tries numbers of warps of
`gguf_fragments_triton`.

On a machine without a GPU, --check runs everything once in small sizes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

if "--check" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from nanoengine.kernels import gguf
from nanoengine.kernels.gguf import BLOCK_TYPES
from nanoengine.kernels.gguf_decode_triton import PLANES
from nanoengine.kernels.gguf_fragments_triton import MAX_ROWS, few
from nanoengine.kernels.matmul import Ahead, Scaled
from nanoengine.kernels.ops import TritonOps
from nanoengine.lab.bench.report import environment
from nanoengine.lab.bench.roofline import Limits
from nanoengine.lab.bench.timing import calls_over, copies, measured_limits, time_us
from nanoengine.plugins.quantizations.gguf_fragments import Fragments

CHECKED = "--check" in sys.argv
DEVICE = torch.device("cpu" if CHECKED else "cuda")
DTYPE = torch.float32 if CHECKED else torch.bfloat16
ROWS = (1, 3) if CHECKED else (1, 2, 8, 32, 64, 128, 256, 512, 2048)
KINDS = ("Q4_0", "Q4_K", "Q6_K", "Q8_0")
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Shape:
    """A product: out, in. gated: half of the outputs gate the others. normed: a norm is in front; else it is added to
    the residual stream, and a norm is behind."""

    name: str
    n: int
    k: int
    gated: bool = False
    normed: bool = False


SHAPES = (
    (Shape("qkv", 32, 256, normed=True), Shape("o", 32, 256), Shape("gate_up", 64, 256, gated=True, normed=True))
    if CHECKED
    else (
        Shape("qkv", 6144, 4096, normed=True), Shape("o", 4096, 4096),
        Shape("gate_up", 24576, 4096, gated=True, normed=True), Shape("down", 4096, 12288),
    )
)  # fmt: skip


class Case:
    """Tokens of one shape, and several weights, so that none comes from the cache."""

    def __init__(self, shape: Shape, rows: int, kind: str) -> None:
        self.shape, self.kind = shape, kind
        self.x, self.residual, self.norm = rand(rows, shape.k), rand(rows, shape.k), rand(shape.k)
        self.scaled = Scaled(self.norm, self.x, torch.ones(128, rows, device=DEVICE))
        self.stream, self.next_norm = rand(rows, shape.n), rand(shape.n)
        size = shape.n * BLOCK_TYPES[kind].row_bytes(shape.k)
        blocks = [random_blocks(shape, kind) for _ in range(copies(size, DEVICE))]
        self.lines = blocks[0][:256].clone()
        self.stores = [Fragments(each, kind, Ahead()) for each in blocks]

    def ours(self, store: Fragments, warps: int | None = None) -> Any:
        if len(self.x) > MAX_ROWS:
            return store.linear(self.x, None)
        kept = store.weight
        if not self.shape.normed:
            return few(self.x, kept, self.kind, add=self.stream, next_norm=self.next_norm, warps=warps)
        return few(self.scaled, kept, self.kind, eps=EPS, gate="silu" if self.shape.gated else None, warps=warps)

    def us(self, warps: int | None = None, replays: int = 15) -> float:
        calls = calls_over(self.stores, lambda each: self.ours(each, warps), 1 if CHECKED else 24)
        return time_us(calls, DEVICE, 1 if CHECKED else replays)[0]

    def plain_us(self) -> float:
        """The product in the model's dtype, as a layer calls it."""
        ops, shape = TritonOps(), self.shape
        dense = [rand(shape.n, shape.k) for _ in range(copies(shape.n * shape.k * DTYPE.itemsize, DEVICE))]

        def call(weight: Tensor) -> Any:
            if not shape.normed:
                return ops.linear(self.x, weight)
            gate = "silu" if shape.gated else None
            return ops.norm_linear(self.x, self.residual, self.norm, EPS, weight, gate=gate)  # type: ignore[arg-type]

        return time_us(calls_over(dense, call), DEVICE)[0]

    def limit_us(self, limits: Limits) -> float:
        moved = self.stores[0].weight.nbytes + self.x.nbytes + len(self.x) * self.shape.n * DTYPE.itemsize
        return max(moved / limits.bandwidth, 2 * len(self.x) * self.shape.n * self.shape.k / limits.flops) * 1e6

    def off(self) -> float:
        """Relative error of our product, of a few lines."""
        want = gguf.gguf_linear(self.x.float(), self.lines, self.kind)
        got = Fragments(self.lines.clone(), self.kind, Ahead()).linear(self.x, None)
        return float((got.float() - want).norm() / want.norm())


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def random_blocks(shape: Shape, kind: str) -> Tensor:
    """Any codes; float16 scales of 0.01."""
    type_ = BLOCK_TYPES[kind]
    size = (shape.n, shape.k // type_.block, type_.size)
    blocks = torch.randint(0, 256, size, device=DEVICE, dtype=torch.uint8)
    start, stop = PLANES[kind][-1]  # the plane of scales
    halves = torch.full((*size[:2], 2 if stop - start > 2 else 1), 0.01, device=DEVICE, dtype=torch.float16)
    blocks[..., start : start + 2 * halves.shape[2]] = halves.view(torch.uint8)
    return blocks.view(shape.n, -1)


def tune(rows: list[int], kinds: list[str]) -> Iterator[dict[str, Any]]:
    for each, shape, kind in product(rows, SHAPES, kinds):
        case, found = Case(shape, each, kind), list[dict[str, Any]]()
        for warps in (None, 1) if CHECKED else (None, 2, 4, 8, 16):
            us = case.us(warps, replays=5)
            found.append({"kind": kind, "rows": each, "shape": shape.name, "us": us, "warps": warps})
        yield from found
        listed = ", ".join(f"{one['warps'] or 'chosen'}: {one['us']:.2f}" for one in found)
        print(f"{kind} x{each:<5d} {shape.name:8s} us by warps: {listed}", flush=True)


def measure(rows: list[int], kinds: list[str], limits: Limits) -> Iterator[dict[str, Any]]:
    for each, shape in product(rows, SHAPES):
        plain = Case(shape, each, kinds[0]).plain_us()
        for kind in kinds:
            case = Case(shape, each, kind)
            us, limit = case.us(), case.limit_us(limits)
            found = {"us": us, "plain": plain, "limit": limit, "off": case.off()}
            yield {"kind": kind, "rows": each, "shape": shape.name, **found}
            print(
                f"{kind} x{each:<5d} {shape.name:8s} {us:8.2f} us  plain {plain:8.2f} ({plain / us:4.2f}x)  "
                f"limit {limit:7.2f} {limit / us:4.0%}  off {found['off']:.1e}", flush=True,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=BLOCK_TYPES, help="types of blocks")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="tokens of a step")
    parser.add_argument("--out", type=Path, help="directory for the figures as JSON")
    parser.add_argument("--tune", action="store_true", help="try numbers of warps instead")
    parser.add_argument("--check", action="store_true", help="small sizes, in Triton's interpreter")
    args = parser.parse_args()
    torch.manual_seed(0)
    header = environment()
    print(header["gpu"], "torch", header["torch"], "triton", header["triton"], flush=True)
    if args.tune:
        results = list(tune([each for each in args.rows if each <= MAX_ROWS], args.kinds))
    else:
        limits = Limits(1e10, 1e10, 4) if CHECKED else measured_limits(DTYPE.itemsize)
        print(f"read {limits.bandwidth / 1e9:.0f} GB/s, products {limits.flops / 1e12:.0f} TFLOP/s", flush=True)
        results = list(measure(args.rows, args.kinds, limits))
    if args.out:
        name = "gguf_tune.json" if args.tune else "gguf.json"
        (args.out / name).write_text(json.dumps({**header, "results": results}, indent=1))


if __name__ == "__main__":
    main()
