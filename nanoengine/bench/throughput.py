"""Runs throughput workloads on one engine and reports tokens a second beside the roofline."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nanoengine.bench.shapes import Shape
from nanoengine.bench.workloads import WORKLOADS, Limits, Workload
from nanoengine.core.llm import LLM
from nanoengine.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload's result. best, median: counted tokens a second over the passes; limit: the roofline's, or None."""

    workload: str
    counts: str
    passes: int
    best: float
    median: float
    limit: float | None
    mixed_steps: int
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is run, and how often. `options`: engine options, the same for every workload."""

    shape: Shape
    workloads: Sequence[str]
    passes: int
    max_model_len: int
    attention: str
    options: Mapping[str, Any]
    limits: Limits | None


def run(what: Run) -> list[Row]:
    """Rows in the order asked for. An engine is made anew only where a workload bounds `max_num_seqs`."""
    rows: list[Row] = []
    engines: dict[int | None, LLM] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = what.shape.write(Path(folder), what.max_model_len)
        try:
            for name in what.workloads:
                workload = WORKLOADS[name]()
                if workload.max_num_seqs not in engines:
                    for llm in engines.values():
                        llm.close()
                    bound = {} if workload.max_num_seqs is None else {"max_num_seqs": workload.max_num_seqs}
                    llm = LLM(model, attention=what.attention, load_format="dummy", **{**what.options, **bound})
                    engines = {workload.max_num_seqs: llm}
                rows.append(_measure(engines[workload.max_num_seqs], workload, what))
        finally:
            for llm in engines.values():
                llm.close()
    return rows


def _measure(llm: LLM, workload: Workload, what: Run) -> Row:
    _one_pass(llm, workload)  # compiles what is compiled on first use
    before = llm.stats()
    speeds = sorted(workload.counted / _one_pass(llm, workload) for _ in range(what.passes))
    after = llm.stats()
    batch = min(len(workload.prompts), llm.engine.scheduler.config.max_num_seqs)
    limit = None
    if what.limits is not None:
        limit = workload.counted / workload.shortest_seconds(what.shape, what.limits, batch)
    return Row(
        workload=workload.name,
        counts=workload.counts,
        passes=what.passes,
        best=speeds[-1],
        median=median(speeds),
        limit=limit,
        mixed_steps=after.mixed_steps - before.mixed_steps,
        preemptions=after.preemptions - before.preemptions,
    )


def _one_pass(llm: LLM, workload: Workload) -> float:
    """Seconds, from the first request to the last token, with an empty prefix cache."""
    llm.reset_prefix_cache()
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in workload.output_lens]
    start = time.perf_counter()
    outputs = llm.generate(workload.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    for output, length in zip(outputs, workload.output_lens, strict=True):
        if output.error is not None:
            raise output.error
        assert len(output.outputs[0].token_ids) == length
    return seconds


def as_dict(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'workload':<10} {'tokens':<7} {'best tok/s':>12} {'median':>12} {'limit':>12} {'of limit':>9}"]
    for row in rows:
        limit = "-" if row.limit is None else f"{row.limit:,.0f}"
        share = "-" if row.limit is None else f"{row.best / row.limit:.0%}"
        lines.append(
            f"{row.workload:<10} {row.counts:<7} {row.best:>12,.0f} {row.median:>12,.0f} {limit:>12} {share:>9}"
        )
    return "\n".join(lines)
