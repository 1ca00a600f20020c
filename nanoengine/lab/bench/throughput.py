"""Runs whole workloads on an engine, and reports tokens per second compared with the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from nanoengine import __version__
from nanoengine.lab.bench.report import Report, number, share
from nanoengine.lab.bench.roofline import least_seconds
from nanoengine.lab.bench.session import Setup, backend_of, one_pass, places_of
from nanoengine.lab.bench.workloads import Workload
from nanoengine.llm import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload's result.

    Attributes:
        counts: which tokens per second are given, "output" or "prompt". requests: number of requests.
        best, median: tokens per second of the passes; `each` has all of them. limit: that of the roofline, or None.
        best_seconds: seconds of the best pass.
        itl_ms: the best pass divided by the tokens of an output; only if all outputs have the same length.
        attention: the backend. steps, mixed_steps, preemptions: mean of a pass.
        engine: the engine that was measured. start_seconds: start of an engine other than ours, without imports.
    """

    workload: str
    counts: str
    requests: int
    best: float
    median: float
    each: tuple[float, ...]
    limit: float | None
    best_seconds: float
    itl_ms: float | None
    attention: str | None = None
    steps: float | None = None
    mixed_steps: float | None = None
    preemptions: float | None = None
    engine: str = f"nanoengine {__version__}"
    start_seconds: float | None = None


def run(setup: Setup, workloads: Sequence[Workload]) -> Report:
    """Measures the workloads in the given order. A new engine is made only if `max_num_seqs` changes."""
    rows: list[Row] = []
    bound: int | None = None
    llm: LLM | None = None
    with ExitStack() as stack:
        for workload in workloads:
            if llm is None or workload.max_num_seqs != bound:
                stack.close()
                bound = workload.max_num_seqs
                llm = stack.enter_context(setup.engine(**({} if bound is None else {"max_num_seqs": bound})))
            rows.append(_measure(llm, workload, setup))
    return Report(benchmark="throughput", settings=setup.as_dict(), rows=rows, columns=COLUMNS)


def _measure(llm: LLM, workload: Workload, setup: Setup) -> Row:
    setup.say(f"{workload.name}: warming up")
    one_pass(llm, workload)  # compiles kernels that are compiled on first use
    before = llm.stats()
    seconds = [one_pass(llm, workload) for _ in setup.counted(workload.name)]
    after = llm.stats()
    return row_of(
        workload,
        seconds,
        setup,
        places_of(llm),
        attention=backend_of(llm),
        steps=(after.steps - before.steps) / setup.passes,
        mixed_steps=(after.mixed_steps - before.mixed_steps) / setup.passes,
        preemptions=(after.preemptions - before.preemptions) / setup.passes,
    )


def row_of(workload: Workload, seconds: Sequence[float], setup: Setup, places: int, **more: Any) -> Row:
    """The row for passes that took `seconds`. `places`: most requests at the same time. `more`: other fields."""
    speeds = [workload.counted / each for each in seconds]
    limit, limits = None, setup.engine_limits
    if limits is not None:
        limit = workload.counted / least_seconds(setup.shape, limits, workload.lengths, places)
    lens = set(workload.output_lens)
    alike = len(lens) == 1 and lens != {1} and len(workload.prompts) <= places
    return Row(
        workload=workload.name,
        counts=workload.counts,
        requests=len(workload.prompts),
        best=max(speeds),
        median=median(speeds),
        each=tuple(speeds),
        limit=limit,
        best_seconds=min(seconds),
        itl_ms=1e3 * min(seconds) / lens.pop() if alike else None,
        **more,
    )


COLUMNS = {
    "workload": lambda r: r.workload,
    "tokens": lambda r: r.counts,
    "best tok/s": lambda r: number(r.best),
    "median": lambda r: number(r.median),
    "limit": lambda r: number(r.limit),
    "of limit": lambda r: share(r.best, r.limit),
    "steps": lambda r: number(r.steps),
    "mixed": lambda r: number(r.mixed_steps),
    "preempted": lambda r: number(r.preemptions),
}
