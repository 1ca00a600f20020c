"""Bytes of chunks that are alike but for a few values: what stays is encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from nanoengine.server.errors import ApiError, error_body
from nanoengine.server.events import TokenUsage
from nanoengine.server.protocol.generate import GenerateRequest

encode = msgspec.json.Encoder().encode


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def usage_fields(usage: TokenUsage) -> dict[str, Any]:
    """OpenAI's `usage`. cached_tokens is always there."""
    found: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens:
        found["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return found


class Chunks:
    """Chunks of one stream.

    Args:
        head: the fields that every chunk has. request: whether and where the usage is wanted.
    """

    def __init__(self, head: Mapping[str, Any], request: GenerateRequest) -> None:
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        options = request.stream_options
        self.continuous = options is not None and bool(options.continuous_usage_stats)
        self.usage_wanted = options is not None and bool(options.include_usage)
        self._tail = b'],"usage":null}\n\n' if self.usage_wanted else b"]}\n\n"

    def around(self, before: bytes, behind: bytes) -> tuple[bytes, bytes]:
        """What comes before and behind a value in a choice, where chunks differ in that value only: without
        `continuous`."""
        return self._head + before, behind + self._tail

    def chunk(self, choice: bytes, usage: TokenUsage) -> bytes:
        """A chunk with this choice."""
        if self.continuous:
            return b"".join((self._head, choice, b'],"usage":', encode(usage_fields(usage)), b"}\n\n"))
        return b"".join((self._head, choice, self._tail))

    def more(self, fields: Mapping[str, Any]) -> bytes:
        """A chunk without a choice, but with other fields."""
        return b"".join((self._head, b"],", encode(fields)[1:], b"\n\n"))

    def end(self, usage: TokenUsage) -> bytes:
        """The usage, if it is wanted, and the end."""
        last = self.more({"usage": usage_fields(usage)}) if self.usage_wanted else b""
        return last + b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> bytes:
        return event(error_body(error)) + b"data: [DONE]\n\n"


def progress_fields(usage: TokenUsage, computed: int) -> dict[str, Any]:
    """How far a long prompt is, in llama.cpp's words."""
    return {"prompt_progress": {"total": usage.prompt_tokens, "cache": usage.cached_tokens, "processed": computed}}


def ids_json(token_ids: Sequence[int]) -> bytes:
    return encode(list(token_ids))
