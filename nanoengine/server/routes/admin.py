"""What an operator does: /admin/drain, /admin/abort, /admin/trace."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanoengine.server.context import Context
from nanoengine.server.errors import ApiError
from nanoengine.server.protocol.tokens import AbortRequest, DrainRequest, TraceRequest
from nanoengine.server.requests import body_schema


def admin_router(context: Context) -> APIRouter:
    router = APIRouter(prefix="/admin", tags=["admin"])

    @router.post("/drain", openapi_extra=body_schema(DrainRequest))
    async def drain(request: Request) -> dict[str, bool]:
        """Take no new requests, and wait for the open ones. drained: all have ended in time."""
        body = await context.read(request, DrainRequest)
        return {"drained": await context.client.drain(body.seconds)}

    @router.post("/abort", openapi_extra=body_schema(AbortRequest))
    async def abort(request: Request) -> dict[str, int]:
        """End all requests of this id. Their clients get what there is, with the reason "abort"."""
        body = await context.read(request, AbortRequest)
        aborted = await context.client.abort(body.request_id)
        if not aborted:
            raise ApiError(404, f"no request of the id {body.request_id!r} is running", "not_found", "request_id")
        return {"aborted": aborted}

    @router.post("/trace", openapi_extra=body_schema(TraceRequest))
    async def trace(request: Request) -> Response:
        """The engine's steps of some seconds, for chrome://tracing or Perfetto."""
        body = await context.read(request, TraceRequest)
        return Response(await context.client.trace(body.seconds), media_type="application/json")

    return router
