"""The counters: they equal the sum of what users were answered, by client too; vLLM's names say the same."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from nanoengine import LLM
from nanoengine.server.config import ServerConfig, service_options
from nanoengine.service.client import ServiceStats, Usage
from nanoengine.service.local import LocalClient
from nanoengine.service.metric_names import METRICS
from nanoengine.service.metrics import Histogram, Metrics
from nanoengine.service.options import LimitOptions, MetricOptions, ServiceOptions
from nanoengine.service.parts import parts_of, service_of
from nanoengine.testing import mock_model
from tests.service.support import request, until, whole

Labels = frozenset[tuple[str, str]]


def read(metrics: bytes) -> dict[str, dict[Labels, float]]:
    """Name of the sample -> its labels -> value, by Prometheus' own parser."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(metrics.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def total(found: dict[str, dict[Labels, float]], name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    return sum(value for given, value in found.get(name, {}).items() if set(labels.items()) <= given)


usages = st.lists(
    st.builds(
        Usage,
        client=st.sampled_from(["", "ann", "bob"]),
        endpoint=st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
        status=st.sampled_from([200, 200, 429, 499, 500]),
        prompt_tokens=st.integers(0, 10**6),
        cached_tokens=st.integers(0, 1000),
        completion_tokens=st.integers(0, 10**6),
        finish_reasons=st.lists(st.sampled_from(["stop", "length", "abort", "tool_calls"]), max_size=3).map(tuple),
        ttft=st.one_of(st.none(), st.floats(0, 1000)),
        duration=st.one_of(st.none(), st.floats(0, 1000)),
    ),
    max_size=30,
)


@given(usages, st.booleans())
def test_a36_counters_equal_the_sum_of_usages(usages: list[Usage], by_client: bool) -> None:
    metrics = Metrics(MetricOptions(by_client=by_client), "m")
    for usage in usages:
        metrics.count(usage)
    found = read(metrics.render(ServiceStats()))
    reasons = Counter(reason for usage in usages for reason in usage.finish_reasons)
    for prefix in ("nanoengine_", "vllm:"):
        for name, field in (("prompt_tokens", "prompt_tokens"), ("generation_tokens", "completion_tokens")):
            assert total(found, f"{prefix}{name}_total") == sum(getattr(usage, field) for usage in usages)
            for client in ("", "ann", "bob") if by_client else ():
                theirs = sum(getattr(usage, field) for usage in usages if usage.client == client)
                assert total(found, f"{prefix}{name}_total", client=client) == theirs
    assert total(found, "nanoengine_cached_tokens_total") == sum(usage.cached_tokens for usage in usages)
    for reason, count in reasons.items():
        assert total(found, "nanoengine_samples_total", finish_reason=reason) == count
        assert total(found, "vllm:request_success_total", finished_reason=reason) == count
    assert total(found, "nanoengine_requests_total") == len(usages)
    for status, count in Counter(usage.status for usage in usages).items():
        assert total(found, "nanoengine_requests_total", status=str(status)) == count
    first = [usage.ttft for usage in usages if usage.ttft is not None]
    assert total(found, "nanoengine_time_to_first_token_seconds_count") == len(first)
    assert total(found, "vllm:time_to_first_token_seconds_sum") == pytest.approx(sum(first))


def test_clients_are_labels_only_where_that_is_wanted() -> None:
    for by_client in (False, True):
        metrics = Metrics(MetricOptions(by_client=by_client), "m")
        metrics.count(Usage(client="ann", prompt_tokens=3, finish_reasons=("stop",)))
        assert (b"ann" in metrics.render(ServiceStats())) is by_client


NAMES_OF_VLLM = """
num_requests_running num_requests_waiting kv_cache_usage_perc gpu_cache_usage_perc prompt_tokens_total
generation_tokens_total request_success_total num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total
time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket e2e_request_latency_seconds_bucket
request_queue_time_seconds_bucket request_prompt_tokens_bucket request_generation_tokens_bucket"""


ENDS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_count", "_sum", "_bucket")}


