"""The tokens of a GGUF file with their types."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from enum import IntEnum

from nanoengine.plugins.model_sources.gguf_metadata import Metadata, stop_ids, token_ids

_TYPES = "tokenizer.ggml.token_type"
_BYTE = re.compile("<0x[0-9A-F]{2}>")


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
    """Token -> id and token -> type. Unused ids, which are padding of the embedding, are left out.

    Raises `ModelSourceError` for a token that occurs twice, or whose type a tokenizer of this `kind` does not have.
    """
    tokens = meta.strings("tokenizer.ggml.tokens")
    types = meta.integers(_TYPES) if _TYPES in meta.values else _guessed_types(meta, tokens, legal)
    if len(types) != len(tokens):
        raise meta.error(f"{len(tokens)} tokens but {len(types)} token types")
    vocab: dict[str, int] = {}
    kinds: dict[str, TokenType] = {}
    for index, (token, number) in enumerate(zip(tokens, types, strict=True)):
        if number == TokenType.UNUSED:
            continue
        if not token:  # an empty token would be found everywhere
            token = f"[EMPTY_{index}]"
        if token in vocab:
            raise meta.error(f"token {token!r} is twice in the vocabulary, as {vocab[token]} and {index}")
        if number not in legal:
            raise meta.error(f"token {token!r} is of type {number}, which a {kind} does not have")
        vocab[token], kinds[token] = index, TokenType(number)
    return vocab, kinds


def _guessed_types(meta: Metadata, tokens: Sequence[str], legal: Collection[TokenType]) -> list[int]:
    """The types of tokens in a file without types: bytes by their texts, as in llama.cpp, special ones by their keys.

    Without byte tokens, a SentencePiece tokenizer loses all text that has no token, such as the end of a line.
    """
    types = [TokenType.NORMAL] * len(tokens)
    if TokenType.BYTE in legal:
        types = [TokenType.BYTE if _BYTE.fullmatch(token) else TokenType.NORMAL for token in tokens]
    for kind, index in token_ids(meta).items():
        types[index] = TokenType.UNKNOWN if kind == "unk_token_id" else TokenType.CONTROL
    for index in stop_ids(meta):
        types[index] = TokenType.CONTROL
    return list(types)
