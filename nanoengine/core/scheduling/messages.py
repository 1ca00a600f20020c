"""What the scheduler and the engine hand each other: configuration, scheduled steps, updates, counters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from nanoengine.api.errors import ConfigError, RequestError
from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import Published
from nanoengine.core.step import GRAPH_DECODE, GRAPH_MIXED, GRAPH_TAIL, Int64, LogprobRows, StepPlan

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of every step. `max_num_batched_tokens` may be below `max_num_seqs`: requests then take turns.

    steady_rows: from so many decode rows a step they become columns (`steady.py`); the plans are the same. With fewer,
    numpy's calls cost more than they save. spare_slots: see `num_slots`; the device's tables have as many.
    admission_reserve: blocks that stay free for each running request when another one is admitted.

    Raises `ConfigError` for a limit below 1, or a reserve below 0.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool = True
    policy: str = "fcfs"
    steady_rows: int = 48
    spare_slots: int = 8
    admission_reserve: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "steady_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.admission_reserve < 0:
            raise ConfigError(f"admission_reserve={self.admission_reserve} must be 0 or more")


class Admission(NamedTuple):
    """A request that got a slot. num_tokens: known ones. cached: of them, those whose KV the prefix cache held.
    resumed: it ran before, and was preempted."""

    request: str
    slot: int
    num_tokens: int
    cached: int
    resumed: bool


class Preemption(NamedTuple):
    """A request that gave its slot and blocks back. computed: tokens whose KV is lost to it. why: in words."""

    request: str
    slot: int
    computed: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledStep:
    """A plan, and whose rows it holds: (request, its generation then), in the plan's order.

    generations: int64, those of `rows`. sampled: per row, whether a token is drawn. published: prompt blocks that the
    prefix index got with it. admitted: in this step. preempted: since the step before.
    """

    plan: StepPlan
    rows: tuple[tuple[Request, int], ...]
    generations: Int64
    sampled: tuple[bool, ...]
    published: tuple[Published, ...] = ()
    admitted: tuple[Admission, ...] = ()
    preempted: tuple[Preemption, ...] = ()


class Update(NamedTuple):
    """News of one request. With `finish_reason`, `failed` or `error` the scheduler has let go of it already.

    Attributes:
        new_token_ids: all since its last update, a stop token included.
        finish_reason, stop_reason: stop_reason is the id of a `stop_token_ids` hit, None for EOS, and "kv_cache_full"
            with "length" where a lone request outgrew the cache.
        sampled_logprobs, prompt_logprobs: this request's part of the result; None where there is none.
        failed: the row's code in `StepResult.failed`; 0: fine.
        error: why it failed while it was being scheduled.
    """

    request: Request
    new_token_ids: tuple[int, ...] = ()
    finish_reason: EndReason | None = None
    stop_reason: int | str | None = None
    sampled_logprobs: LogprobRows | None = None
    prompt_logprobs: LogprobRows | None = None
    failed: int = 0
    error: RequestError | None = None


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counts since the engine started. The scheduler counts; who asks gets a copy.

    Attributes:
        steps: steps launched. mixed_steps: of them, with decode and prefill rows. chunks: prefill rows that were only a
            part of what was left to compute.
        graph_steps, mixed_graph_steps, graph_tails: finished steps of which a CUDA graph was replayed: of a decode
            step's model, of a mixed step's model, of the sampling behind either.
        steps_split: finished steps that memory did not hold whole, and that ran in parts.
        steps_broken: steps of several requests that raised: each ran again by itself, which is slow.
        preemptions: requests that gave their blocks back and were computed again.
        prompt_tokens: tokens of admitted prompts. prefix_hit_tokens: of them, taken from the prefix cache.
        resumed_hit_tokens: taken from it by preempted requests that came back.
        num_blocks, free_blocks: KV blocks, all and not held by a request, of the KV group that has fewest free; the
            dummy block is not counted. running, waiting: samples now.
    """

    steps: int = 0
    mixed_steps: int = 0
    chunks: int = 0
    graph_steps: int = 0
    mixed_graph_steps: int = 0
    graph_tails: int = 0
    steps_split: int = 0
    steps_broken: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    resumed_hit_tokens: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    running: int = 0
    waiting: int = 0

    def count_graphs(self, replayed: int) -> None:
        """`replayed`: as in `StepResult.graphs`."""
        if replayed:
            self.graph_steps += bool(replayed & GRAPH_DECODE)
            self.mixed_graph_steps += bool(replayed & GRAPH_MIXED)
            self.graph_tails += bool(replayed & GRAPH_TAIL)

    def count_admission(self, request: Request, cached: int) -> None:
        """`cached`: tokens that the prefix cache holds. Also notes the first admission's in the request."""
        if request.num_cached is None:
            request.num_cached = cached
            self.prompt_tokens += request.prompt_len
            self.prefix_hit_tokens += cached
        else:
            self.resumed_hit_tokens += cached


