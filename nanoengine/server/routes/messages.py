"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanoengine.server.answers import Account, Answer
from nanoengine.server.context import Context, caller_of, request_id_of
from nanoengine.server.field_names import checked_chat
from nanoengine.server.message_conversion import as_chat
from nanoengine.server.prompts import rendered
from nanoengine.server.protocol.chat import ChatRequest
from nanoengine.server.protocol.messages import CountRequest, MessagesRequest
from nanoengine.server.render_messages import MessageBody, MessageStream
from nanoengine.server.requests import body_schema
from nanoengine.server.routes.chat import chat_generation, chat_options, template_tools


def messages_router(context: Context, model: type[ChatRequest]) -> APIRouter:
    """`model`: of a chat completion, which these requests become."""
    router = APIRouter(tags=["generate"])

    @router.post("/v1/messages", openapi_extra=body_schema(MessagesRequest))
    async def messages(request: Request) -> Response:
        """Answer a conversation, in Anthropic's shape."""
        account = Account(context, caller_of(request).name, "/v1/messages")
        body = await context.read(request, MessagesRequest)
        context.check_model(body.model)
        chat = checked_chat(request.scope, model, as_chat(body))
        generation = await chat_generation(context, request, chat, must_fit=False)
        request_id = request_id_of(request)
        kind = MessageStream if body.stream else MessageBody
        renderer = kind(f"msg_{request_id}", context.names[0], body.max_tokens, chat.include_reasoning is not False)
        return Answer(context, account, request_id, [generation], renderer, bool(body.stream))

    @router.post("/v1/messages/count_tokens", openapi_extra=body_schema(CountRequest))
    async def count_tokens(request: Request) -> dict[str, int]:
        """The number of tokens of a conversation as a prompt."""
        body = await context.read(request, CountRequest)
        context.check_model(body.model)
        chat = checked_chat(request.scope, model, as_chat(body))
        ids, _ = await rendered(context, chat.messages, chat_options(chat, template_tools(chat)))
        return {"input_tokens": len(ids)}

    return router
