"""The vocabulary of a SentencePiece BPE model in a GGUF file (Llama 2, Mistral, Gemma) -> `tokenizers.Tokenizer`.

SentencePiece merges the two neighbours that make the token of the highest score
(https://github.com/google/sentencepiece). Here each way to make a token of two tokens is a merge, in the order of
scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanoengine.plugins.model_sources.gguf_metadata import Metadata, token_ids
from nanoengine.plugins.model_sources.gguf_vocabulary import TokenType, read_vocabulary

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

SPACE = "\u2581"  # a space in tokens
_MOST_WORK = 1 << 28  # most characters compared to find merges; a vocabulary of 262,144 tokens needs a tenth of it
_LEGAL = (TokenType.NORMAL, TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE)


def sentencepiece_tokenizer(meta: Metadata) -> Tokenizer:
    """The tokenizer, without BOS and EOS. Raises `ModelSourceError` if the vocabulary is inconsistent."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab, types = read_vocabulary(meta, "SentencePiece BPE", _LEGAL)
    tokens, unknown = meta.strings("tokenizer.ggml.tokens"), token_ids(meta).get("unk_token_id")
    bpe = models.BPE(
        vocab,
        _merges(meta, vocab, types),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=TokenType.BYTE in types.values(),
    )
    tokenizer = Tokenizer(bpe)
    prefixed = meta.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefixed else back)
    tokenizer.add_tokens(_added(types, prefixed))
    return tokenizer


def _merges(meta: Metadata, vocab: Mapping[str, int], types: Mapping[str, TokenType]) -> list[tuple[str, str]]:
    scores = meta.reals("tokenizer.ggml.scores")
    if len(scores) != len(meta.strings("tokenizer.ggml.tokens")):
        raise meta.error("key tokenizer.ggml.scores must have one score for each token")
    normal = {token for token, kind in types.items() if kind == TokenType.NORMAL}
    if sum(len(token) ** 2 for token in normal) > _MOST_WORK:
        raise meta.error(f"its tokens are too long: one has {max(map(len, normal))} characters")
    merges = [
        (-scores[vocab[token]], vocab[token], token[:at], token[at:])
        for token in normal
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]


def _added(types: Mapping[str, TokenType], prefixed: bool) -> list[AddedToken]:
    """The added tokens, which are found in the text first. They are in the vocabulary already, which fixes their ids.

    A token with spaces must be found after the normaliser, which then must not add a space before the token.
    """
    from tokenizers import AddedToken

    special = {TokenType.UNKNOWN: True, TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    return [
        AddedToken(token, special=special[kind], normalized=SPACE in token)
        for token, kind in types.items()
        if kind in special and not (prefixed and SPACE in token)
    ]
