"""The section `server` of a configuration. Imports no torch and nothing of HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanoengine.api.errors import ConfigError, shown
from nanoengine.params.field_types import Bytes
from nanoengine.service.options import LimitOptions, MetricOptions, ServiceOptions

_DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartOptions:
    """What happens when the engine's process ends by itself.

    Attributes:
        policy: "on-failure": it is started again if it was killed or its exit status is not 0; "always": whatever the
            status; "never": the server ends, with exit status 1.
        max_restarts: most restarts within `window` seconds; one more failure ends the server.
        window: seconds in which `max_restarts` are counted.
        backoff: seconds before the first restart; each further one within the window waits twice as long, at most 60 s.
        hang_timeout: an engine that makes no progress for so many seconds beyond `health_deadline` is killed, and then
            the policy holds. None: it is left alone, and /health says 503.
    """

    policy: Literal["always", "never", "on-failure"] = "on-failure"
    max_restarts: int = 10
    window: float = 600.0
    backoff: float = 0.5
    hang_timeout: float | None = 300.0

    def __post_init__(self) -> None:
        check_ranges(
            "server.restart",
            self,
            max_restarts=(0, 1000),
            window=(1.0, _DAY),
            backoff=(0.0, 60.0),
            hang_timeout=(1.0, _DAY),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """Spans of requests, for OpenTelemetry.

    Attributes:
        endpoint: where traces are sent, by OTLP over HTTP, as "http://collector:4318/v1/traces"; None: there are none.
            Headers for it, and what part is sampled, are in the variables of OpenTelemetry: OTEL_EXPORTER_OTLP_HEADERS,
            OTEL_TRACES_SAMPLER.
        service_name: the name of the service that sends traces.
    """

    endpoint: str | None = None
    service_name: str = "nanoengine"

    def __post_init__(self) -> None:
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"server.traces.endpoint must begin with http:// or https://, not be {shown(self.endpoint)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server runs.

    Attributes:
        host: address or name to bind; "0.0.0.0" and "::": all interfaces.
        port: TCP port; 0: any free one, which is logged.
        workers: number of HTTP processes, which render templates, tokenise, detokenise and parse.
        startup_timeout: seconds until the engine must be ready, loading and compilation included.
        health_deadline: seconds without progress of the engine after which it counts as hanging.
        drain_timeout: seconds that running requests have to end after SIGTERM; then they are aborted.
        restart: what happens when the engine's process ends by itself: see `RestartOptions`.
        limits: how much may wait: see `LimitOptions`.
        metrics: what /metrics has: see `MetricOptions`.
        traces: spans of requests: see `TraceOptions`.
        log_format: "text", or "json" for one object per line.
        log_level: the lowest level that is logged.
        served_model_name: names by which clients may ask for the model; answers say the first. (): the model's own.
        api_keys: the keys that clients may send, each as "NAME:sha256:HEX" or "sha256:HEX". Keys of the environment
            variable NANOENGINE_API_KEYS, as they are, with commas between them, are added. Without any key, every
            client may send requests.
        api_keys_file: a file with a key in each line: as in `api_keys`, or as it is, "NAME:KEY" or "KEY".
        cors_origins: origins whose pages may send requests, as "https://chat.example"; ("*",): all.
        max_body_bytes: most bytes of a request.
        ping_seconds: a stream gets a comment line after so many seconds without an event; 0: never.
        tool_parser, reasoning_parser: name of the plugin that finds tool calls, and reasoning, in an answer; "auto": by
            the chat template; None: the text stays as it is.
        max_n: most samples of a prompt; None: as many as the engine allows.
        max_prompts: most prompts of one request.
        max_logprobs: most log-probs at a position that a client may request; the engine's own limit holds too.
        special_tokens_in_content: "text": control tokens in the content of messages are plain text; "tokens": they are
            control tokens.
        request_timeout: seconds until a request must have started, if it does not say so itself; None: no limit.
        threads: threads of each HTTP process that tokenise and render templates.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    startup_timeout: float = 1800.0
    health_deadline: float = 10.0
    drain_timeout: float = 25.0
    restart: RestartOptions = field(default_factory=RestartOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)
    metrics: MetricOptions = field(default_factory=MetricOptions)
    traces: TraceOptions = field(default_factory=TraceOptions)
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    served_model_name: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    api_keys_file: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: Bytes = 8 << 20
    ping_seconds: float = 15.0
    tool_parser: str | None = "auto"
    reasoning_parser: str | None = "auto"
    max_n: int | None = None
    max_prompts: int = 1024
    max_logprobs: int = 20
    special_tokens_in_content: Literal["text", "tokens"] = "text"
    request_timeout: float | None = None
    threads: int = 4

    def __post_init__(self) -> None:
        if not self.host or self.host.strip() != self.host:
            raise ConfigError(f"server.host must be an address or a name, not {shown(self.host)}")
        check_ranges(
            "server",
            self,
            port=(0, 65_535),
            workers=(1, 64),
            startup_timeout=(1.0, _DAY),
            health_deadline=(1.0, _DAY),
            drain_timeout=(0.0, _DAY),
            max_body_bytes=(1024, 1 << 30),
            ping_seconds=(0.0, _DAY),
            max_n=(1, 1 << 16),
            max_prompts=(1, 1 << 16),
            max_logprobs=(0, 1 << 20),
            request_timeout=(0.001, _DAY),
            threads=(1, 256),
        )


def check_ranges(section: str, options: Any, **ranges: tuple[float, float]) -> None:
    """Raises `ConfigError` that begins with the key, as in "server.port", for a value out of its range (inclusive)."""
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise ConfigError(f"{section}.{name} must be from {low:,.15g} to {high:,.15g}, not {value:,.15g}")


def service_options(config: ServerConfig, model: str) -> ServiceOptions:
    """What the engine's process refuses and counts. `model`: its name where clients have none of theirs."""
    name = (*config.served_model_name, model)[0]
    return ServiceOptions(limits=config.limits, metrics=config.metrics, model_name=name)


def server_config(sections: Mapping[str, Any]) -> ServerConfig:
    """The section of a configuration (`RunConfig.sections`), or the defaults."""
    found: ServerConfig = sections.get("server") or ServerConfig()
    return found
