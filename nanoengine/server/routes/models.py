"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from nanoengine.server.context import Context


def models_router(context: Context) -> APIRouter:
    router = APIRouter(tags=["models"])

    def entry(name: str) -> dict[str, Any]:
        info = context.client.info
        return {
            "id": name,
            "object": "model",
            "created": context.started,
            "owned_by": "nanoengine",
            "root": info.model,
            "parent": None,
            "max_model_len": info.max_model_len,
        }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, under each of its names."""
        return {"object": "list", "data": [entry(name) for name in context.names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model by one of its names."""
        context.check_model(name)
        return entry(name)

    return router
