"""A system prompt that many requests share: what the prefix cache saves for each KV block size.

Each pass begins with an empty cache, so the shared part is computed once, by the first request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import median

from nanoengine.lab.bench.report import Cell, Report, number, share
from nanoengine.lab.bench.roofline import least_seconds
from nanoengine.lab.bench.session import Setup, backend_of, one_pass, places_of
from nanoengine.lab.bench.workloads import Workload, random_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One block size, with or without the cache.

    Attributes:
        best_seconds, median_seconds: of a pass. hit_rate: share of the prompt tokens that came from the cache.
        best_possible: the share for a cache without blocks.
        limit: seconds of the roofline; with the cache, the shared part is computed once.
    """

    block_size: int
    cache: bool
    attention: str
    requests: int
    best_seconds: float
    median_seconds: float
    hit_rate: float
    best_possible: float
    limit: float | None


def shared_prompt(requests: int, shared: int, own: int, output_len: int) -> Workload:
    """`requests` prompts that begin with the same `shared` tokens, followed by `own` different tokens each."""
    rng = Random(0)
    common = random_ids(rng, shared)
    prompts = tuple((*common, *random_ids(rng, own)) for _ in range(requests))
    return Workload(name=f"prefix{requests}x{shared}", prompts=prompts, output_lens=(output_len,) * requests)


def run(setup: Setup, block_sizes: Sequence[int], *, requests: int, shared: int, own: int, output_len: int) -> Report:
    workload = shared_prompt(requests, shared, own, output_len)
    cases = [(size, True) for size in block_sizes] + [(block_sizes[0], False)]
    rows = [_measure(setup, workload, shared, size, cache) for size, cache in cases]
    settings = {**setup.as_dict(), "requests": requests, "shared": shared, "own": own, "output_len": output_len}
    return Report(benchmark="prefix", settings=settings, rows=rows, columns=_columns(rows[-1].best_seconds))


def _measure(setup: Setup, workload: Workload, shared: int, block_size: int, cache: bool) -> Row:
    what = f"blocks of {block_size}, {'the' if cache else 'no'} cache"
    setup.say(f"{what}: warming up")
    with setup.engine(block_size=block_size, enable_prefix_caching=cache) as llm:
        one_pass(llm, workload)
        before = llm.stats()
        seconds = [one_pass(llm, workload) for _ in setup.counted(what)]
        after = llm.stats()
        cached = shared if cache else 0
        limit, limits = None, setup.engine_limits
        if limits is not None:
            limit = least_seconds(setup.shape, limits, workload.lengths, places_of(llm), cached)
        prompt_tokens = sum(map(len, workload.prompts))
        return Row(
            block_size=block_size,
            cache=cache,
            attention=backend_of(llm),
            requests=len(workload.prompts),
            best_seconds=min(seconds),
            median_seconds=median(seconds),
            hit_rate=(after.prefix_hit_tokens - before.prefix_hit_tokens)
            / (after.prompt_tokens - before.prompt_tokens),
            best_possible=cached * (len(workload.prompts) - 1) / prompt_tokens,
            limit=limit,
        )


def _columns(uncached: float) -> dict[str, Cell]:
    return {
        "prefix cache": lambda r: f"blocks of {r.block_size}" if r.cache else "off",
        "best s": lambda r: number(r.best_seconds, 3),
        "median s": lambda r: number(r.median_seconds, 3),
        "hits": lambda r: f"{r.hit_rate:.1%}",
        "possible": lambda r: f"{r.best_possible:.1%}",
        "times as fast": lambda r: number(uncached / r.best_seconds, 2),
        "limit s": lambda r: number(r.limit, 3),
        "of limit": lambda r: share(r.limit, r.best_seconds),
    }
