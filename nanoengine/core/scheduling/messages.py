"""What the scheduler and the engine hand each other: configuration, scheduled steps, updates, counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nanoengine.api.deltas import Float32, LogprobRows
from nanoengine.api.errors import ConfigError, RequestError
from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import Published
from nanoengine.core.step import GRAPH_DECODE, GRAPH_MIXED, GRAPH_TAIL, StepPlan
from nanoengine.params.generated import EndReason
from nanoengine.params.grammars import GrammarStats
from nanoengine.params.speculation import MAX_DRAFTS


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of every step. `max_num_batched_tokens` may be below `max_num_seqs`: requests then take turns.

    spare_slots: see `num_slots`; the device's tables have as many. admission_reserve: blocks that stay free for each
    running request when another one is admitted. whole_prompts: a prompt runs in one step, and a request generates one
    token: for attention that looks ahead. most_forced: the most tokens that are drafts because they must come next.

    Raises `ConfigError` for a limit below 1, or a reserve below 0.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool = True
    spare_slots: int = 8
    admission_reserve: int = 0
    whole_prompts: bool = False
    most_forced: int = MAX_DRAFTS

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
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
    """A plan, and the requests of its rows: (request, its generation then), in the plan's order.

    drawn: per row, the most tokens it may bring: none for a chunk, else one and its drafts. published: prompt blocks
    that the prefix index got with it. admitted: in this step. preempted: since the step before. first: the running
    request whose turn it was; None: the policy's first.
    """

    plan: StepPlan
    rows: tuple[tuple[Request, int], ...]
    drawn: tuple[int, ...]
    published: tuple[Published, ...] = ()
    admitted: tuple[Admission, ...] = ()
    preempted: tuple[Preemption, ...] = ()
    first: Request | None = None


class Update(NamedTuple):
    """What is new of one request. With `finish_reason` or `error` the scheduler has removed it already.

    Attributes:
        new_token_ids: all since its last update, a stop token included.
        finish_reason, stop_reason: stop_reason is the id of a `stop_token_ids` hit, None for EOS, and "kv_cache_full"
            with "length" where a lone request outgrew the cache.
        sampled_logprobs, prompt_logprobs: this request's part of the result; None where there is none.
        error: why it failed.
        pooled: float32 [hidden size], the vector of a request that pools, with its end.
    """

    request: Request
    new_token_ids: tuple[int, ...] = ()
    finish_reason: EndReason | None = None
    stop_reason: int | str | None = None
    sampled_logprobs: LogprobRows | None = None
    prompt_logprobs: LogprobRows | None = None
    error: RequestError | None = None
    pooled: Float32 | None = None


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counts since the engine started. The scheduler counts; `Scheduler.stats` gives a copy.

    Attributes:
        steps: steps launched. mixed_steps: of them, with decode and prefill rows. chunks: prefill rows that were only a
            part of what was left to compute.
        graph_steps, mixed_graph_steps, graph_tails: finished steps of which a CUDA graph was replayed: of a decode
            step's model, of a mixed step's model, of the sampling behind either.
        steps_withdrawn: launched steps that were not booked, as memory ran out: their rows were scheduled again, fewer
            tokens at once.
        steps_broken: steps of several requests that raised: each ran again by itself, which is slow.
        preemptions: requests that gave their blocks back and were computed again.
        prompt_tokens: tokens of admitted prompts, and generated ones that requests begin with. prefix_hit_tokens: of
            them, taken from the prefix cache.
        resumed_hit_tokens: taken from it by preempted requests that came back.
        drafted_per_position, accepted_per_position: by position in the draft, how many drafts there were, and how many
            of them were accepted; empty without speculation.
        num_blocks, free_blocks: KV blocks, all and not held by a request, of the KV group that has fewest free; the
            dummy block is not counted. running, waiting: samples now. preparing: requests that cannot start yet.
        grammars: constraints on outputs that were compiled.
    """

    steps: int = 0
    mixed_steps: int = 0
    chunks: int = 0
    graph_steps: int = 0
    mixed_graph_steps: int = 0
    graph_tails: int = 0
    steps_withdrawn: int = 0
    steps_broken: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    resumed_hit_tokens: int = 0
    drafted_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    num_blocks: int = 0
    free_blocks: int = 0
    running: int = 0
    waiting: int = 0
    preparing: int = 0
    grammars: GrammarStats = field(default_factory=GrammarStats)

    @property
    def drafted(self) -> int:
        """All drafts."""
        return sum(self.drafted_per_position)

    @property
    def accepted(self) -> int:
        """All accepted drafts: each is a token that needed no step of its own."""
        return sum(self.accepted_per_position)

    def count_graphs(self, replayed: int) -> None:
        """`replayed`: as in `StepResult.graphs`."""
        self.graph_steps += bool(replayed & GRAPH_DECODE)
        self.mixed_graph_steps += bool(replayed & GRAPH_MIXED)
        self.graph_tails += bool(replayed & GRAPH_TAIL)

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """A row had `drafted` drafts, of which the first `accepted` were accepted."""
        more = [0] * (drafted - len(self.drafted_per_position))
        self.drafted_per_position += more
        self.accepted_per_position += more
        for i in range(drafted):
            self.drafted_per_position[i] += 1
            self.accepted_per_position[i] += i < accepted

    def count_admission(self, request: Request, cached: int) -> None:
        """`cached`: tokens that the prefix cache holds. Also notes the first admission's in the request."""
        if request.num_cached is None:
            request.num_cached = cached
            self.prompt_tokens += request.num_tokens
            self.prefix_hit_tokens += cached
        else:
            self.resumed_hit_tokens += cached

    def uncount_admission(self, request: Request) -> None:
        """Undoes `count_admission` of the newest one, which did not take place."""
        if request.generation == 1:
            request.num_cached = None
            self.prompt_tokens -= request.num_tokens
            self.prefix_hit_tokens -= request.borrowed
        else:
            self.resumed_hit_tokens -= request.borrowed
