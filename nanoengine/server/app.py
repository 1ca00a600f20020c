"""The HTTP application: what serves an `EngineClient` by OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from nanoengine.api.errors import NanoEngineError, nearest
from nanoengine.server.config import ServerConfig
from nanoengine.server.context import Context
from nanoengine.server.errors import ApiError, api_error, body_of, shortened
from nanoengine.server.field_names import FIELD_NAMES, FieldNames
from nanoengine.server.parsing import Parsers
from nanoengine.server.protocol.base import RequestModel
from nanoengine.server.protocol.chat import ChatRequest
from nanoengine.server.protocol.completions import CompletionRequest
from nanoengine.server.protocol.generate import with_sampling
from nanoengine.server.protocol.messages import CountRequest, MessagesRequest
from nanoengine.server.protocol.pooling import EmbeddingRequest, ScoreRequest
from nanoengine.server.protocol.responses import ResponsesRequest
from nanoengine.server.protocol.tokens import (
    AbortRequest,
    DetokenizeRequest,
    DrainRequest,
    TokenizeRequest,
    TraceRequest,
)
from nanoengine.server.requests import with_schemas
from nanoengine.server.routes.admin import admin_router
from nanoengine.server.routes.chat import chat_router
from nanoengine.server.routes.completions import completions_router
from nanoengine.server.routes.health import health_router
from nanoengine.server.routes.messages import messages_router
from nanoengine.server.routes.models import models_router
from nanoengine.server.routes.pooling import pooling_router
from nanoengine.server.routes.responses import responses_router
from nanoengine.server.routes.tokens import tokens_router
from nanoengine.service.client import EngineClient
from nanoengine.text import Tokenizer


def create_app(
    client: EngineClient, config: ServerConfig, tokenizer: Tokenizer | None, parsers: Parsers | None = None
) -> FastAPI:
    """The routes. What every request passes before them is `Gate`.

    Args:
        client: must be connected, as its `info` decides which fields requests may have.
        tokenizer: of the model; None: only token ids work.
        parsers: of tools and reasoning; None: none.
    """
    context = Context(
        client=client,
        config=config,
        tokenizer=tokenizer,
        parsers=parsers or Parsers(),
        pool=ThreadPoolExecutor(config.threads, thread_name_prefix="nanoengine-http"),
        long_pool=ThreadPoolExecutor(2, thread_name_prefix="nanoengine-http-long"),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for pool in (context.pool, context.long_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="nanoengine",
        lifespan=lifespan,
        description="An engine behind OpenAI's and Anthropic's APIs.",
        redirect_slashes=False,  # a redirect would name the host and the scheme that a client, or a proxy, made up
    )
    app.state.context = context
    names = context.client.info.sampling_names
    chat, completion = with_sampling(ChatRequest, names), with_sampling(CompletionRequest, names)
    routers = _routers(context, chat, completion)
    app.router.routes += [
        _Direct(route)
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and _is_direct(route)
    ]
    for router in routers:
        app.include_router(router)
    app.state.paths = [route.path for router in routers for route in router.routes if isinstance(route, Route)]
    plain: list[type[RequestModel]] = [EmbeddingRequest, ScoreRequest, TokenizeRequest, DetokenizeRequest]
    plain += [MessagesRequest, CountRequest, ResponsesRequest, AbortRequest, DrainRequest, TraceRequest]
    with_schemas(app, [chat, completion, *plain])
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(HTTPException, _failed)
    app.add_exception_handler(ApiError, _failed)
    app.add_exception_handler(NanoEngineError, _failed)
    return app


def _routers(context: Context, chat: type[ChatRequest], completion: type[CompletionRequest]) -> Sequence[APIRouter]:
    return (
        completions_router(context, completion),
        chat_router(context, chat),
        pooling_router(context),
        messages_router(context, chat),
        responses_router(context, chat),
        models_router(context),
        tokens_router(context),
        health_router(context),
        admin_router(context),
    )


def _is_direct(route: APIRoute) -> bool:
    """Whether its endpoint reads the request and makes the answer by itself."""
    given = inspect.signature(route.endpoint)
    return [*given.parameters] == ["request"] and given.return_annotation == "Response"


class _Direct(Route):
    """A route of FastAPI in which there is nothing for FastAPI to do: without that, a request is answered sooner. The
    page of the API has the other one, which comes behind it."""

    def __init__(self, route: APIRoute) -> None:
        super().__init__(route.path, route.endpoint, methods=list(route.methods or ()), include_in_schema=False)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self} if match is not Match.NONE else found


async def _failed(request: Request, raised: Exception) -> Response:
    error = _of_http(request, raised) if isinstance(raised, HTTPException) else api_error(raised)
    names: FieldNames | None = request.scope.get(FIELD_NAMES)
    error = error if names is None else names.named(error)
    return Response(body_of(request.url.path, error), error.status, error.headers, media_type="application/json")


def _of_http(request: Request, raised: HTTPException) -> ApiError:
    """What the framework itself refuses: an unknown path, a wrong method."""
    status, headers, path = raised.status_code, dict(raised.headers or {}), request.url.path
    if status == 404:
        return ApiError(
            404, f"no path {shortened(path, 200)!r} here: {nearest(path, request.app.state.paths)}", "not_found"
        )
    if status == 405:
        words = f"{path} does not take {shortened(request.method, 20)}, but {headers.get('Allow', 'another method')}"
        return ApiError(405, words, "method_not_allowed", headers=headers)
    return ApiError(status, str(raised.detail), "bad_request", headers=headers)
