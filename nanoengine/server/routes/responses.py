"""POST /v1/responses: OpenAI's API of items, of which nothing is stored."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanoengine.server.answers import Account, Answer
from nanoengine.server.context import Context, caller_of, request_id_of
from nanoengine.server.field_names import checked_chat
from nanoengine.server.protocol.chat import ChatRequest
from nanoengine.server.protocol.responses import ResponsesRequest
from nanoengine.server.render_responses import ResponseBody, ResponseStream
from nanoengine.server.requests import body_schema
from nanoengine.server.response_conversion import as_chat
from nanoengine.server.routes.chat import chat_generation

_SAMPLING = ("temperature", "top_p")


def responses_router(context: Context, model: type[ChatRequest]) -> APIRouter:
    """`model`: of a chat completion, which these requests become."""
    router = APIRouter(tags=["generate"])

    @router.post("/v1/responses", openapi_extra=body_schema(ResponsesRequest))
    async def responses(request: Request) -> Response:
        """Answer a conversation of items."""
        account = Account(context, caller_of(request).name, "/v1/responses")
        body = await context.read(request, ResponsesRequest)
        context.check_model(body.model)
        generation = await chat_generation(context, request, checked_chat(request.scope, model, as_chat(body)))
        request_id = request_id_of(request)
        defaults = {**dict.fromkeys(_SAMPLING, 1.0), **context.client.info.default_sampling}
        sampling = {name: defaults[name] if getattr(body, name) is None else getattr(body, name) for name in _SAMPLING}
        kind = ResponseStream if body.stream else ResponseBody
        renderer = kind(f"resp_{request_id}", account.created, context.names[0], body, sampling)
        return Answer(context, account, request_id, [generation], renderer, bool(body.stream))

    return router
