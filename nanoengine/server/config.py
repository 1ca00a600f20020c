"""The section `server` of a configuration. Imports no torch and nothing of HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanoengine.api.errors import ConfigError, shown

_DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartOptions:
    """What happens when the engine's process ends by itself.

    Attributes:
        policy: "on-failure": it is started again if it was killed or its exit status is not 0; "always": whatever the
            status; "never": the server ends, with exit status 1.
        max_restarts: most restarts within `window` seconds; one more failure ends the server.
        window: seconds, see `max_restarts`.
        backoff: seconds before the first restart; each further one within the window waits twice as long, at most 60 s.
    """

    policy: Literal["always", "never", "on-failure"] = "on-failure"
    max_restarts: int = 5
    window: float = 600.0
    backoff: float = 0.5

    def __post_init__(self) -> None:
        check_ranges("server.restart", self, max_restarts=(0, 1000), window=(1.0, _DAY), backoff=(0.0, 60.0))


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
        log_format: "text", or "json" for one object per line.
        log_level: the lowest level that is logged.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    startup_timeout: float = 1800.0
    health_deadline: float = 10.0
    drain_timeout: float = 25.0
    restart: RestartOptions = field(default_factory=RestartOptions)
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

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
        )


def check_ranges(section: str, options: Any, **ranges: tuple[float, float]) -> None:
    """Raises `ConfigError` that begins with the key, as in "server.port", for a value out of its range (inclusive)."""
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise ConfigError(f"{section}.{name} must be from {low:,g} to {high:,g}, not {value:,g}")


def server_config(sections: Mapping[str, Any]) -> ServerConfig:
    """The section of a configuration (`RunConfig.sections`), or the defaults."""
    found: ServerConfig = sections.get("server") or ServerConfig()
    return found
