"""For probes and dashboards: /live, /ready, /health, /load, /metrics."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from nanoengine.server.context import Context
from nanoengine.server.errors import ApiError
from nanoengine.server.lifecycle import DRAINING, SHUTTING_DOWN

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def health_router(context: Context) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/live")
    async def live() -> dict[str, str]:
        """This process answers."""
        return {"status": "alive"}

    @router.get("/ready")
    async def ready() -> Response:
        """200: the engine takes requests. 503: it does not, and why."""
        health = context.client.health
        if not health.ready:
            raise _unavailable(health.reason or "the engine is not ready")
        return JSONResponse({"status": "ready"})

    @router.get("/health")
    async def health(request: Request) -> Response:
        """200: the engine makes progress, also while it drains or a long prompt is computed. 503: it does not."""
        found = context.client.health
        if not found.alive:
            raise _unavailable(found.reason or "the engine makes no progress")
        if request.scope.get(DRAINING):
            found = dataclasses.replace(found, ready=False, draining=True, reason=SHUTTING_DOWN)
        return JSONResponse({"status": "draining" if found.draining else "ok"} | dataclasses.asdict(found))

    @router.get("/load")
    async def load() -> dict[str, Any]:
        """Requests, tokens and KV blocks now."""
        stats = dataclasses.asdict(await context.client.stats())
        used = stats["num_blocks"] - stats["free_blocks"]
        return stats | {"kv_usage": used / stats["num_blocks"] if stats["num_blocks"] else 0.0}

    @router.get("/metrics")
    async def metrics() -> Response:
        """The counters of the engine, which are those of all HTTP processes, as Prometheus reads them."""
        return Response(await context.client.metrics(), headers={"content-type": METRICS_TYPE})

    return router


def _unavailable(reason: str) -> ApiError:
    return ApiError(503, reason, "unavailable", headers={"retry-after": "1"})
