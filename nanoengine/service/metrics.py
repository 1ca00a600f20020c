"""The service's counters, as Prometheus reads them. They belong to one service, and live in the engine's process."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from nanoengine.service.client import ServiceStats, Usage
from nanoengine.service.metric_names import METRICS, Metric, bounds_of
from nanoengine.service.options import MetricOptions

Labels = tuple[str, ...]
_MOST_SERIES = 1000  # of a counter: what else comes is counted together
_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


class Histogram:
    """Counts of values at most each bound, and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        names = [*map(repr, self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))

    @property
    def sum(self) -> float:
        return self._sum


class Metrics:
    """The counters of one service. Any thread may call it."""

    def __init__(self, options: MetricOptions, model: str) -> None:
        """`model`: its name, a label where vLLM has one."""
        self._options, self._model = options, model
        self._lock = threading.Lock()
        self._counts = {metric.name: Counter[Labels]() for metric in METRICS if metric.kind == "counter"}
        self._histograms = {m.name: Histogram(bounds_of(m)) for m in METRICS if m.kind == "histogram"}

    # What is counted

    def count(self, usage: Usage) -> None:
        """A request of HTTP that has ended."""
        with self._lock:
            client = (usage.client,) if self._options.by_client else ()
            self._add("requests", (usage.endpoint, str(usage.status), *client), 1)
            for reason in usage.finish_reasons:
                self._add("samples", (reason, *client), 1)
            self._add("prompt_tokens", client, usage.prompt_tokens)
            self._add("cached_tokens", client, usage.cached_tokens)
            self._add("generation_tokens", client, usage.completion_tokens)
            if usage.prompt_tokens:
                self._histograms["request_prompt_tokens"].add(usage.prompt_tokens)
                self._histograms["request_generation_tokens"].add(usage.completion_tokens)
            if usage.ttft is not None:
                self._histograms["time_to_first_token_seconds"].add(usage.ttft)
            if usage.duration is not None and usage.prompt_tokens:
                self._histograms["request_seconds"].add(usage.duration)

    def _add(self, name: str, labels: Labels, value: int) -> None:
        counts = self._counts[name]
        if labels not in counts and len(counts) >= _MOST_SERIES:
            labels = ("other",) * len(labels)
        counts[labels] += value

    def step(self, seconds: float, gaps: Mapping[float, int], queued: Sequence[float]) -> None:
        """A turn of the step loop. gaps: seconds since a request had tokens before -> how many requests; queued:
        seconds that requests waited which have tokens for the first time."""
        with self._lock:
            self._histograms["step_seconds"].add(seconds)
            for gap, times in gaps.items():
                self._histograms["inter_token_seconds"].add(gap, times)
            for waited in queued:
                self._histograms["queue_seconds"].add(waited)

    # What is read

    def render(self, stats: ServiceStats) -> bytes:
        """All counters, in Prometheus' text format."""
        with self._lock:
            families = list(self._families(stats))
        return generate_latest(_Families(families))

    def _families(self, stats: ServiceStats) -> Iterator[Family]:
        now = _values_of(stats)
        for metric in METRICS:
            labels = (*metric.labels, "client") if metric.by_client and self._options.by_client else metric.labels
            own = _family(f"nanoengine_{metric.name}", metric, labels)
            self._fill(own, metric, now, ())
            yield own
            for alias in metric.vllm if self._options.aliases == "vllm" else ():
                theirs = (*(metric.vllm_labels or metric.labels), *labels[len(metric.labels) :])
                family = _family(f"vllm:{alias}", metric, ("model_name", "engine", *theirs))
                self._fill(family, metric, now, (self._model, "0"))
                yield family

    def _fill(self, family: Family, metric: Metric, now: Mapping[str, float], first: Labels) -> None:
        if isinstance(family, HistogramMetricFamily):
            found = self._histograms[metric.name]
            family.add_metric(first, found.buckets(), found.sum)
            return
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
        if metric.name in now:
            family.add_metric(first, now[metric.name])
            return
        counts: Mapping[Labels, float] = self._counts[metric.name]
        if not counts and not metric.labels and not (metric.by_client and self._options.by_client):
            counts = {(): 0}  # a counter without labels is there from the beginning
        for labels, value in counts.items():
            family.add_metric([*first, *labels], value)


class _Families(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._found = families

    def collect(self) -> Iterable[Family]:
        return self._found


def _family(name: str, metric: Metric, labels: Labels) -> Family:
    found: Family = _FAMILIES[metric.kind](name, metric.text, labels=labels)
    return found


def _values_of(stats: ServiceStats) -> Mapping[str, float]:
    """The metrics that the service's stats have."""
    return {
        "steps": stats.steps,
        "preemptions": stats.preemptions,
        "prefix_cache_queries": stats.prompt_tokens,
        "prefix_cache_hits": stats.prefix_hit_tokens,
        "draft_tokens": stats.drafted,
        "accepted_draft_tokens": stats.accepted,
        "running": stats.running,
        "waiting": stats.waiting,
        "preparing": stats.preparing,
        "open_requests": stats.requests,
        "queued_requests": stats.queued_requests,
        "queued_tokens": stats.queued_tokens,
        "kv_cache_usage": 1 - stats.free_blocks / stats.num_blocks if stats.num_blocks else 0.0,
        "draining": float(stats.draining),
        "uptime_seconds": stats.uptime,
    }