def cut(entries: LogprobRows, num_rows: int) -> dict[int, LogprobRows]:
    """A result's log-probs by plan row. The entries stand in row order, as the tokens do."""
    if not len(entries.rows):
        return {}
    assert (np.diff(entries.rows) >= 0).all(), "log-probs are not in row order"
    bounds = np.searchsorted(entries.rows, np.arange(num_rows + 1)).tolist()
    tops = entries.top_offsets.tolist()
    out: dict[int, LogprobRows] = {}
    for row, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        top, offsets = tops[start], entries.top_offsets[start : end + 1]
        out[row] = LogprobRows(
            rows=entries.rows[start:end],
            positions=entries.positions[start:end],
            token_ids=entries.token_ids[start:end],
            logprobs=entries.logprobs[start:end],
            ranks=entries.ranks[start:end],
            top_ids=entries.top_ids[top : tops[end]],
            top_logprobs=entries.top_logprobs[top : tops[end]],
            top_offsets=offsets - top if top else offsets,
        )
    return out


def append_token(request: Request, token: int) -> Update:
    """`append_tokens` of one token without log-probs: what nearly every row of every step brings."""
    num_tokens = request.num_tokens + 1
    if num_tokens >= request.max_len or token in request.stop_set or request.num_untold:
        return append_tokens(request, [token], None, None)
    request.output_token_ids.append(token)
    request.num_tokens = num_tokens
    return tuple.__new__(Update, (request, (token,), None, None, None, None, 0, None))  # its own __new__ is slower


def append_tokens(request: Request, new: list[int], drawn: LogprobRows | None, prompt: LogprobRows | None) -> Update:
    """Appends new tokens up to the one that ends the request, if one does; a stop token counts before the length.

    The sampler masks stop tokens below `min_tokens`; should one come nevertheless, it does not end the request.
    """
    num_tokens, stop_set, max_len = request.num_tokens, request.stop_set, request.max_len
    for i, token in enumerate(new, start=1):
        num_tokens += 1
        stops = token in stop_set and num_tokens > request.min_len
        if stops or num_tokens >= max_len:
            new = new[:i]
            break
    else:
        stops = False
    request.output_token_ids += new
    request.num_tokens = num_tokens
    told = take_untold(request, len(new)) if request.num_untold else tuple(new)
    if stops:
        return Update(request, told, "stop", None if token in request.params.eos_ids else token, drawn, prompt)
    if num_tokens >= max_len:
        return Update(request, told, "length", request.length_reason, drawn, prompt)
    return Update(request, told, None, None, drawn, prompt)


def take_untold(request: Request, num_new: int = 0) -> tuple[int, ...]:
    """Its last `num_new` tokens and those before them that no update has told; they count as told from here on."""
    first = len(request.output_token_ids) - num_new - request.num_untold
    request.num_untold = 0
    return tuple(request.output_token_ids[first:])
