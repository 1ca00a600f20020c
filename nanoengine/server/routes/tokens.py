"""/tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanoengine.api.errors import RequestError
from nanoengine.params.arguments import in_vocabulary
from nanoengine.server.chunks import encode
from nanoengine.server.context import Context
from nanoengine.server.errors import invalid
from nanoengine.server.prompts import rendered, template_options
from nanoengine.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from nanoengine.server.requests import body_schema

_PART = 10_000


def tokens_router(context: Context) -> APIRouter:
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize", openapi_extra=body_schema(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or a conversation."""
        body = await context.read(request, TokenizeRequest)
        context.check_model(body.model)
        ids = await _ids(context, body)
        tokenizer, most = context.need_tokenizer(), context.client.info.max_model_len

        def answer() -> bytes:
            strings = [tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
            head = encode({"count": len(ids), "max_model_len": most, "token_strs": strings})[:-1]
            # In parts, so that the event loop can run between them.
            parts = [encode(ids[start : start + _PART])[1:-1] for start in range(0, len(ids), _PART)]
            return head + b',"tokens":[' + b",".join(parts) + b"]}"

        return Response(await context.in_thread(answer, len(ids)), media_type="application/json")

    @router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, str]:
        """The text of token ids; special tokens too, except with skip_special_tokens."""
        body = await context.read(request, DetokenizeRequest)
        context.check_model(body.model)
        tokenizer = context.need_tokenizer()
        found = in_vocabulary(body.tokens, context.client.info.vocab_size, "tokens", "invalid_value")
        if isinstance(found, RequestError):
            raise found
        skip = bool(body.skip_special_tokens)
        work = partial(tokenizer.decode, body.tokens, skip_special_tokens=skip)
        return {"prompt": await context.in_thread(work, len(body.tokens))}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Special tokens, the chat template and the class, as clients need them to make prompts."""
        return context.need_tokenizer().description() | {"max_model_len": context.client.info.max_model_len}

    return router


async def _ids(context: Context, body: TokenizeRequest) -> Sequence[int]:
    tokenizer = context.need_tokenizer()
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give prompt, a text, or messages, a conversation", "prompt")
    if body.messages is None:
        text, special = body.prompt or "", body.add_special_tokens is not False
        chat = ("add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template_kwargs")
        wrong = next((name for name in chat if body.given(name)), None)
        if wrong is not None:
            raise invalid(f"{wrong} is for messages; leave it out", wrong)
        return await context.in_thread(lambda: tokenizer.encode(text, add_special_tokens=special), len(text))
    if body.add_special_tokens:
        raise invalid("the template writes the special tokens: leave add_special_tokens out", "add_special_tokens")
    options = template_options(
        kwargs=body.chat_template_kwargs,
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    ids, _ = await rendered(context, body.messages, options)
    return ids
