"""Latencies as a streaming client sees them: percentiles of TTFT, ITL and whole requests.

Closed: N requests of the same size come at the same time and run together. Open: requests come at random times with a
given mean rate (a Poisson process, seed 0), whether or not earlier ones have ended. Times count from the moment at
which a request was due.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from nanoengine.api.deltas import RequestDelta
from nanoengine.lab.bench.report import Report, number, share
from nanoengine.lab.bench.roofline import decode_seconds
from nanoengine.lab.bench.session import Setup, backend_of
from nanoengine.lab.bench.workloads import Workload, uniform
from nanoengine.llm import LLM
from nanoengine.params.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Percentiles in milliseconds."""

    p50: float
    p90: float
    p99: float
    mean: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Percentiles:
        found = np.fromiter(seconds, dtype=np.float64) * 1e3
        p50, p90, p99 = np.percentile(found, (50, 90, 99)).tolist()
        return cls(p50=p50, p90=p90, p99=p99, mean=float(found.mean()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The results of one batch size or one arrival rate.

    Attributes:
        batch: requests at the same time; None with an arrival rate. rate: requests/s; None for a closed batch.
        requests: number of requests in a pass. tokens_per_s: output tokens, best pass and median of all passes.
        ttft, itl, e2e: times to the first token, between tokens (of several in one step, equal shares), and to the last
            token, for the requests of all passes. There is no ITL if requests have only one token.
        itl_limit_ms: time of a decode step of the whole batch at its mean context, by the roofline.
    """

    batch: int | None
    rate: float | None
    attention: str
    requests: int
    passes: int
    tokens_per_s: float
    median_tokens_per_s: float
    ttft: Percentiles
    itl: Percentiles | None
    e2e: Percentiles
    itl_limit_ms: float | None


@dataclass(slots=True)
class Timeline:
    """The time at which a request was due, and of each of its tokens, in seconds of `time.perf_counter`.

    `gaps`: seconds between tokens. Tokens that come together share the time since those before them.
    """

    due: float
    tokens: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def take(self, delta: RequestDelta) -> None:
        if delta.error is not None:
            raise delta.error
        now, new = time.perf_counter(), sum(len(sample.token_ids) for sample in delta.samples)
        if self.tokens and new:
            self.gaps += [(now - self.tokens[-1]) / new] * new
        self.tokens += [now] * new


def run(setup: Setup, batches: Sequence[int], rates: Sequence[float], prompt_len: int, output_len: int, requests: int
        ) -> Report:  # fmt: skip
    """Measures all batch sizes and arrival rates. `requests`: number of requests in a pass with an arrival rate."""
    most = max(batches, default=1)
    places = {} if "max_num_seqs" in setup.options or most <= 256 else {"max_num_seqs": most}
    rows, limits = [], setup.engine_limits
    with setup.engine(**places) as llm:
        for batch in batches:
            workload = uniform(batch, prompt_len, output_len)
            limit = None
            if limits is not None:
                limit = 1e3 * decode_seconds(setup.shape, limits, batch, prompt_len + output_len / 2)
            rows.append(_row(llm, setup, workload, [0.0] * batch, batch=batch, limit=limit))
        for rate in rates:
            workload = uniform(requests, prompt_len, output_len)
            rows.append(_row(llm, setup, workload, arrivals(requests, rate), rate=rate))
    settings = {**setup.as_dict(), "prompt_len": prompt_len, "output_len": output_len}
    return Report(benchmark="latency", settings=settings, rows=rows, columns=COLUMNS)


def arrivals(count: int, rate: float) -> list[float]:
    """The times in seconds at which requests come: a Poisson process."""
    rng, now, found = Random(0), 0.0, []
    for _ in range(count):
        found.append(now)
        now += rng.expovariate(rate)
    return found


def _row(
    llm: LLM,
    setup: Setup,
    workload: Workload,
    due: Sequence[float],
    *,
    batch: int | None = None,
    rate: float | None = None,
    limit: float | None = None,
) -> Row:
    what = f"batch {batch}" if rate is None else f"{rate:g} requests/s"
    setup.say(f"{what}: warming up")
    serve(llm, workload, [0.0] * len(due))
    passes = [serve(llm, workload, due) for _ in setup.counted(what)]
    speeds = [workload.counted / (max(t.tokens[-1] for t in one) - min(t.due for t in one)) for one in passes]
    every = [timeline for one in passes for timeline in one]
    gaps = [gap for timeline in every for gap in timeline.gaps]
    return Row(
        batch=batch,
        rate=rate,
        attention=backend_of(llm),
        requests=len(workload.prompts),
        passes=setup.passes,
        tokens_per_s=max(speeds),
        median_tokens_per_s=float(np.median(speeds)),
        ttft=Percentiles.of(t.tokens[0] - t.due for t in every),
        itl=Percentiles.of(gaps) if gaps else None,
        e2e=Percentiles.of(t.tokens[-1] - t.due for t in every),
        itl_limit_ms=limit,
    )


def serve(llm: LLM, workload: Workload, due: Sequence[float]) -> list[Timeline]:
    """Runs the requests with an empty prefix cache. Each is added `due` seconds after the start."""
    llm.reset_prefix_cache()
    engine, begun = llm.engine, time.perf_counter()
    timelines: list[Timeline] = []
    while len(timelines) < len(due) or engine.has_unfinished_requests():
        now = time.perf_counter() - begun
        while len(timelines) < len(due) and due[len(timelines)] <= now:
            i = len(timelines)
            timelines.append(Timeline(begun + due[i]))
            params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=workload.output_lens[i])
            engine.add_request(f"latency-{i}", workload.prompts[i], params, sink=timelines[-1].take)
        if engine.has_unfinished_requests():
            engine.advance()
        else:
            time.sleep(max(0.0, due[len(timelines)] - (time.perf_counter() - begun)))
    return timelines


def _at(row: Row) -> str:
    return f"batch {row.batch}" if row.batch is not None else f"{row.rate:g} requests/s"


COLUMNS = {
    "at": _at,
    "tok/s": lambda r: number(r.tokens_per_s),
    "TTFT p50 ms": lambda r: number(r.ttft.p50, 1),
    "TTFT p99": lambda r: number(r.ttft.p99, 1),
    "ITL p50 ms": lambda r: number(r.itl and r.itl.p50, 2),
    "ITL p90": lambda r: number(r.itl and r.itl.p90, 2),
    "ITL p99": lambda r: number(r.itl and r.itl.p99, 2),
    "limit ms": lambda r: number(r.itl_limit_ms, 2),
    "of limit": lambda r: share(r.itl_limit_ms, r.itl and r.itl.p50),
    "whole p50 ms": lambda r: number(r.e2e.p50, 0),
    "whole p99": lambda r: number(r.e2e.p99, 0),
}