def test_vllms_names_say_the_same_as_ours() -> None:
    stats = ServiceStats(running=3, waiting=4, num_blocks=8, free_blocks=2, prompt_tokens=9, prefix_hit_tokens=5)
    metrics = Metrics(MetricOptions(), "my-model")
    metrics.count(Usage(prompt_tokens=3, completion_tokens=4, finish_reasons=("stop",), ttft=0.2, duration=2.0))
    metrics.step(0.1, {0.02: 5, 0.3: 1}, [0.7])
    found = read(metrics.render(stats))
    for name in NAMES_OF_VLLM.split():
        assert f"vllm:{name}" in found, name
        assert all({("model_name", "my-model"), ("engine", "0")} <= labels for labels in found[f"vllm:{name}"])
    assert total(found, "vllm:num_requests_running") == 3
    assert total(found, "vllm:kv_cache_usage_perc") == total(found, "vllm:gpu_cache_usage_perc") == 0.75
    for metric in METRICS:
        for alias in metric.vllm:
            for end in ENDS[metric.kind]:
                ours, theirs = found[f"nanoengine_{metric.name}{end}"], found[f"vllm:{alias}{end}"]
                assert sorted(ours.values()) == sorted(theirs.values())
    alone = read(Metrics(MetricOptions(aliases=None), "m").render(stats))
    assert [name for name in alone if not name.startswith("nanoengine_")] == []


def test_the_counters_of_two_services_are_apart() -> None:
    one, other = Metrics(MetricOptions(), "m"), Metrics(MetricOptions(), "m")
    one.count(Usage(prompt_tokens=5))
    assert total(read(one.render(ServiceStats())), "nanoengine_prompt_tokens_total") == 5
    assert total(read(other.render(ServiceStats())), "nanoengine_prompt_tokens_total") == 0


def test_labels_that_anyone_may_make_up_do_not_grow_without_end() -> None:
    metrics = Metrics(MetricOptions(by_client=True), "m")
    for number in range(3000):
        metrics.count(Usage(client=f"c{number}", prompt_tokens=2))
    found = read(metrics.render(ServiceStats()))
    assert len(found["nanoengine_prompt_tokens_total"]) <= 1001
    assert total(found, "nanoengine_prompt_tokens_total") == 6000


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 9)), max_size=20))
def test_a_histogram_counts_each_value_in_its_bucket(values: list[tuple[float, int]]) -> None:
    histogram = Histogram((1.0, 10.0))
    for value, times in values:
        histogram.add(value, times)
    for (name, count), bound in zip(histogram.buckets(), (1.0, 10.0, float("inf")), strict=True):
        assert name == ("+Inf" if bound == float("inf") else repr(bound))
        assert count == sum(times for value, times in values if value <= bound)
    assert histogram.sum == pytest.approx(sum(value * times for value, times in values))


def test_the_step_loop_measures_steps_queue_and_tokens(tmp_path: Path) -> None:
    path = mock_model.write_mock_checkpoint(tmp_path, vocab_size=97, max_position_embeddings=256)
    options = ServiceOptions(limits=LimitOptions(), metrics=MetricOptions(), model_name="mock")
    assert ServiceOptions.from_json(options.to_json()) == options

    async def main(llm: LLM) -> bytes:
        service = service_of(llm, **parts_of(options))
        service.start()
        client = LocalClient(service)
        streams = [await client.add(request(f"r{i}", [1, 2, i], max_tokens=10)) for i in range(6)]
        await asyncio.gather(*map(whole, streams))
        await until(lambda: not service.stats().requests)
        await client.close()
        await asyncio.to_thread(service.stop)  # the last step is measured behind the delivery of its tokens
        return service.metrics()

    with LLM(
        path, attention="mock", plugins=[mock_model], load_format="dummy", max_num_seqs=2, device="cpu",
        num_gpu_blocks_override=64,
    ) as llm:  # fmt: skip
        found = read(asyncio.run(main(llm)))
    assert total(found, "nanoengine_queue_seconds_count") == 6
    assert total(found, "nanoengine_inter_token_seconds_count") == 6 * 9
    assert 10 <= total(found, "nanoengine_step_seconds_count") <= total(found, "nanoengine_steps_total")
    assert total(found, "nanoengine_prefix_cache_queries_total") == 18
    assert total(found, "nanoengine_running") == total(found, "nanoengine_kv_cache_usage") == 0


def test_the_server_section_has_limits_and_metrics() -> None:
    options = service_options(ServerConfig(limits=LimitOptions(max_queued_requests=5)), "folder/model")
    assert (options.limits, options.model_name) == (LimitOptions(max_queued_requests=5), "folder/model")
    assert service_options(ServerConfig(served_model_name=("a", "b")), "m").model_name == "a"


def test_a_service_without_options_counts_and_refuses_nothing() -> None:
    parts: dict[str, Any] = parts_of(ServiceOptions.from_json({}))
    assert parts == {}
