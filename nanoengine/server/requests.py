"""What all endpoints read of a request beside its model, and how the OpenAPI page shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.requests import Request

from nanoengine.server.context import Context, caller_of
from nanoengine.server.errors import invalid, shortened
from nanoengine.server.protocol.base import RequestModel
from nanoengine.server.protocol.generate import GenerateRequest

_REF = "#/components/schemas/{model}"
_DAY = 86_400.0


def run_fields(context: Context, request: Request, body: GenerateRequest) -> dict[str, Any]:
    """client, timeout and progress of a `Generation`. Raises `ApiError`."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is for stream: true; leave it out", "stream_options")
    if body.return_progress and not body.stream:
        raise invalid("return_progress is for stream: true; leave it out", "return_progress")
    caller = caller_of(request)
    return {
        "client": caller.name or body.user or "",
        "timeout": timeout_of(request, body.timeout, context.config.request_timeout),
        "progress": bool(body.return_progress),
    }


def timeout_of(request: Request, given: float | None, otherwise: float | None) -> float | None:
    """Seconds until the request must have started: the field `timeout`, or the header X-Request-Timeout."""
    header = request.headers.get("x-request-timeout")
    if given is None and header is None:
        return otherwise
    try:
        seconds = float(header or "") if given is None else given
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _DAY:
        shown = given if given is not None else shortened(header or "", 50)
        raise invalid(f"timeout must be a number of seconds above 0, at most {_DAY:g}, not {shown!r}", "timeout")
    return seconds


def body_schema(model: type[RequestModel]) -> dict[str, Any]:
    """What a route needs so that the OpenAPI page shows its body. We read bodies ourselves, with limits."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def with_schemas(app: FastAPI, models: list[type[RequestModel]]) -> None:
    """Lets the page of `app` have the models that `body_schema` names."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, found = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
            schemas: Mapping[str, Any] = found.get("$defs", {})
            page.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
            page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            page["security"] = [{}, {"key": []}]  # without one, where the server has none
            app.openapi_schema = page
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
