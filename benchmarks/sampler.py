"""Sampling over a large vocabulary: the Triton kernels beside plain torch, in microseconds a call.

    python benchmarks/sampler.py                            # a table; some minutes
    python benchmarks/sampler.py --rows 1 256 --dtypes bfloat16 --json sampler.json

Every call runs from a CUDA graph, as in the engine; several logits buffers take turns, so that small batches are read
from memory and not from the cache. "GB/s" is one read of the logits over the time of the call. Logits are normal with a
standard deviation of 2: flatter than a trained model's, so truncation without top-k keeps much of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from nanoengine.kernels import philox, sampling, step_inputs_triton
from nanoengine.kernels.sampling_triton import Tail, Tuning, sample, tuning_for
from nanoengine.kernels.step_inputs import SlotState, StepInputBuffers

CACHE_BYTES = 128 << 20
CASES: dict[str, tuple[Tail, int, float, float]] = {  # tail, top-k, top-p, min-p
    "greedy": (Tail.GREEDY, 0, 1.0, 0.0),
    "temperature": (Tail.TEMPERATURE, 0, 1.0, 0.0),
    "top_k=50": (Tail.TRUNCATION, 50, 1.0, 0.0),
    "top_p=0.95": (Tail.TRUNCATION, 0, 0.95, 0.0),
    "top_k=50 top_p=0.95": (Tail.TRUNCATION, 50, 0.95, 0.0),
    "min_p=0.05": (Tail.TRUNCATION, 0, 1.0, 0.05),
    "top_k=1000 top_p=0.95": (Tail.TRUNCATION, 1000, 0.95, 0.0),
}


@dataclass(frozen=True, slots=True)
class Columns:
    """Per-row parameters of a draw."""

    greedy: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    sample_index: Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """Microseconds are medians. torch_us is None where the reference was not timed."""

    case: str
    dtype: str
    rows: int
    vocab: int
    us: float
    best_us: float
    gbytes_per_s: float
    torch_us: float | None
    tuning: dict[str, int]


def columns(rows: int, tail: Tail, top_k: int, top_p: float, min_p: float) -> Columns:
    ramp = torch.arange(rows, dtype=torch.int64, device="cuda")
    return Columns(
        greedy=torch.full_like(ramp, tail is Tail.GREEDY, dtype=torch.bool),
        temperature=torch.full_like(ramp, 0.6, dtype=torch.float32),
        top_k=torch.full_like(ramp, top_k, dtype=torch.int32),
        top_p=torch.full_like(ramp, top_p, dtype=torch.float32),
        min_p=torch.full_like(ramp, min_p, dtype=torch.float32),
        seeds=ramp * 7919,
        positions=ramp + 100,
        sample_index=torch.zeros_like(ramp),
    )


def reference(logits: Tensor, tail: Tail, c: Columns) -> Tensor:
    """What the engine does without these kernels."""
    x = logits.float()
    if tail is Tail.GREEDY:
        return x.argmax(-1)
    keys = philox.draw_keys(c.seeds, c.positions, c.sample_index)
    x = x.clone() if x is logits else x
    sampling.scale_by_temperature_(x, c.temperature)
    if tail is Tail.TRUNCATION:
        return sampling.draw_truncated(x, keys, c.top_k, c.top_p, c.min_p)[0]
    return sampling.draw(x, keys)[0]


def time_us(call: Callable[[Tensor], None], buffers: Sequence[Tensor], repeats: int) -> tuple[float, float]:
    """(median, best) microseconds of a call: a graph of one call a buffer, replayed."""
    for buffer in buffers[:2]:
        call(buffer)
    torch.cuda.synchronize()
    calls = list(buffers) * max(1, 16 // len(buffers))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for buffer in calls:
            call(buffer)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times), min(times)


def measure(
    case: str, rows: int, vocab: int, dtype: torch.dtype, *, repeats: int, with_torch: bool, tuning: Tuning | None
) -> Result:
    tail, *values = CASES[case]
    c = columns(rows, tail, *values)
    size = rows * vocab * dtype.itemsize
    count = max(2, -(-CACHE_BYTES // size)) if size < CACHE_BYTES else 2
    generator = torch.Generator("cuda").manual_seed(rows)
    buffers = [torch.randn(rows, vocab, device="cuda", generator=generator).mul_(2).to(dtype) for _ in range(count)]
    tokens = torch.empty(rows, dtype=torch.int64, device="cuda")
    failed = torch.empty(rows, dtype=torch.int32, device="cuda")
    named = {name: getattr(c, name) for name in Columns.__slots__}

    def call(logits: Tensor) -> None:
        sample(logits, tail, tokens, failed, tuning=tuning, **named)

    median, best = time_us(call, buffers, repeats)
    call(buffers[0])
    if not torch.equal(tokens, expected := reference(buffers[0], tail, c)) or failed.any():
        wrong = int((tokens != expected).sum())
        raise SystemExit(f"{case}, {rows} rows, {dtype}: {wrong} tokens differ from the reference")
    torch_us = None
    if with_torch:
        torch_us = _time_eager(lambda: reference(buffers[0], tail, c))
    used = tuning or tuning_for(rows)
    name = str(dtype).removeprefix("torch.")
    return Result(case, name, rows, vocab, median, best, size / median / 1e3, torch_us, asdict(used))


def _time_eager(call: Callable[[], Tensor], repeats: int = 7) -> float:
    """Median microseconds between events around eager calls, launches hidden behind the device where it is busy."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / 3)
    return statistics.median(times)


