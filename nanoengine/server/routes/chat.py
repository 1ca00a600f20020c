"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nanoengine.api.structured_outputs import StructuredOutputsParams
from nanoengine.server.answers import Account, Answer
from nanoengine.server.context import Context, caller_of, engine_id, request_id_of
from nanoengine.server.errors import invalid
from nanoengine.server.events import Generation
from nanoengine.server.logprobs import TokenTexts
from nanoengine.server.parameters import checked_logprobs, checked_priority, sampling_params
from nanoengine.server.parsing import Parsing, parsing_of, tools_of
from nanoengine.server.prompts import chat_prompt, check_room, template_options
from nanoengine.server.protocol.chat import ChatRequest, NamedTool
from nanoengine.server.protocol.generate import constraint_of
from nanoengine.server.render_chat import ChatBody, ChatStream, ChatStyle
from nanoengine.server.requests import body_schema, run_fields


def chat_router(context: Context, model: type[ChatRequest]) -> APIRouter:
    router = APIRouter(tags=["generate"])

    @router.post("/v1/chat/completions", openapi_extra=body_schema(model))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        account = Account(context, caller_of(request).name, "/v1/chat/completions")
        body = await context.read(request, model)
        return await _answer(context, request, body, account)

    return router


async def _answer(context: Context, request: Request, body: ChatRequest, account: Account) -> Response:
    generation = await chat_generation(context, request, body)
    request_id = request_id_of(request)
    style = ChatStyle(
        id=f"chatcmpl-{request_id}",
        created=account.created,
        model=context.names[0],
        request=body,
        texts=TokenTexts(context.tokenizer, bool(body.return_tokens_as_token_ids)),
    )
    renderer = ChatStream(style) if body.stream else ChatBody(style)
    return Answer(context, account, request_id, [generation], renderer, bool(body.stream))


async def chat_generation(
    context: Context, request: Request, body: ChatRequest, *, must_fit: bool = True
) -> Generation:
    """What is to run for a conversation; other shapes of conversations are converted to this one first.

    must_fit: more tokens than have room behind the prompt are an error; False: the output ends where the context does.

    Raises `ApiError`, `ParamsError` or `RequestError`.
    """
    context.check_model(body.model)
    info = context.client.info
    parsing, tools = _parsing(context, body)
    own, constraint = _own(body, context, parsing), _constraint(body, parsing)
    run = run_fields(context, request, body)
    prompt = await chat_prompt(context, body.messages, chat_options(body, tools))
    if must_fit:
        name = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
        check_room(context, prompt, getattr(body, name), name)
    opened = parsing.opened(prompt.text or "", bool(body.continue_final_message))
    if constraint is not None:
        constraint = parsing.behind_reasoning(constraint, opened)
    params = sampling_params(body, info, context.config, caller_of(request).secret, constraint, own)
    request_id = request_id_of(request, body.request_id)
    return Generation(
        request_id=engine_id(request_id),
        prompt_token_ids=prompt.token_ids,
        params=params,
        parser=parsing.parser(opened, show_special=body.skip_special_tokens is False),
        priority=checked_priority(body, info),
        **run,
    )


def chat_options(body: ChatRequest, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Variables of the template. tools: those that it gets."""
    return template_options(
        kwargs=body.chat_template_kwargs,
        tools=tools,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        reasoning_effort=body.reasoning_effort,
    )


def template_tools(body: ChatRequest) -> list[dict[str, Any]]:
    """The tools that the template gets."""
    return [] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools or ()]


def _parsing(context: Context, body: ChatRequest) -> tuple[Parsing, list[dict[str, Any]]]:
    """How the output is parsed, and the tools that the template gets."""
    definitions = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    choice = None if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    if body.parallel_tool_calls is not None and not definitions:
        raise invalid("parallel_tool_calls is for tools, and there are none: leave it out", "parallel_tool_calls")
    if body.tool_choice not in (None, "none", "auto") and not definitions:
        raise invalid("tool_choice needs tools, and there are none", "tool_choice")
    parallel = body.parallel_tool_calls is not False
    parsing = parsing_of(context.parsers, context.tokenizer, tools_of(definitions), choice, named, parallel)
    return parsing, template_tools(body)


def _own(body: ChatRequest, context: Context, parsing: Parsing) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("max_tokens and max_completion_tokens are two names for one thing: give one", "max_tokens")
    most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if most is not None or "max_tokens" not in context.client.info.default_sampling:
        own["max_tokens"] = most
    if body.logprobs:
        own["logprobs"] = checked_logprobs("top_logprobs", body.top_logprobs or 0, context.client.info, context.config)
    elif body.top_logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if parsing.hidden:
        own["skip_special_tokens"] = False
    return own


def _constraint(body: ChatRequest, parsing: Parsing) -> StructuredOutputsParams | None:
    asked = constraint_of(body)
    if asked is not None and parsing.constraint is not None:
        raise invalid("a tool must be called, so nothing else can say what the output is", "tool_choice")
    return asked or parsing.constraint
