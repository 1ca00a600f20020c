"""Options of a service. Imports no torch and no library of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nanoengine.api.errors import ConfigError
from nanoengine.params.field_types import conform

_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """How much may wait: requests that have not started, those whose constraint is being compiled included.

    A request with n samples counts as n requests, and its prompt n times. One that finds the queue empty is taken,
    whatever its size.

    Attributes:
        max_queued_requests: most requests that wait; None: no limit.
        max_queued_tokens: most tokens of the prompts of requests that wait; None: no limit.
        max_queued_per_client: most requests of one client that wait; None: no limit.
    """

    max_queued_requests: int | None = 4096
    max_queued_tokens: int | None = 4 << 20
    max_queued_per_client: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_queued_requests", "max_queued_tokens", "max_queued_per_client"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MOST:
                raise ConfigError(f"server.limits.{name} must be from 1 to {_MOST:,}, not {value:,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricOptions:
    """What /metrics has.

    Attributes:
        aliases: "vllm": vLLM's names too, for dashboards and routers that know them; None: nanoengine's alone.
        by_client: split requests and tokens by client, which is the name of an API key.
    """

    aliases: Literal["vllm"] | None = "vllm"
    by_client: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """What a service refuses and counts.

    Attributes:
        limits: None: it refuses nothing. metrics: None: it counts nothing. model_name: a label of metrics.
    """

    limits: LimitOptions | None = None
    metrics: MetricOptions | None = None
    model_name: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ServiceOptions:
        options: ServiceOptions = conform("service", found, cls)
        return options