def time_step_inputs(rows: int, max_model_len: int = 4096, block_size: int = 16) -> dict[str, float]:
    """Median microseconds of gathering a decode step's inputs, and of recording its tokens."""
    slots, blocks = rows + 1, max_model_len // block_size

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    state = SlotState(
        token_ids=zeros(slots, max_model_len + 1, dtype=torch.int32),
        num_tokens=zeros(slots, dtype=torch.int64),
        num_computed=torch.full((slots,), max_model_len // 8, device="cuda"),
        block_tables=zeros(1, slots, blocks, dtype=torch.int32),
    )
    out = StepInputBuffers(
        input_ids=zeros(rows, dtype=torch.int32),
        positions=zeros(rows, dtype=torch.int64),
        seq_lens=zeros(rows, dtype=torch.int32),
        slot_mapping=zeros(1, rows, dtype=torch.int64),
        block_tables=zeros(1, rows, blocks, dtype=torch.int32),
    )
    ids, start = torch.randperm(rows, device="cuda"), torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    tokens = ids.clone()
    calls: dict[str, Callable[[Tensor], None]] = {
        "gather": lambda _: step_inputs_triton.gather(state, ids, start, out, block_size=block_size, max_query_len=1),
        "record": lambda _: step_inputs_triton.record(state, ids, start, tokens),
    }
    return {name: time_us(call, [ids], 20)[0] for name, call in calls.items()}


def table(results: Sequence[Result]) -> str:
    lines = [f"{'case':<24}{'dtype':<10}{'rows':>5}{'us':>9}{'best':>9}{'GB/s':>8}{'torch us':>11}{'x':>7}"]
    for r in results:
        torch_us, times = ("", "") if r.torch_us is None else (f"{r.torch_us:.0f}", f"{r.torch_us / r.us:.1f}")
        lines.append(
            f"{r.case:<24}{r.dtype:<10}{r.rows:>5}{r.us:>9.1f}{r.best_us:>9.1f}{r.gbytes_per_s:>8.0f}"
            f"{torch_us:>11}{times:>7}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-torch", action="store_true", help="leave the reference's times out")
    parser.add_argument("--tile-groups", type=int, help="override the tuning")
    parser.add_argument("--tiles", type=int, help="override the tuning")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for dtype in args.dtypes:
        for rows in args.rows:
            tuning = None
            if args.tile_groups or args.tiles:
                base = tuning_for(rows)
                tuning = replace(base, tile_groups=args.tile_groups or base.tile_groups, tiles=args.tiles or base.tiles)
            for case in args.cases:
                results.append(
                    measure(
                        case, rows, args.vocab, getattr(torch, dtype),
                        repeats=args.repeats, with_torch=not args.no_torch, tuning=tuning,
                    )
                )  # fmt: skip
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(machine))
    print(table(results))
    inputs = {rows: time_step_inputs(rows) for rows in args.rows}
    for rows, times in inputs.items():
        print(f"step inputs, {rows} decode rows: " + ", ".join(f"{name} {us:.1f} us" for name, us in times.items()))
    if args.json:
        found = {"machine": machine, "results": [asdict(r) for r in results], "step_inputs_us": inputs}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
