"""CPU microseconds of schedule + commit per step, with N requests decoding, one step ahead. No model, no torch.

    python benchmarks/schedule_cost.py [--steps 400] [--running 1 64 256] [--lengths 50 500 2000]

The device is left out: results are made before the clock runs. Three figures each: the plain decode step; the same
while requests end and enter (each output has 64 tokens); and with a log-prob wanted at every token. Then, for as many
requests that are reported at their end: what a step's updates cost the engine. Then,
for as many streams: what an output costs the engine at so many tokens (there is no text), and what reading its
`token_ids` costs. The clock is the thread's CPU time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from nanoengine.core.outputs import Report, RequestState
from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.commit import publish_prompts
from nanoengine.core.scheduling.messages import ScheduledStep, SchedulerConfig, Update
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import LogprobRows, StepResult, f32, i32
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.resolver import ResolvedParams
from nanoengine.testing.policies import named_policy
from nanoengine.text.outputs import OutputAssembler

PROMPT_LEN, BLOCK_SIZE = 128, 16
CASES: dict[str, dict[str, Any]] = {
    "decode": {},
    "churn": {"output_len": 64},
    "decode, logprobs": {"logprobs": 0},
}


def make_scheduler(running: int, max_len: int) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=running, max_num_batched_tokens=8192, max_model_len=max_len)
    num_blocks = 2 + running * (-(-max_len // BLOCK_SIZE) + 1)
    return Scheduler(config, BlockManager(1, num_blocks, BLOCK_SIZE, True), named_policy("fcfs"))


def add(scheduler: Scheduler, number: int, max_tokens: int, logprobs: int | None) -> None:
    rng = np.random.default_rng(number)
    scheduler.add(
        Request(
            id=str(number),
            parent=str(number),
            prompt_token_ids=rng.integers(0, 50_000, PROMPT_LEN).tolist(),
            params=ResolvedParams(max_tokens=max_tokens, eos_ids=frozenset({50_001, 50_002}), logprobs=logprobs),
            seed=0,
            sample_index=0,
            arrival=number,
        )
    )


def result_of(step: ScheduledStep, logprobs: int | None) -> StepResult:
    """A result like that of a runner: some token for each sampled row."""
    counts = np.asarray(step.drawn, dtype=np.int32)
    rows = np.flatnonzero(counts).astype(np.int32)
    n = len(rows)
    drawn = LogprobRows()
    if logprobs is not None:
        zeros = i32(np.zeros(n + 1))
        drawn = LogprobRows(
            rows=rows, positions=rows, token_ids=rows, logprobs=f32(zeros[1:]), ranks=rows, top_offsets=zeros
        )
    return StepResult(
        step=step.plan.step,
        token_ids=(rows * 31 + step.plan.step) % 50_000,
        counts=counts,
        failed=np.zeros(len(counts), dtype=np.int32),
        sampled_logprobs=drawn,
    )


def measure(
    running: int, steps: int, output_len: int | None = None, logprobs: int | None = None
) -> tuple[float, float]:
    """-> (mean microseconds of schedule(), of commit()) a step."""
    max_tokens = output_len or steps + 200
    scheduler = make_scheduler(running, PROMPT_LEN + max_tokens + 1)
    added, in_flight, warm = 0, [], 50
    schedule_ns = commit_ns = 0
    for i in range(steps + warm):
        while len(scheduler.running) + len(scheduler.waiting) < running:
            # Staggered, so that churn is spread over the steps.
            length = 1 + added % max_tokens if output_len and added < running else max_tokens
            add(scheduler, added, length, logprobs)
            added += 1
        start = time.thread_time_ns()
        step = scheduler.schedule()
        if step is not None:
            publish_prompts(step, scheduler.blocks)
        schedule_ns += (time.thread_time_ns() - start) * (i >= warm)
        if step is not None:
            in_flight.append((step, result_of(step, logprobs)))
        if len(in_flight) == 2 or step is None:
            oldest, result = in_flight.pop(0)
            start = time.thread_time_ns()
            scheduler.commit(oldest, result)
            commit_ns += (time.thread_time_ns() - start) * (i >= warm)
    assert scheduler.stats().preemptions == 0
    return schedule_ns / steps / 1e3, commit_ns / steps / 1e3


def measure_quiet(running: int, steps: int = 300) -> float:
    """-> mean microseconds of taking in a step's updates of requests that are reported at their end."""
    known, requests = make_states(running, every=steps + 1)
    spent = 0
    for step in range(steps):
        updates = updates_of(requests, step)
        start = time.thread_time_ns()
        Report.of(updates, known)
        spent += time.thread_time_ns() - start
    return spent / steps / 1e3


def updates_of(requests: Sequence[Request], step: int) -> list[Update]:
    """One more token of each request."""
    updates = []
    for request in requests:
        token = 1_000 + step * 31 + request.arrival
        request.output_token_ids.append(token)
        updates.append(Update(request, (token,), None, None, None, None))
    return updates


def make_states(count: int, every: int = 1) -> tuple[dict[str, RequestState], list[Request]]:
    params = ResolvedParams()
    known, requests = {}, []
    for number in range(count):
        name = str(number)
        request = Request(
            id=name, parent=name, prompt_token_ids=[0], params=params, seed=0, sample_index=0, arrival=number
        )
        given = CheckedRequest(request_id=name, prompt_token_ids=(0,), params=params)
        known[name] = RequestState(given, every)
        known[name].add_sample(request)
        requests.append(request)
    return known, requests


def measure_outputs(streams: int, lengths: Sequence[int], around: int = 40) -> dict[int, tuple[float, float]]:
    """-> length: (microseconds of making a delta and an output, the median of those before it; of reading `token_ids`).

    The delta is made by the engine, the output by its client.
    """
    known, requests = make_states(streams)
    clients = {name: OutputAssembler(state.given, None) for name, state in known.items()}
    cost, tokens = {}, 0
    for length in sorted(lengths):
        made, outcome = [], []
        while tokens < length:
            updates = updates_of(requests, tokens)
            start = time.thread_time_ns()
            outcome = []
            for _, delta in Report.of(updates, known).news:
                clients[delta.request_id].take(delta)
                outcome.append(clients[delta.request_id].output())
            made.append(time.thread_time_ns() - start)
            tokens += 1
        start = time.thread_time_ns()
        for output in outcome:
            assert len(output.outputs[0].token_ids) == length
        cost[length] = (median(made[-around:]) / streams / 1e3, (time.thread_time_ns() - start) / streams / 1e3)
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 500, 2000])
    args = parser.parse_args()
    print(f"{'running':>8} {'case':<28} {'schedule':>9} {'commit':>9} {'sum us':>9}")
    for running in args.running:
        for case, options in CASES.items():
            schedule, commit = measure(running, args.steps, **options)
            print(f"{running:>8} {case:<28} {schedule:>9.1f} {commit:>9.1f} {schedule + commit:>9.1f}")
    for running in args.running:
        print(f"{running:>8} {'updates, reported at the end':<28} {measure_quiet(running):>29.1f}")
    print(f"\n{'streams':>8} {'tokens':>8} {'made us':>9} {'read us':>9}")
    for running in args.running:
        for length, (made, read) in measure_outputs(running, args.lengths).items():
            print(f"{running:>8} {length:>8} {made:>9.1f} {read:>9.1f}")


if __name__ == "__main__":
    main()
