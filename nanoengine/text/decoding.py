"""Decodes token ids one by one. The joined pieces of text are exactly the decoding of the whole sequence.

The text of a token may depend on other tokens. How far depends on the tokenizer's decoder, so there are three streams:

- `ByteLevelStream` (byte-level BPE, most models today): a token is a fixed sequence of bytes. An incremental UTF-8
  decoder joins them.
- `WindowStream` (Metaspace, byte fallback, WordPiece, BPE with suffix): the text of a token depends on the token before
  it, on whether it is the first, and on adjacent byte tokens. The tokenizer's own decoder is called with a window of
  two finished tokens and the pending ones. The window is cut only where no character and no run of byte tokens is
  incomplete.
- `WholeStream`: any other decoder (e.g. with a replacement in the joined text). Nothing is certain before the end, so
  no text is returned before it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

from nanoengine.api.errors import is_failure

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenStream(Protocol):
    """Decodes one sequence. The texts of all `push` calls and of `finish`, joined, are the full decoding."""

    def push(self, token_id: int) -> str:
        """Appends a token; returns the text that became certain with it (often of earlier tokens too)."""

    def extend(self, token_ids: Iterable[int]) -> str:
        """`push` of several tokens; returns their texts, joined."""

    def tail(self) -> str:
        """Text that would follow if the sequence ended here; it may still change. "" if a character is incomplete."""

    def finish(self) -> str:
        """Ends the sequence; returns the rest of its text."""


class TokenTable:
    """What the streams of one tokenizer share: the kind of decoder, special tokens, texts and bytes of tokens.

    Args:
        backend: the tokenizer. Its decoder and added tokens must not change afterwards.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        self._bytes = {skip: _TokenBytes(self, skip) for skip in (True, False)}

    def stream(self, skip_special_tokens: bool) -> TokenStream:
        """A decoder for one new sequence."""
        types = [part["type"] for part in self.decoder_parts]
        if types == ["ByteLevel"]:
            return ByteLevelStream(self._bytes[skip_special_tokens])
        if self.guard is None or not _is_local(self.decoder_parts):
            return WholeStream(self.backend, skip_special_tokens)
        return WindowStream(self, skip_special_tokens)

    def token(self, token_id: int, skip_special_tokens: bool) -> str | None:
        """The token's string in the vocabulary; None if decoding skips it (unknown and, if set, special ids)."""
        if token_id < 0:
            return None
        token: str | None = self.backend.id_to_token(token_id)
        return None if skip_special_tokens and token in self.special else token

    def special_text(self, token_id: int) -> str | None:
        """The text of a special token; None for any other id."""
        token = self.token(token_id, skip_special_tokens=False)
        return token if token in self.special else None

    def text(self, token_id: int) -> str:
        """The text of a token that is not the first: with its leading space; U+FFFD for a part of a character."""
        if token_id < 0:
            return ""
        if self.guard is None or not _is_local(self.decoder_parts):
            return self.decode([token_id])
        return self.decode([self.guard, token_id])[len(self.decode([self.guard])) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that is not the first; those of its text where the decoder knows no bytes."""
        token = self.token(token_id, skip_special_tokens=False)
        if token is None:
            return b""
        if [part["type"] for part in self.decoder_parts] == ["ByteLevel"]:
            return self._bytes[False][token_id]
        byte = _BYTE_TOKEN.fullmatch(token) if self.has_byte_tokens else None
        return bytes.fromhex(byte[1]) if byte else self.text(token_id).encode()

    def decode(self, token_ids: list[int]) -> str:
        text: str = self.backend.decode(token_ids, skip_special_tokens=False)
        return text

    @cached_property
    def decoder_parts(self) -> list[dict[str, Any]]:
        """The steps of the decoder as in tokenizer.json; without a decoder, one that joins tokens by spaces."""
        if self.backend.decoder is None:
            return [{"type": "JoinBySpaces"}]
        state: dict[str, Any] = json.loads(self.backend.decoder.__getstate__())
        return _flat(state)

    @cached_property
    def has_byte_tokens(self) -> bool:
        return any(part["type"] == "ByteFallback" for part in self.decoder_parts)

    @cached_property
    def guard(self) -> int | None:
        """A token with visible text. It is put before a window, because decoders treat the first token differently."""
        for token_id in range(self.backend.get_vocab_size(with_added_tokens=False)):
            token = self.token(token_id, skip_special_tokens=True)
            if token is None or is_byte_token(token):
                continue
            try:
                text = self.decode([token_id])
            except BaseException as error:  # a token that panics fails only a request that draws it
                if not is_failure(error):
                    raise
                continue
            if text.strip() and REPLACEMENT not in text:
                return token_id
        return None


class ByteLevelStream:
    """A stream for byte-level decoders: every token is a fixed sequence of bytes."""

    __slots__ = ("_bytes", "_utf8")

    def __init__(self, token_bytes: _TokenBytes) -> None:
        self._bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes[token_id])

    def extend(self, token_ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join([self._bytes[token_id] for token_id in token_ids]))

    def tail(self) -> str:
        return ""  # pending bytes are always an incomplete character

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowStream:
    """A stream for decoders in which a token depends on its neighbours: decodes a short window of tokens."""

    __slots__ = ("_context", "_context_chars", "_pending", "_skip", "_table")

    def __init__(self, table: TokenTable, skip_special_tokens: bool) -> None:
        self._table = table
        self._skip = skip_special_tokens
        self._context: list[int] = []  # finished tokens, decoded again because following tokens depend on them
        self._context_chars = 0
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        token = self._table.token(token_id, self._skip)
        if token is None:
            return ""
        self._pending.append(token_id)
        # A run of byte tokens becomes U+FFFD if it is not valid UTF-8 as a whole, so wait for its end.
        if self._table.has_byte_tokens and is_byte_token(token):
            return ""
        text = self._pending_text()
        if text.endswith(REPLACEMENT):
            return ""
        self._settle(text)
        return text

    def extend(self, token_ids: Iterable[int]) -> str:
        return "".join(map(self.push, token_ids))

    def tail(self) -> str:
        text = self._pending_text() if self._pending else ""
        return "" if text.endswith(REPLACEMENT) else text

    def finish(self) -> str:
        text = self._pending_text() if self._pending else ""
        self._pending = []
        return text

    def _pending_text(self) -> str:
        return self._table.decode(self._context + self._pending)[self._context_chars :]

    def _settle(self, text: str) -> None:
        """Makes the pending tokens the context, and shortens it."""
        guard = self._table.guard
        assert guard is not None
        if self._context_chars or text:
            self._context = [guard, self._pending[-1]]
        else:  # no text yet: the decoder may still strip the beginning
            self._context = self._context + self._pending
        self._context_chars = len(self._table.decode(self._context))
        self._pending = []


class WholeStream:
    """A stream for any decoder. All text comes at the end; `tail` decodes everything (O(length)) for stop strings."""

    __slots__ = ("_backend", "_ids", "_skip")

    def __init__(self, backend: Backend, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id >= 0:
            self._ids.append(token_id)
        return ""

    def extend(self, token_ids: Iterable[int]) -> str:
        return "".join(map(self.push, token_ids))

    def tail(self) -> str:
        text: str = self._backend.decode(self._ids, skip_special_tokens=self._skip)
        return text.rstrip(REPLACEMENT)

    def finish(self) -> str:
        text: str = self._backend.decode(self._ids, skip_special_tokens=self._skip)
        return text


class _TokenBytes(dict[int, bytes]):
    """token id -> bytes for a byte-level decoder. Entries are made when they are first used."""

    def __init__(self, table: TokenTable, skip_special_tokens: bool) -> None:
        self._table = table
        self._skip = skip_special_tokens

    def __missing__(self, token_id: int) -> bytes:
        token = self._table.token(token_id, self._skip)
        raw = b"" if token is None else _byte_level(token)
        self[token_id] = raw
        return raw


def _byte_level(token: str) -> bytes:
    """The bytes of a token. A token with a character outside the byte alphabet (an added token) is its own UTF-8."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet, character -> byte: printable Latin-1 is unchanged; the other 68 bytes are U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


def is_byte_token(token: str) -> bool:
    """Whether a byte-fallback decoder may treat the token as a byte, as in `<0x0A>`."""
    return token.startswith("<0x") and token.endswith(">")


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [part for child in state["decoders"] for part in _flat(child)]


_PER_TOKEN = {"JoinBySpaces", "WordPiece", "Metaspace", "BPEDecoder", "Replace", "Strip", "ByteFallback"}


def _is_local(parts: list[dict[str, Any]]) -> bool:
    """Whether a window of tokens is enough: steps per token, then a join, then at most a strip on the left."""
    joined = False
    for part in parts:
        if joined:
            if part["type"] != "Fuse" and not (part["type"] == "Strip" and part["stop"] == 0):
                return False
        elif part["type"] in ("Fuse", "ByteLevel"):
            joined = True
        elif part["type"] not in _PER_TOKEN:
            return False
    return True
