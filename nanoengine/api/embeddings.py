"""What a caller gets of requests that pool: embeddings, and scores of pairs of them."""

from __future__ import annotations

from dataclasses import dataclass

from nanoengine.api.deltas import Float32
from nanoengine.api.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOutput:
    """The embedding of one prompt. If the request was refused or failed: `error`, and no `embedding`.

    Attributes:
        prompt: its text, if it is known.
        embedding: float32 [hidden size], or shorter where `dimensions` were asked for; it cannot be written.
        num_cached_tokens: prompt tokens whose KV the prefix cache held.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    embedding: Float32 | None = None
    num_cached_tokens: int = 0
    error: RequestError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOutput:
    """How similar two prompts are: the cosine of their embeddings, from -1 to 1. If one of them was refused or failed:
    `error`, and no `score`.

    Attributes:
        prompt_token_ids: of both prompts.
    """

    score: float | None
    prompt_token_ids: tuple[tuple[int, ...], tuple[int, ...]]
    error: RequestError | None = None
