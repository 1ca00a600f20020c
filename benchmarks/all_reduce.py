"""Microseconds of one sum over the ranks inside a CUDA graph: ours, NCCL's, and those of torch's symmetric memory.

    python benchmarks/all_reduce.py --ranks 2                    # rows x 4096, bfloat16
    python benchmarks/all_reduce.py --ranks 4 --rows 1 64 --json figures.json

Each candidate is captured 64 times in one graph; the graph is replayed, and the fastest of five series counts. "ours"
adds the residual stream too, "ours, copied" brings the partial sum into the shared buffer first. GB/s: bytes of the
partial sum over that time. Ranks agree on every result, bit for bit, or it fails.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanoengine.distributed.group import DistributedGroup, join_store, make_store
from nanoengine.distributed.symmetric import SymmetricMemory

CALLS, REPLAYS, SERIES = 64, 20, 5


def microseconds(run: Callable[[], object]) -> float:
    """Microseconds of one `run`, in a graph of `CALLS` of them."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            run()
    best = float("inf")
    for _ in range(SERIES + 1):  # the first warms up
        dist.barrier()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(stop) * 1e3 / (REPLAYS * CALLS))
    return best


def candidates(memory: SymmetricMemory | None, x: Tensor, residual: Tensor) -> dict[str, Callable[[], object]]:
    import torch.distributed._symmetric_memory as symmetric

    assert dist.group.WORLD is not None
    name = dist.group.WORLD.group_name
    own = symmetric.empty(x.shape, dtype=x.dtype, device=x.device)
    symmetric.rendezvous(own, name)
    own.copy_(x)
    out: dict[str, Callable[[], object]] = {
        "nccl": lambda: dist.all_reduce(x),
        "torch one shot": lambda: torch.ops.symm_mem.one_shot_all_reduce(own, "sum", name),
        "torch two shot": lambda: torch.ops.symm_mem.two_shot_all_reduce_(own, "sum", name),
    }
    if memory is not None and memory.partial(*x.shape, x.dtype) is not None:

        def ours() -> object:
            partial = memory.partial(*x.shape, x.dtype)
            assert partial is not None
            return memory.all_reduce_add(partial, residual)

        out |= {"ours": ours, "ours, copied": lambda: memory.all_reduce_add(x, residual)}
    return out


def check(memory: SymmetricMemory | None, group: DistributedGroup, rows: int, hidden: int) -> None:
    """Checks many sums of changing values: each must agree with NCCL's in float32, and be equal on all ranks."""
    generator = torch.Generator("cuda").manual_seed(group.rank)
    for _ in range(50):
        x = torch.randn(rows, hidden, device="cuda", generator=generator).bfloat16()
        residual = torch.ones_like(x)
        total = x.float()
        dist.all_reduce(total)
        if memory is None or (out := memory.all_reduce_add(x, residual)) is None:
            return
        error = (out.float() - (total + 1)).norm() / total.norm()
        assert error < 0.01, error
        others = [torch.empty_like(out) for _ in range(group.size)]
        dist.all_gather(others, out)
        assert all(torch.equal(out, other) for other in others), "ranks disagree"


def rank(number: int, args: argparse.Namespace, ports: Queue[int], results: Queue[Any]) -> None:
    torch.cuda.set_device(number)
    if number == 0:
        store = make_store(args.ranks)
        for _ in range(args.ranks - 1):
            ports.put(store.port)
    else:
        store = join_store(ports.get(), args.ranks)
    group = DistributedGroup(number, args.ranks, torch.device("cuda", number), store, shared_rows=512)
    memory = group._symmetric
    rows_of: list[dict[str, Any]] = []
    for rows in args.rows:
        check(memory, group, rows, args.hidden)
        x, residual = (torch.zeros(rows, args.hidden, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        for name, run in candidates(memory, x, residual).items():
            micros = microseconds(run)
            gigabytes = x.numel() * 2 / micros / 1e3
            rows_of.append({"rows": rows, "by": name, "us": round(micros, 2), "GB/s": round(gigabytes, 1)})
        if memory is not None and rows <= 512:
            keys = torch.arange(rows, device="cuda") + number
            assert torch.equal(memory.highest(keys), torch.arange(rows, device="cuda") + args.ranks - 1)
            exchanged = microseconds(lambda keys=keys: memory.highest(keys))  # type: ignore[misc]
            rows_of.append({"rows": rows, "by": "highest key", "us": round(exchanged, 2), "GB/s": None})
    if number == 0:
        results.put(rows_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256, 512, 1024, 4096])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if torch.cuda.device_count() < args.ranks:
        raise SystemExit(f"{args.ranks} ranks need as many GPUs; there are {torch.cuda.device_count()}")
    context = get_context("spawn")
    ports, results = context.Queue(), context.Queue()
    processes = [context.Process(target=rank, args=(r, args, ports, results)) for r in range(args.ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed")
    rows = results.get()
    for row in rows:
        print(f"{row['rows']:>5} rows  {row['by']:<16} {row['us']:>8} us  {row['GB/s'] or '-':>8} GB/s")
    if args.json is not None:
        args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
