"""What a decode step costs the CPU, and how long the GPU idles between steps, on workload d256.

    python benchmarks/step_cost.py [--requests 256] [--steps 400]

CPU: microseconds a step of `schedule`, of `launch` (staging and graph launches) and of `commit`, by the wall clock of
the thread that does them; the wait for the device is in none of them. Blocks grow and stop tokens are looked for. GPU:
the share of the time of 30 steps in which nothing runs on it, from torch's profiler, whose tracing makes steps a little
longer. It is given for the gaps between steps, and in total, with the gaps between the kernels of a graph.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from nanoengine import LLM, SamplingParams
from nanoengine.lab.bench.shapes import SHAPES
from nanoengine.lab.bench.workloads import uniform

PROFILED, WARMUP = 30, 10


def timed(spent: Counter[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args)
        finally:
            spent[name] += time.perf_counter() - start

    return wrapped


def idle_share(engine: Any) -> tuple[float, float, float]:
    """Idle shares of the time of some steps, between steps and in total; microseconds per step.

    Between steps there are copies: of the result to the host, and of the next step's inputs to the device.
    """
    events: list[Any] = []
    plan = schedule(wait=0, warmup=WARMUP, active=PROFILED, repeat=1)  # the tracer's start makes steps longer
    with profile(
        activities=[ProfilerActivity.CUDA],
        schedule=plan,
        on_trace_ready=lambda traced: events.extend(traced.profiler.kineto_results.events()),
    ) as traced:
        for i in range(WARMUP + PROFILED):
            engine.advance()
            if i == WARMUP + PROFILED - 1:
                torch.cuda.synchronize()
            traced.step()
    on_gpu = [e for e in events if str(e.device_type()).endswith("CUDA")]
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns(), e.name().startswith("Memcpy")) for e in on_gpu)
    between = idle = 0
    _, end, copied = spans[0]
    for start, stop, copies in spans[1:]:
        idle += max(0, start - end)
        between += max(0, start - end) * (copies or copied)
        if stop > end:
            end, copied = stop, copies
    total = end - spans[0][0]
    return between / total, idle / total, total / PROFILED / 1e3


def run(llm: LLM, requests: int, steps: int) -> None:
    engine, spent = llm.engine, Counter[str]()
    workload = uniform(requests)
    params = SamplingParams(
        temperature=0.6, ignore_eos=True, max_tokens=512, stop_token_ids=[SHAPES["qwen3-0.6b"].vocab - 1]
    )
    for i, prompt in enumerate(workload.prompts):
        engine.add_request(str(i), prompt, params, every=512)
    while engine.scheduler.waiting or any(r.num_tokens == r.prompt_len for r in engine.scheduler.running):
        engine.advance()
    between, idle, traced = idle_share(engine)
    parts = {"schedule": (engine.scheduler, "schedule"), "launch": (engine._executor, "launch"),
             "commit": (engine.scheduler, "commit")}  # fmt: skip
    for name, (owner, method) in parts.items():
        setattr(owner, method, timed(spent, name, getattr(owner, method)))
    start = time.perf_counter()
    for _ in range(steps):
        engine.advance()
    wall = time.perf_counter() - start
    each = {name: spent[name] / steps * 1e6 for name in parts}
    print(f"{requests} running, mean of {steps} steps of {wall / steps * 1e6:,.0f} us")
    print("CPU us a step: " + ", ".join(f"{name} {value:.0f}" for name, value in each.items()), end="; ")
    print(f"sum {sum(each.values()):.0f}")
    print(f"GPU idle between steps {between:.1%}, in total {idle:.1%}, of {traced:,.0f} us per traced step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--attention", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = SHAPES["qwen3-0.6b"].write(Path(folder), 4096)
        with LLM(model, attention=args.attention, load_format="dummy", max_model_len=4096) as llm:
            run(llm, args.requests, args.steps)


if __name__ == "__main__":
    main()
