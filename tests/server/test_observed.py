"""What is seen of requests: a log line, the counters, a span. Never a prompt or an output."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from nanoengine.api.errors import ConfigError, RequestError
from nanoengine.observe.logs import JsonLines
from nanoengine.server.auth import VARIABLE, configured_keys
from nanoengine.server.config import ServerConfig, TraceOptions
from nanoengine.server.record import Observer, Record
from nanoengine.server.traces import DECODE, PREFILL, QUEUED, Traces
from nanoengine.service.client import ServiceStats
from nanoengine.service.metrics import Metrics
from nanoengine.service.options import MetricOptions
from tests.server.support import Server
from tests.service.test_metrics import read, total

SECRET = "xyzzy plugh"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
KEYS = configured_keys(ServerConfig(), {VARIABLE: "alice:sk-alice-123456"})
ALICE = {"authorization": "Bearer sk-alice-123456"}


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """The lines of the access log, as JSON."""
    found: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(JsonLines("http-0").format(record)))

    logger, handler = logging.getLogger("nanoengine.access"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def traced(**options: Any) -> tuple[Server, InMemorySpanExporter]:
    server, kept = Server(**options), InMemorySpanExporter()
    tracer = Traces(TraceOptions(service_name="tests"), SimpleSpanProcessor(kept))
    server.app._observer = Observer(server.engine, tracer)
    return server, kept


# -- logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_each_request_has_one_line_with_its_id_and_no_text(lines: list[dict[str, Any]], stream: bool) -> None:
    server = Server(f"yes {SECRET}", keys=KEYS)
    headers = {**ALICE, "x-request-id": "req-7"}
    messages = [{"role": "user", "content": SECRET}]
    response = server.post("/v1/chat/completions", {"messages": messages, "stream": stream}, headers=headers)
    assert response.status_code == 200
    (line,) = lines
    assert line["message"] == "POST /v1/chat/completions 200"
    assert (line["process"], line["level"], line["request_id"], line["client"]) == ("http-0", "info", "req-7", "alice")
    usage = server.engine.usages[-1]
    assert line["prompt_tokens"] == usage.prompt_tokens > 0
    assert line["completion_tokens"] == usage.completion_tokens > 0
    assert line["finish_reasons"] == "stop"
    assert 0 <= line["first_token_seconds"] <= line["seconds"]
    assert "xyzzy" not in json.dumps(line)


def test_what_is_refused_has_a_line_and_probes_have_none(lines: list[dict[str, Any]]) -> None:
    server = Server(keys=KEYS)
    for path in ("/live", "/ready"):
        server.request("GET", path)
    for path in ("/health", "/metrics", "/load"):
        server.request("GET", path, headers=ALICE)
    assert lines == []
    server.chat(SECRET)
    server.request("GET", f"/nope%0Aforged {'x' * 500}?q=xyzzy", headers=ALICE)
    assert [line["message"][:29] for line in lines] == [
        "POST /v1/chat/completions 401",
        "GET /nope%0Aforged%20xxxxxxxx",
    ]
    assert all(len(line["message"]) < 220 and "xyzzy" not in json.dumps(line) for line in lines)


# -- counters ---------------------------------------------------------------------------------------------------------


def test_a36_every_answer_is_counted_once_by_route_and_status() -> None:
    server = Server(keys=KEYS, config={"max_body_bytes": 2000})
    server.chat("hi")
    server.post("/v1/completions", {"prompt": "hi", "n": 2}, headers=ALICE)
    server.post("/v1/completions", {"prompt": "hi", "wrong": 1}, headers=ALICE)
    server.post("/v1/completions", {"prompt": "x" * 3000}, headers=ALICE)
    server.request("GET", "/v1/models/fake", headers=ALICE)
    for number in range(3):
        server.request("GET", f"/made/up/{number}", headers=ALICE)
    server.request("GET", "/live")
    found = [(usage.endpoint, usage.status) for usage in server.engine.usages]
    assert found == [
        ("other", 401),
        ("/v1/completions", 200),
        ("/v1/completions", 400),
        ("other", 413),
        ("/v1/models/{name:path}", 200),
        *[("other", 404)] * 3,
    ]
    metrics = Metrics(MetricOptions(), "m")
    for usage in server.engine.usages:
        metrics.count(usage)
    counted = read(metrics.render(ServiceStats()))
    assert total(counted, "nanoengine_requests_total") == len(found)
    assert total(counted, "nanoengine_requests_total", endpoint="/v1/completions", status="200") == 1
    assert total(counted, "nanoengine_samples_total") == 2


def test_what_is_observed_a_little_later_is_not_lost_when_the_process_ends(lines: list[dict[str, Any]]) -> None:
    """The server cancels what is open then."""
    server = Server()

    async def main() -> None:
        observer = Observer(server.engine)
        task = asyncio.create_task(observer.ended(Record(method="GET", path="/nope", status=404)))
        await asyncio.sleep(0)
        assert lines == [], "it was not later"
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())
    assert [line["message"] for line in lines] == ["GET /nope 404"]
    assert [usage.status for usage in server.engine.usages] == [404]


# -- spans ------------------------------------------------------------------------------------------------------------


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_its_times_and_no_text(stream: bool) -> None:
    server, kept = traced(says=f"yes {SECRET}", keys=KEYS)
    body = {"messages": [{"role": "user", "content": SECRET}], "temperature": 0.5, "max_tokens": 40, "stream": stream}
    headers = {**ALICE, "traceparent": PARENT, "x-request-id": "req-7"}
    assert server.post("/v1/chat/completions", body, headers=headers).status_code == 200
    (span,) = kept.get_finished_spans()
    assert span.name == "chat fake"
    assert span.resource.attributes["service.name"] == "tests"
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    found = attributes(span)
    usage = server.engine.usages[-1]
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nanoengine",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 40,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.response.finish_reasons": ("stop",),
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "nanoengine.request_id": "req-7",
        "nanoengine.client": "alice",
    }
    assert [event.name for event in span.events] == [QUEUED, PREFILL, DECODE]
    assert span.start_time is not None
    assert span.end_time is not None
    times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert times == sorted(times)
    assert "xyzzy" not in span.to_json()


@pytest.mark.parametrize("given", ["", "nonsense", PARENT[:-4], "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_traceparent_that_is_none_begins_a_trace(given: str) -> None:
    server, kept = traced()
    server.post("/v1/completions", {"prompt": "hi"}, headers={"traceparent": given})
    (span,) = kept.get_finished_spans()
    assert span.parent is None


def test_what_fails_is_a_span_with_its_status() -> None:
    def refused(request: Any) -> Any:
        raise RequestError("overloaded", "too much waits", 3.0)

    server, kept = traced(says=refused)
    assert server.complete("hi").status_code == 429
    assert server.post("/v1/completions", {"prompt": SECRET, "xyzzy": 1}).status_code == 400
    server.engine.die()
    assert server.complete("hi").status_code == 503
    server.request("GET", "/v1/models")
    spans = kept.get_finished_spans()
    assert [attributes(span)["error.type"] for span in spans] == ["429", "400", "503"]
    assert [span.status.status_code.name for span in spans] == ["UNSET", "UNSET", "ERROR"]
    assert all("xyzzy" not in span.to_json() for span in spans)


def test_an_endpoint_that_is_no_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"server\.traces\.endpoint must begin with http"):
        replace(ServerConfig(), traces=TraceOptions(endpoint="collector:4318"))
