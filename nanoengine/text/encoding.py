"""Texts to token ids."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend

_SHORT = 2_000  # characters that are tokenized in less than a millisecond


def encoded(backend: Backend, text: str, add_special_tokens: bool = False) -> list[int]:
    """The token ids of a text. While a long one is tokenized, other threads of Python run."""
    if len(text) < _SHORT:
        found: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
    else:  # only a batch lets them run
        found = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return found
