"""What a reserve at admission saves or costs when KV blocks are short: steps, computed tokens, preemptions. No model.

    python benchmarks/admission_reserve.py [--reserves 0 1 2] [--seeds 1 2 3]

The scheduler alone, one step ahead. Three loads: *uniform*, random prompts and outputs; *burst*, short prompts that
come at once, with long outputs; *shared*, one system prompt and outputs of any length. Each is run with and without the
prefix cache. Computed: tokens that steps computed for each that one request alone would need.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from dataclasses import dataclass

from schedule_cost import result_of

from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.commit import publish_prompts
from nanoengine.core.scheduling.messages import SchedulerConfig
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.params.resolver import ResolvedParams
from nanoengine.testing.policies import named_policy

Load = list[tuple[list[int], int]]  # prompts, output lengths


@dataclass(frozen=True, slots=True)
class Outcome:
    steps: int
    computed: float
    preemptions: int


def loads(seed: int) -> dict[str, Load]:
    """Three loads of 300 requests."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(1000) for _ in range(count)]

    system = ids(1024)
    return {
        "uniform": [(ids(rng.randint(200, 900)), rng.randint(50, 600)) for _ in range(300)],
        "burst": [(ids(rng.randint(20, 60)), rng.randint(500, 1500)) for _ in range(300)],
        "shared": [([*system, *ids(rng.randint(10, 200))], rng.randint(20, 800)) for _ in range(300)],
    }


def run(load: Load, reserve: int, caching: bool) -> Outcome:
    """1,200 blocks of 16 tokens, at most 64 running requests, 2,048 tokens per step."""
    config = SchedulerConfig(
        max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8192, admission_reserve=reserve
    )
    scheduler = Scheduler(config, BlockManager(1, 1201, 16, caching), named_policy("fcfs"))
    for number, (prompt, length) in enumerate(load):
        params = ResolvedParams(max_tokens=length)
        name = str(number)
        scheduler.add(
            Request(
                id=name, parent=name, prompt_token_ids=prompt, params=params, seed=0, sample_index=0, arrival=number
            )
        )
    needed = sum(len(prompt) + length - 1 for prompt, length in load)
    steps = computed = 0
    in_flight = deque()
    while scheduler.running or scheduler.waiting:
        while len(in_flight) < 2 and (step := scheduler.schedule()) is not None:
            publish_prompts(step, scheduler.blocks)
            in_flight.append(step)
        scheduler.take_updates()
        step = in_flight.popleft()
        steps, computed = steps + 1, computed + step.plan.num_tokens
        scheduler.commit(step, result_of(step, None))
    return Outcome(steps, computed / needed, scheduler.stats().preemptions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reserves", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    print(f"{'load':<8} {'cache':<6} {'seed':>4} {'reserve':>8} {'steps':>7} {'computed':>9} {'preemptions':>12}")
    for seed in args.seeds:
        for name, load in loads(seed).items():
            for caching in (False, True):
                for reserve in args.reserves:
                    out = run(load, reserve, caching)
                    print(
                        f"{name:<8} {caching!s:<6} {seed:>4} {reserve:>8} {out.steps:>7} {out.computed:>9.3f} "
                        f"{out.preemptions:>12}"
                    )


if __name__ == "__main__":
    main()
