"""The answers of /v1/messages: events of a stream, or one body."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pydantic_core

from nanoengine.server.answers import usage_of
from nanoengine.server.chunks import encode
from nanoengine.server.errors import ApiError, message_error
from nanoengine.server.events import Running, TokenUsage, Update
from nanoengine.server.items import Item, Items

# An escape in JSON; half: half of a surrogate pair, which no text can have.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>u[dD][89a-fA-F]..)|.)")
_DELTAS = {
    "content": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}
# An answer that the server gave up (`abort`) is one that the client may send back, to go on.
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "abort": "pause_turn"}


def event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode({"type": kind, **fields}))


@dataclass(slots=True)
class MessageRenderer:
    """What streams and bodies have in common. max_tokens: as the client asked. reasoning: whether it is shown."""

    id: str
    model: str
    max_tokens: int
    reasoning: bool = True
    items: Items = field(init=False)

    def __post_init__(self) -> None:
        self.items = Items(self.reasoning)

    def head(self, usage: TokenUsage, content: Sequence[Any] = ()) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **self.stop(usage),
            "usage": self.usage(usage),
        }

    def stop(self, usage: TokenUsage) -> dict[str, Any]:
        """stop_reason and stop_sequence."""
        ended = self.items.ended
        if ended is None:
            return {"stop_reason": None, "stop_sequence": None}
        if ended.finish_reason == "stop" and isinstance(ended.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": ended.stop_reason}
        if ended.finish_reason == "length" and usage.completion_tokens < self.max_tokens:
            return {"stop_reason": "model_context_window_exceeded", "stop_sequence": None}
        return {"stop_reason": _STOP_REASONS[ended.finish_reason], "stop_sequence": None}

    def usage(self, usage: TokenUsage) -> dict[str, Any]:
        """In Anthropic's words, where `input_tokens` are those that were not in the cache."""
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        }


class MessageStream(MessageRenderer):
    """Events: message_start, then each block's start, deltas and stop, then message_delta and message_stop."""

    _begun = False

    def take(self, number: int, run: Running, update: Update) -> bytes:
        parts = []
        if not self._begun:
            self._begun = True
            parts.append(event("message_start", {"message": self.head(run.usage)}))
        for sample in update.samples:
            for item, new, piece in self.items.take(sample):
                parts += [self._open(item)] if new else []
                parts += [self._delta(item, piece)] if piece else []
        return b"".join(parts)

    def _open(self, item: Item) -> bytes:
        stop = self._close(self.items.found[item.index - 1]) if item.index else b""
        return stop + event("content_block_start", {"index": item.index, "content_block": block(item, "", {})})

    def _delta(self, item: Item, piece: str) -> bytes:
        kind, key = _DELTAS[item.kind]
        return event("content_block_delta", {"index": item.index, "delta": {"type": kind, key: piece}})

    def _close(self, item: Item) -> bytes:
        return event("content_block_stop", {"index": item.index})

    def end(self, runs: Sequence[Running]) -> bytes:
        last = self._close(self.items.found[-1]) if self.items.found else b""
        usage = usage_of(runs)
        fields = {"delta": self.stop(usage), "usage": self.usage(usage)}
        return last + event("message_delta", fields) + event("message_stop", {})

    def failed(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + message_error(error) + b"\n\n"


class MessageBody(MessageRenderer):
    """One body."""

    def take(self, number: int, run: Running, update: Update) -> bytes:
        for sample in update.samples:
            for _ in self.items.take(sample):
                pass
        return b""

    def end(self, runs: Sequence[Running]) -> bytes:
        blocks = [block(item, item.text, arguments_of(item)) for item in self.items.found]
        return encode(self.head(usage_of(runs), blocks))

    def failed(self, error: ApiError) -> bytes:
        raise AssertionError("a body is sent whole")


def block(item: Item, text: str, arguments: Any) -> dict[str, Any]:
    if item.kind == "content":
        return {"type": "text", "text": text}
    if item.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "tool_use", "id": f"toolu_{item.id.partition('_')[2]}", "name": item.name, "input": arguments}


def arguments_of(item: Item) -> Any:
    """The arguments of a call as an object: of one that was cut off, what came of it."""
    if item.kind != "call" or not item.text:
        return {}
    text = _ESCAPE.sub(lambda found: "\\ufffd" if found["half"] else found[0], item.text)
    return pydantic_core.from_json(text, allow_partial="trailing-strings")
