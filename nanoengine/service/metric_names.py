"""The names of the service's metrics, and those that vLLM has for the same: one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: without the prefix "nanoengine_", and of a counter without "_total". text: what it is, with its unit.
        labels: names of labels, by which it is split. by_client: split by client too, where that is wanted.
        vllm: names of the same metric in vLLM, without the prefix "vllm:". vllm_labels: of its labels there.
    """

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    by_client: bool = False
    vllm: tuple[str, ...] = ()
    vllm_labels: tuple[str, ...] = ()


METRICS: tuple[Metric, ...] = (
    # Of usages, as the users were answered.
    Metric("requests", "counter", "HTTP requests that have ended", ("endpoint", "status"), by_client=True),
    Metric("samples", "counter", "Samples that have ended, by their finish reason", ("finish_reason",),
           by_client=True, vllm=("request_success",), vllm_labels=("finished_reason",)),
    Metric("prompt_tokens", "counter", "Tokens of prompts", by_client=True, vllm=("prompt_tokens",)),
    Metric("cached_tokens", "counter", "Of them, those that the prefix cache held", by_client=True,
           vllm=("prompt_tokens_cached",)),
    Metric("generation_tokens", "counter", "Generated tokens", by_client=True, vllm=("generation_tokens",)),
    Metric("request_prompt_tokens", "histogram", "Tokens of a request's prompts", vllm=("request_prompt_tokens",)),
    Metric("request_generation_tokens", "histogram", "Tokens that a request's samples got",
           vllm=("request_generation_tokens",)),
    Metric("time_to_first_token_seconds", "histogram", "Seconds from the arrival of a request to its first token",
           vllm=("time_to_first_token_seconds",)),
    Metric("request_seconds", "histogram", "Seconds from the arrival of a request to its end",
           vllm=("e2e_request_latency_seconds",)),
    # Of the step loop.
    Metric("queue_seconds", "histogram", "Seconds that a request waited until it first ran",
           vllm=("request_queue_time_seconds",)),
    Metric("inter_token_seconds", "histogram", "Seconds between two steps that gave a request tokens",
           vllm=("inter_token_latency_seconds", "time_per_output_token_seconds")),
    Metric("step_seconds", "histogram", "Seconds of a turn of the step loop in which there was work"),
    # Of the counters and the state of engine and service.
    Metric("steps", "counter", "Steps that were launched"),
    Metric("preemptions", "counter", "Requests that gave their blocks back and were computed again",
           vllm=("num_preemptions",)),
    Metric("prefix_cache_queries", "counter", "Tokens of admitted prompts", vllm=("prefix_cache_queries",)),
    Metric("prefix_cache_hits", "counter", "Of them, those that the prefix cache held", vllm=("prefix_cache_hits",)),
    Metric("draft_tokens", "counter", "Drafts of speculation", vllm=("spec_decode_num_draft_tokens",)),
    Metric("accepted_draft_tokens", "counter", "Drafts that were accepted",
           vllm=("spec_decode_num_accepted_tokens",)),
    Metric("running", "gauge", "Samples that run", vllm=("num_requests_running",)),
    Metric("waiting", "gauge", "Samples that wait to run", vllm=("num_requests_waiting",)),
    Metric("preparing", "gauge", "Requests whose constraint is being compiled"),
    Metric("open_requests", "gauge", "Requests that have not ended"),
    Metric("queued_requests", "gauge", "Requests that have not started; one with n samples counts as n"),
    Metric("queued_tokens", "gauge", "Tokens of their prompts"),
    Metric("kv_cache_usage", "gauge", "Share of the KV blocks that requests hold, from 0 to 1",
           vllm=("kv_cache_usage_perc", "gpu_cache_usage_perc")),
    Metric("draining", "gauge", "1: no new requests are taken"),
    Metric("uptime_seconds", "gauge", "Seconds since the service began"),
)  # fmt: skip

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0,
    40.0, 80.0, 160.0, 320.0, 640.0,
)  # fmt: skip
TOKENS = tuple(float(step * 10**power) for power in range(7) for step in (1, 2, 5))


def bounds_of(metric: Metric) -> tuple[float, ...]:
    """Upper bounds of a histogram's buckets, without infinity."""
    return SECONDS if metric.name.endswith("_seconds") else TOKENS
