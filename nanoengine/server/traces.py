"""A span for each request, by OpenTelemetry's conventions for generative AI. Needs the extra `otel`. Never a prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nanoengine.server.config import TraceOptions
from nanoengine.server.record import Record

OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/score": "embeddings",
}
"""Endpoint -> gen_ai.operation.name. Other paths have no spans."""

REQUEST: Mapping[str, str] = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
}
"""Field of `SamplingParams` -> attribute of the span."""

USAGE: Mapping[str, str] = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
}
"""Field of `Usage` -> attribute of the span."""

QUEUED, PREFILL, DECODE = "queued", "prefill", "decode"
"""Events of a span: the request came, its prompt began to be computed, its first token was there."""

_CARRIER = (b"traceparent", b"tracestate")


class Traces:
    """Makes spans and sends them, in the background. `close` sends what is left."""

    def __init__(self, options: TraceOptions, processor: SpanProcessor | None = None) -> None:
        """processor: what takes the spans; default: batches for the collector at `options.endpoint`."""
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: options.service_name}))
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter(endpoint=options.endpoint)))
        self._tracer = self._provider.get_tracer("nanoengine")
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, record: Record) -> None:
        """Makes a span of a request that has ended, as a child of that of its W3C header `traceparent`."""
        operation = OPERATIONS.get(record.path)
        if operation is None:
            return
        to_epoch = time.time() - time.monotonic()

        def nanoseconds(seconds: float) -> int:
            return int((seconds + to_epoch) * 1e9)

        span = self._tracer.start_span(
            f"{operation} {record.model}".rstrip(),
            context=self._parent(record.headers),
            kind=SpanKind.SERVER,
            attributes=_attributes(operation, record),
            start_time=nanoseconds(record.started),
        )
        events = ((QUEUED, record.started), (PREFILL, record.first_scheduled), (DECODE, record.first_token))
        for name, at in events if record.usage is not None else ():
            if at is not None:
                span.add_event(name, timestamp=nanoseconds(at))
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(nanoseconds(record.ended))

    def _parent(self, headers: Mapping[bytes, bytes]) -> Context:
        """What is not well-formed counts as absent."""
        carrier = {name.decode(): headers[name].decode("latin-1") for name in _CARRIER if name in headers}
        return self._propagator.extract(carrier, Context())

    def close(self) -> None:
        """Blocks until the spans are sent, or the collector does not take them."""
        self._provider.shutdown()


def _attributes(operation: str, record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "nanoengine",
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "nanoengine.request_id": record.request_id,
    }
    if record.model:
        found["gen_ai.request.model"] = found["gen_ai.response.model"] = record.model
    if record.client:
        found["nanoengine.client"] = record.client
    if record.status >= 400:
        found["error.type"] = str(record.status)
    for name, attribute in REQUEST.items():
        value = record.params.get(name)
        if value is not None:
            found[attribute] = value
    if record.usage is not None:
        found |= {attribute: getattr(record.usage, name) for name, attribute in USAGE.items()}
    return found
