"""Measures single calls: on a GPU in a graph of many calls, so that launches cost nothing; on a CPU by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from nanoengine.lab.bench.roofline import Limits

Call = Callable[[], Any]


def best_device(asked: str = "auto") -> torch.device:
    """A GPU if there is one, except if the engine option (`asked`) is a CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and asked != "cpu" else "cpu")


def time_us(calls: Sequence[Call], device: torch.device, replays: int = 15) -> tuple[float, float]:
    """(median, best) microseconds per call, for `calls` in order. On a GPU it must be possible to capture them."""
    once = _captured(calls) if device.type == "cuda" else _in_turn(calls)
    times = [once() / len(calls) for _ in range(replays)]
    return statistics.median(times), min(times)


def _captured(calls: Sequence[Call]) -> Callable[[], float]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles kernels that are compiled on first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]
    graph.replay()

    def once() -> float:
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        assert len(kept) == len(calls)  # the outputs are in the memory of the graph
        return float(start.elapsed_time(end)) * 1e3

    return once


def _in_turn(calls: Sequence[Call]) -> Callable[[], float]:
    calls[0]()

    def once() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6

    return once


def eager_us(call: Call, repeats: int = 7, calls: int = 3) -> float:
    """Median microseconds of a call that cannot be captured, measured between events.

    Launches cost nothing as long as the GPU is busy.
    """
    times = []
    for _ in range(repeats):
        start, end = _event(), _event()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / calls)
    return statistics.median(times)


def copies(nbytes: int, device: torch.device) -> int:
    """The number of sets of `nbytes` to use in turn, so that none is read from the cache: over three times its size."""
    if device.type != "cuda":
        return 2
    return max(2, 3 * int(torch.cuda.get_device_properties(device).L2_cache_size) // nbytes + 1)


def calls_over(sets: Sequence[Any], call: Callable[[Any], Any], at_least: int = 24) -> list[Call]:
    """Calls of `call` with the sets in turn."""

    def bound(one: Any) -> Call:
        return lambda: call(one)

    return [bound(one) for _ in range(-(-at_least // len(sets))) for one in sets]


def measured_limits(itemsize: int) -> Limits:
    """The limits of the current GPU, bf16: by a sum of 4 GiB and a product of 8192^3. Takes a second."""
    bandwidth, flops = read_bandwidth(), _flops()
    torch.cuda.empty_cache()
    return Limits(bandwidth, flops, itemsize)


def read_bandwidth() -> float:
    """Bytes/s of a sum of 4 GiB on the current GPU."""
    x = torch.ones(1 << 30, device="cuda")
    return x.nbytes / time_us([x.sum] * 4, x.device)[0] * 1e6


def _flops() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / time_us([partial(torch.mm, a, b)] * 8, a.device)[0] * 1e6


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
