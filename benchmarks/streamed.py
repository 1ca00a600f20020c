"""What it costs to report each token as it comes: speed, ITL while no prompt is admitted, and the CPU's time of a step.

    python benchmarks/streamed.py [--batch 64 --batch 256] [--output-len 512] [--passes 2]

`streamed` and `at the end`: output tokens/s, best pass, of the same requests whose tokens are reported one by one, and
all at once; passes in turn. ITL: milliseconds between a request's tokens once all requests have their first one, p50,
p99 and p99.9. A step becomes longer as contexts grow, from 128 tokens to 640, so p99 is also given of each ITL over the
median of the 33 around it. CPU: milliseconds a step without prompts that the engine's thread does not wait for the
device; it hands each token to a client that only keeps it. Median, mean and p99.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from nanoengine import LLM, SamplingParams
from nanoengine.api.deltas import RequestDelta
from nanoengine.core.execution.results import StepHandle
from nanoengine.core.step import StepPlan, StepResult
from nanoengine.lab.bench.latency import Timeline, serve
from nanoengine.lab.bench.session import Setup, one_pass
from nanoengine.lab.bench.shapes import SHAPES
from nanoengine.lab.bench.workloads import Workload, uniform

AROUND = 33


class Waited:
    """The seconds in which an engine waited for its steps."""

    def __init__(self, llm: LLM) -> None:
        self.seconds = 0.0
        executor: Any = llm.engine._executor
        self._launch: Callable[[StepPlan], StepHandle] = executor.launch
        executor.launch = self.launch

    def launch(self, plan: StepPlan) -> StepHandle:
        handle: Any = self._launch(plan)
        handle.wait = partial(self._wait, handle.wait)
        return handle

    def _wait(self, wait: Callable[[], StepResult]) -> StepResult:
        began = time.perf_counter()
        try:
            return wait()
        finally:
            self.seconds += time.perf_counter() - began


def cpu_times(llm: LLM, workload: Workload, waited: Waited) -> NDArray[np.float64]:
    """Milliseconds of each step once all requests have their first token, less the wait for it."""
    llm.reset_prefix_cache()
    engine, news, found = llm.engine, [list[RequestDelta]() for _ in workload.prompts], []
    for i, (prompt, mine) in enumerate(zip(workload.prompts, news, strict=True)):
        params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=workload.output_lens[i])
        engine.add_request(f"streamed-{i}", prompt, params, sink=mine.append)
    while not all(news):
        engine.advance()
    while engine.has_unfinished_requests():
        began, before = time.perf_counter(), waited.seconds
        engine.advance()
        found.append(time.perf_counter() - began - (waited.seconds - before))
    assert all(mine[-1].finished and mine[-1].error is None for mine in news)
    return np.array(found) * 1e3


def decode_gaps(timelines: Sequence[Timeline]) -> list[NDArray[np.float64]]:
    """Milliseconds between the tokens of each request that began when all requests had their first token."""
    begun = max(t.tokens[0] for t in timelines)
    times = [np.array([at for at in t.tokens if at >= begun]) for t in timelines]
    return [np.diff(each) * 1e3 for each in times]


def over_median(gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each gap over the median of those around it."""
    padded = np.pad(gaps, AROUND // 2, mode="reflect")
    found: NDArray[np.float64] = gaps / np.median(sliding_window_view(padded, AROUND), axis=1)
    return found


def measure(llm: LLM, waited: Waited, batch: int, output_len: int, passes: int) -> None:
    workload = uniform(batch, 128, output_len)
    due = [0.0] * batch
    at_end, streamed, gaps = [], [], []
    one_pass(llm, workload)
    serve(llm, workload, due)
    for _ in range(passes):
        at_end.append(workload.counted / one_pass(llm, workload))
        start = time.perf_counter()
        timelines = serve(llm, workload, due)
        streamed.append(workload.counted / (time.perf_counter() - start))
        gaps += decode_gaps(timelines)
    p50, p99, p999 = np.percentile(np.concatenate(gaps), (50, 99, 99.9))
    around = np.percentile(np.concatenate([over_median(each) for each in gaps]), 99)
    cpu = cpu_times(llm, workload, waited)
    print(
        f"batch {batch}: {max(streamed):,.0f} streamed, {max(at_end):,.0f} at the end, "
        f"{max(streamed) / max(at_end):.3f} of it; "
        f"ITL ms p50 {p50:.3f} p99 {p99:.3f} ({p99 / p50:.2f}) p99.9 {p999:.3f}, p99 over the median around it "
        f"{around:.2f}; CPU ms a step {np.median(cpu):.3f}, {cpu.mean():.3f}, {np.percentile(cpu, 99):.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    with Setup(shape=SHAPES[args.shape], options={"device": args.device}).engine() as llm:
        waited = Waited(llm)
        for batch in args.batch or (64, 96, 128, 192, 256):
            measure(llm, waited, batch, args.output_len, args.passes)


if __name__ == "__main__":
    main()
