"""What a caller gets of requests that pool: embeddings, and scores of pairs of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from nanoengine.api.deltas import Float32, RequestDelta
from nanoengine.api.errors import RequestError
from nanoengine.api.outputs import ShortRepr


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class EmbeddingOutput(ShortRepr):
    """The embedding of one prompt. If the request was refused or failed: `error`, and no `embedding`; nor has one that
    was aborted.

    Attributes:
        request_id: the request's id.
        prompt: its text, if it is known.
        prompt_token_ids: the tokens of the prompt.
        embedding: float32 [hidden size], or shorter if `dimensions` were given; it cannot be written.
        num_cached_tokens: prompt tokens whose KV the prefix cache held.
        error: why it was refused or failed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    embedding: Float32 | None = None
    num_cached_tokens: int = 0
    error: RequestError | None = None

    def ended(self, last: RequestDelta, finish: Callable[[Float32], Float32]) -> EmbeddingOutput:
        """With what the request's last delta has. `finish`: makes the embedding of the pooled vector."""
        return replace(
            self,
            embedding=None if last.pooled is None else finish(last.pooled),
            num_cached_tokens=last.num_cached_tokens,
            error=last.error,
        )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ScoreOutput(ShortRepr):
    """How similar two prompts are: the cosine of their embeddings, from -1 to 1. If one of them was refused or failed:
    `error`, and no `score`.

    Attributes:
        score: the cosine.
        prompt_token_ids: the tokens of both prompts.
        error: why one of the prompts was refused or failed.
    """

    score: float | None
    prompt_token_ids: tuple[tuple[int, ...], tuple[int, ...]]
    error: RequestError | None = None


def scored(first: EmbeddingOutput, second: EmbeddingOutput) -> ScoreOutput:
    """The score of two embeddings; the error of the first one that has one."""
    vectors, error = (first.embedding, second.embedding), first.error or second.error
    return ScoreOutput(
        score=None if vectors[0] is None or vectors[1] is None else cosine(vectors[0], vectors[1]),
        prompt_token_ids=(first.prompt_token_ids, second.prompt_token_ids),
        error=error,
    )


def cosine(a: Float32, b: Float32) -> float:
    """Of the angle between two vectors, float32 [hidden size] each; 0 where one of them is zero."""
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.dot(a.astype(np.float64), b.astype(np.float64))) / norms if norms else 0.0
