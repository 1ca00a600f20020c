"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanoengine.server.answers import Account, Answer
from nanoengine.server.context import Context, caller_of, engine_id, request_id_of
from nanoengine.server.errors import invalid
from nanoengine.server.events import Generation
from nanoengine.server.logprobs import TokenTexts
from nanoengine.server.parameters import checked_logprobs, checked_priority, sampling_params
from nanoengine.server.prompts import Prompt, check_room, completion_prompts
from nanoengine.server.protocol.completions import CompletionRequest
from nanoengine.server.protocol.generate import constraint_of
from nanoengine.server.render_completions import CompletionBody, CompletionStream, CompletionStyle
from nanoengine.server.requests import body_schema, run_fields


def completions_router(context: Context, model: type[CompletionRequest]) -> APIRouter:
    router = APIRouter(tags=["generate"])

    @router.post("/v1/completions", openapi_extra=body_schema(model))
    async def completions(request: Request) -> Response:
        """Continue one text or several."""
        account = Account(context, caller_of(request).name, "/v1/completions")
        body = await context.read(request, model)
        return await _answer(context, request, body, account)

    return router


async def _answer(context: Context, request: Request, body: CompletionRequest, account: Account) -> Response:
    context.check_model(body.model)
    info, config, caller = context.client.info, context.config, caller_of(request)
    own = _own(body, context)
    nothing_new = body.max_tokens == 0
    if nothing_new:
        own["max_tokens"], own["min_tokens"] = 1, 0
    params = sampling_params(body, info, config, caller.secret, constraint_of(body), own)
    run = run_fields(context, request, body)
    prompts = await completion_prompts(context, body.prompt, body.add_special_tokens is not False)
    for prompt in prompts:
        check_room(context, prompt, body.max_tokens, "max_tokens")
    request_id = request_id_of(request, body.request_id)
    generations = [
        Generation(
            request_id=engine_id(request_id),
            prompt_token_ids=prompt.token_ids,
            params=params,
            prompt=prompt.text,
            nothing_new=nothing_new,
            priority=checked_priority(body, info),
            **run,
        )
        for number, prompt in enumerate(prompts)
    ]
    style = CompletionStyle(
        id=f"cmpl-{request_id}",
        created=account.created,
        model=context.names[0],
        request=body,
        texts=TokenTexts(context.tokenizer, bool(body.return_tokens_as_token_ids)),
        echo=[_echoed(context, prompt) for prompt in prompts] if body.echo else (),
    )
    renderer = CompletionStream(style) if body.stream else CompletionBody(style)
    return Answer(context, account, request_id, generations, renderer, bool(body.stream))


def _own(body: CompletionRequest, context: Context) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if body.max_tokens is not None:
        if body.max_tokens < 0:
            raise invalid(f"max_tokens must be at least 0, not {body.max_tokens}", "max_tokens")
        own["max_tokens"] = body.max_tokens
    if body.logprobs is not None:
        count = checked_logprobs("logprobs", body.logprobs, context.client.info, context.config)
        own["logprobs"] = count
        if body.echo and body.prompt_logprobs is None:
            own["prompt_logprobs"] = count
    return own


def _echoed(context: Context, prompt: Prompt) -> str:
    """The text of the prompt, of ids as the model reads them."""
    if prompt.text is not None:
        return prompt.text
    return "" if context.tokenizer is None else context.tokenizer.decode([*prompt.token_ids], skip_special_tokens=False)
