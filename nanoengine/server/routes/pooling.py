"""POST /v1/embeddings and /v1/score."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from nanoengine.api.deltas import Float32
from nanoengine.api.embeddings import cosine
from nanoengine.params.pooling import PoolingChoice, choose_pooling, pairs
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.server.answers import Account, Answer, usage_of
from nanoengine.server.chunks import encode
from nanoengine.server.context import Context, caller_of, engine_id, request_id_of
from nanoengine.server.errors import ApiError, invalid
from nanoengine.server.events import Generation, Running, Update
from nanoengine.server.parameters import cache_salt, checked_priority
from nanoengine.server.prompts import Prompt, completion_prompts
from nanoengine.server.protocol.pooling import PAIRS, EmbeddingRequest, PoolingRequest, ScoreRequest
from nanoengine.server.requests import body_schema, timeout_of

Vectors = Sequence[Float32]


def pooling_router(context: Context) -> APIRouter:
    router = APIRouter(tags=["pooling"])

    @router.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """A vector for each input."""
        account = Account(context, caller_of(request).name, "/v1/embeddings")
        body = await context.read(request, EmbeddingRequest)
        choice = _choice(context, body, normalize=body.normalize, dimensions=body.dimensions)
        prompts = await _prompts(context, body, "input")
        as_base64 = body.encoding_format == "base64"

        def data(vectors: Vectors) -> list[Any]:
            return [
                {"object": "embedding", "index": i, "embedding": _base64(each) if as_base64 else _numbers(each)}
                for i, each in enumerate(vectors)
            ]

        return _answer(context, request, body, account, "embd", prompts, choice, data)

    @router.post("/v1/score", openapi_extra=body_schema(ScoreRequest))
    async def score(request: Request) -> Response:
        """How similar texts are: the cosine of the embeddings of one and each of several, or of each and its own."""
        account = Account(context, caller_of(request).name, "/v1/score")
        body = await context.read(request, ScoreRequest)
        choice, names = _choice(context, body, normalize=False), _names(body)
        first, second = [await _prompts(context, body, name) for name in names]
        pairs(first, second, names)  # raises before anything runs

        def data(vectors: Vectors) -> list[Any]:
            scored = pairs(vectors[: len(first)], vectors[len(first) :], names)
            return [{"object": "score", "index": i, "score": cosine(*pair)} for i, pair in enumerate(scored)]

        return _answer(context, request, body, account, "score", first + second, choice, data)

    return router


def _choice(context: Context, body: PoolingRequest, **given: Any) -> PoolingChoice:
    """Raises `ApiError` or `ParamsError`."""
    context.check_model(body.model)
    info = context.client.info
    if info.pooling is None:
        raise invalid("this engine makes no embeddings", code="not_supported")
    return choose_pooling(info.pooling, body.pooling, **given)


async def _prompts(context: Context, body: PoolingRequest, name: str) -> list[Prompt]:
    special = body.add_special_tokens is not False
    return await completion_prompts(context, getattr(body, name), special, name=name, new_tokens=0)


def _names(body: ScoreRequest) -> tuple[str, str]:
    """The pair of fields that was given. Raises `ApiError`."""
    given = {name for pair in PAIRS for name in pair if body.given(name)}
    for pair in PAIRS:
        if given == set(pair):
            return pair
    valid = "; ".join(" and ".join(pair) for pair in PAIRS)
    found = ", ".join(sorted(given)) or "none of them"
    param = min(given, default=PAIRS[0][0])
    raise invalid(
        f"give one pair of fields ({valid}), not {found}", param, "invalid_value" if given else "missing_field"
    )


def _answer(
    context: Context,
    request: Request,
    body: PoolingRequest,
    account: Account,
    prefix: str,
    prompts: Sequence[Prompt],
    choice: PoolingChoice,
    data: Callable[[Vectors], list[Any]],
) -> Response:
    caller, request_id = caller_of(request), request_id_of(request, body.request_id)
    params = SamplingParams(cache_salt=cache_salt(body.cache_salt, caller.secret))
    generations = [
        Generation(
            request_id=engine_id(request_id),
            prompt_token_ids=prompt.token_ids,
            params=params,
            priority=checked_priority(body, context.client.info),
            pooling=choice.pooling,
            client=caller.name or body.user or "",
            timeout=timeout_of(request, body.timeout, context.config.request_timeout),
        )
        for number, prompt in enumerate(prompts)
    ]
    head = {"id": f"{prefix}-{request_id}", "created": account.created, "model": context.names[0]}
    renderer = _Body(choice, data, head)
    return Answer(context, account, request_id, generations, renderer, stream=False)


@dataclass(frozen=True, slots=True)
class _Body:
    """A `Renderer` of vectors. `data`: what the list of the answer holds. `head`: its first fields."""

    choice: PoolingChoice
    data: Callable[[Vectors], list[Any]]
    head: dict[str, Any]

    def take(self, number: int, run: Running, update: Update) -> bytes:
        return b""

    def end(self, runs: Sequence[Running]) -> bytes:
        vectors = [self.choice.finish(run.pooled) for run in runs if run.pooled is not None]
        if len(vectors) < len(runs):
            raise ApiError(503, "the request was aborted before it had ended", "aborted")
        usage = usage_of(runs)
        fields = {
            "prompt_tokens": usage.prompt_tokens,
            "total_tokens": usage.prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }
        return encode({**self.head, "object": "list", "data": self.data(vectors), "usage": fields})

    def failed(self, error: ApiError) -> bytes:
        raise AssertionError("nothing is streamed")


def _base64(vector: Float32) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _numbers(vector: Float32) -> msgspec.Raw:
    """As JSON already, so that not all numbers of an answer are Python objects at once."""
    return msgspec.Raw(encode(vector.tolist()))
