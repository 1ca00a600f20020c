"""What the scheduler and the engine hand each other: configuration, scheduled steps, updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nanoengine.api.deltas import Float32, LogprobRows
from nanoengine.api.errors import RequestError
from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import Published
from nanoengine.core.step import StepPlan
from nanoengine.params.generated import EndReason
from nanoengine.params.speculation import MAX_DRAFTS


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of every step, as `EngineOptions` has checked them.

    max_num_batched_tokens: may be below `max_num_seqs`: requests then take turns. spare_slots: see `num_slots`; the
    device's tables have as many. admission_reserve: blocks that stay free for each running request when another one is
    admitted. whole_prompts: a prompt runs in one step, and a request generates one token: for attention that looks
    ahead. most_forced: the most tokens that are drafts because they must come next. prompts_together: tokens of prompts
    that wait for each other where nearly all places are taken; 0: none does.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool = True
    spare_slots: int = 8
    admission_reserve: int = 0
    whole_prompts: bool = False
    most_forced: int = MAX_DRAFTS
    prompts_together: int = 0


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
    that the prefix index got with it, once it was launched. admitted: in this step. preempted: since the step before.
    first: the running request whose turn it was; None: the policy's first.
    """

    plan: StepPlan
    rows: tuple[tuple[Request, int], ...]
    drawn: tuple[int, ...]
    published: list[Published] = field(default_factory=list)  # by `publish_prompts`
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
