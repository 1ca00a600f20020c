"""Log-probs in the shapes of OpenAI's two APIs and of vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from nanoengine.api.deltas import LogprobRows, join_rows
from nanoengine.api.outputs import Logprob
from nanoengine.text import Tokenizer
from nanoengine.text.outputs import logprobs_by_id

_LEAST = -9999.0  # what OpenAI answers for -inf, which JSON cannot say
Pair = tuple[int, float]


class TokenTexts:
    """How tokens are shown: their text, or "token_id:ID"."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool = False) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids or tokenizer is None

    def text(self, token_id: int) -> str:
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def raw(self, token_id: int) -> list[int]:
        """The token's bytes, which for a part of a character are not those of its text."""
        if self._tokenizer is None:
            return list(self.text(token_id).encode())
        return list(self._tokenizer.token_bytes(token_id))


def _positions(rows: LogprobRows) -> Iterator[tuple[int, float, list[Pair]]]:
    """Of each position: the token, its log-prob, and the likeliest tokens, best first."""
    ids, values = rows.top_ids.tolist(), [max(value, _LEAST) for value in rows.top_logprobs.tolist()]
    tokens, own = rows.token_ids.tolist(), rows.logprobs.tolist()
    for i, (start, end) in enumerate(pairwise(rows.top_offsets.tolist())):
        best = list(zip(ids[start:end], values[start:end], strict=True))
        yield tokens[i], max(own[i], _LEAST), best


def chat_logprobs(rows: LogprobRows, texts: TokenTexts) -> list[dict[str, Any]]:
    """One entry a token, as `logprobs.content` of a chat completion has them."""

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": value, "bytes": texts.raw(token)}

    return [
        {**entry(token, value), "top_logprobs": [entry(*pair) for pair in best]}
        for token, value, best in _positions(rows)
    ]


class CompletionLogprobs:
    """`logprobs` of completions, which counts the characters before each token. One for each sample.

    Args:
        wanted: how many of the likeliest tokens; 0: no `top_logprobs`.
    """

    def __init__(self, texts: TokenTexts, wanted: int, offset: int = 0) -> None:
        self._texts, self._wanted, self._offset = texts, wanted, offset

    def of(self, rows: LogprobRows | None, first: int | None = None) -> dict[str, Any]:
        """`first`: a token without a log-prob in front, as the first one of a prompt."""
        tokens, values, tops, offsets = list[str](), list[float | None](), list[dict[str, float] | None](), list[int]()

        def add(token: int, value: float | None, best: Sequence[Pair] | None) -> None:
            text = self._texts.text(token)
            tokens.append(text)
            values.append(value)
            offsets.append(self._offset)
            self._offset += len(text)
            if best is None or value is None:
                tops.append(None)
                return
            shown = dict[str, float]()
            for each, likely in (*best, (token, value)):
                shown.setdefault(self._texts.text(each), likely)
            tops.append(shown)

        if first is not None:
            add(first, None, None)
        for token, value, best in () if rows is None else _positions(rows):
            add(token, value, best)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if self._wanted else None,
            "text_offset": offsets,
        }


def prompt_logprobs(parts: Sequence[LogprobRows], texts: TokenTexts) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: of each position {id: {logprob, rank, decoded_token}}, None for the first token.

    None of no parts.
    """
    rows = join_rows(parts)
    if rows is None:
        return None

    def shown(each: Logprob) -> dict[str, Any]:
        return {"logprob": max(each.logprob, _LEAST), "rank": each.rank, "decoded_token": each.decoded_token}

    found = logprobs_by_id(rows, texts.text)
    return [None, *({str(token): shown(each) for token, each in entries.items()} for entries in found)]
