"""The requests of /v1/embeddings and /v1/score."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from nanoengine.server.protocol.base import Name, RequestModel

PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
"""The fields that hold what is scored: one pair of them."""


class PoolingRequest(RequestModel):
    """What both have in common.

    pooling: "mean" or "last"; default: the model's. add_special_tokens: default true.
    """

    not_supported: ClassVar = {
        "truncate_prompt_tokens": "a prompt that is too long is refused; shorten it",
        "truncation_side": "a prompt that is too long is refused; shorten it",
        "padding": "prompts are not padded",
        "messages": "apply the chat template with /tokenize, and give its token ids",
        "mm_processor_kwargs": "prompts are text",
        "stream": "the answer comes at once",
    }

    model: str | None = None
    user: Name | None = None
    pooling: Literal["mean", "last"] | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    timeout: float | None = None


class EmbeddingRequest(PoolingRequest):
    """OpenAI's embedding request. normalize: scale vectors to length 1; default: as the model's files say."""

    not_supported: ClassVar = {
        **PoolingRequest.not_supported,
        "embed_dtype": "numbers are float32",
        "endianness": "base64 is of little-endian float32",
        "use_activation": "here it is called normalize",
        "prompt": "here it is called input",
        "text": "here it is called input",
    }

    input: Any = None  # checked by hand, as the prompt of completions
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None


class ScoreRequest(PoolingRequest):
    """vLLM's score request: two fields of one of the pairs. The first has one text, or as many as the second."""

    not_supported: ClassVar = {
        **PoolingRequest.not_supported,
        "use_activation": "a score is a cosine",
        "softmax": "a score is a cosine",
        "query": "here it is called queries",
    }

    text_1: Any = None
    text_2: Any = None
    queries: Any = None
    documents: Any = None
    items: Any = None
    data_1: Any = None
    data_2: Any = None
