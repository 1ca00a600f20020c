"""The tokens of a GGUF file with their types."""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

from nanoengine.plugins.model_sources.gguf_metadata import Metadata


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` of the GGUF specification."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def read_vocabulary(
    meta: Metadata, kind: str, legal: Collection[TokenType]
) -> tuple[dict[str, int], dict[str, TokenType]]:
    """Token -> id and token -> type. Unused ids, the padding of the embedding, are left out.

    Raises `ModelSourceError` for a token that stands twice, or is of a type that a tokenizer of this `kind` has not.
    """
    tokens = meta.strings("tokenizer.ggml.tokens")
    types = meta.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise meta.error(f"{len(tokens)} tokens but {len(types)} token types")
    vocab: dict[str, int] = {}
    kinds: dict[str, TokenType] = {}
    for index, (token, number) in enumerate(zip(tokens, types, strict=True)):
        if number == TokenType.UNUSED:
            continue
        if token in vocab:
            raise meta.error(f"token {token!r} stands twice in the vocabulary, as {vocab[token]} and {index}")
        if number not in legal:
            raise meta.error(f"token {token!r} is of type {number}, which a {kind} has not")
        vocab[token], kinds[token] = index, TokenType(number)
    return vocab, kinds
