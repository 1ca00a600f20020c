"""The answers of /v1/responses: events of a stream, or one body."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoengine.server.answers import usage_of
from nanoengine.server.chunks import encode
from nanoengine.server.errors import ApiError, error_fields
from nanoengine.server.events import Running, TokenUsage, Update
from nanoengine.server.items import Item, Items
from nanoengine.server.protocol.responses import ResponsesRequest

_PARTS = {"content": "output_text", "reasoning": "reasoning_text"}
_ECHOED = ("instructions", "max_output_tokens", "metadata", "prompt_cache_key", "safety_identifier", "user")


@dataclass(slots=True)
class ResponseRenderer:
    """What streams and bodies have in common. sampling: temperature and top_p, as they are used."""

    id: str
    created: int
    model: str
    request: ResponsesRequest
    sampling: dict[str, Any]
    items: Items = field(default_factory=Items)

    def response(self, status: str, usage: TokenUsage | None = None) -> dict[str, Any]:
        request = self.request
        dumped = request.model_dump(by_alias=True, exclude_none=True)
        reasoning = dumped.get("reasoning", {})
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": self._why_cut()} if status == "incomplete" else None,
            **{name: dumped.get(name) for name in _ECHOED},
            "max_tool_calls": None,
            "model": self.model,
            "output": [] if usage is None else [self.item(item, self._status(item)) for item in self.items.found],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
            "service_tier": "default",
            "store": False,
            **self.sampling,
            "text": dumped.get("text") or {"format": {"type": "text"}},
            "tool_choice": dumped.get("tool_choice", "auto"),
            "tools": [{"strict": None, "parameters": None, **tool} for tool in dumped.get("tools", ())],
            "top_logprobs": 0,
            "truncation": "disabled",
            "usage": None if usage is None else self._usage(usage),
        }

    def ended(self, usage: TokenUsage) -> dict[str, Any]:
        return self.response("incomplete" if self.cut else "completed", usage)

    @property
    def cut(self) -> bool:
        """Whether the answer was cut off."""
        ended = self.items.ended
        return ended is None or ended.finish_reason not in ("stop", "tool_calls")

    def _why_cut(self) -> str | None:
        """In OpenAI's words, which have none for an answer that the server gave up."""
        ended = self.items.ended
        return "max_output_tokens" if ended is not None and ended.finish_reason == "length" else None

    def _status(self, item: Item) -> str:
        return "incomplete" if self.cut and item is self.items.found[-1] else "completed"

    def _usage(self, usage: TokenUsage) -> dict[str, Any]:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def item(self, item: Item, status: str) -> dict[str, Any]:
        """The item as it is so far; one in progress has no text yet."""
        text, begun = item.text, status == "in_progress"
        number = item.id.partition("_")[2]
        if item.kind == "call":
            call = {"id": item_id(item), "call_id": f"call_{number}", "name": item.name}
            return {"type": "function_call", **call, "arguments": "" if begun else text, "status": status}
        parts = [] if begun else [part(item, text)]
        if item.kind == "reasoning":
            shown: dict[str, Any] = {"summary": [], "content": parts, "encrypted_content": None}
            return {"type": "reasoning", "id": item_id(item), **shown, "status": status}
        return {"type": "message", "id": item_id(item), "status": status, "role": "assistant", "content": parts}


def item_id(item: Item) -> str:
    prefix = {"call": "fc", "reasoning": "rs", "content": "msg"}[item.kind]
    return f"{prefix}_{item.id.partition('_')[2]}"


def part(item: Item, text: str) -> dict[str, Any]:
    more = {"annotations": (), "logprobs": ()} if item.kind == "content" else {}
    return {"type": _PARTS[item.kind], "text": text, **more}


class ResponseStream(ResponseRenderer):
    """Events, numbered: response.created and in_progress; each item's added, deltas and done; response.completed."""

    _number = 0
    _begun = False

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        data = encode({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        response = self.response("in_progress")
        return b"".join(self._event(f"response.{kind}", {"response": response}) for kind in ("created", "in_progress"))

    def take(self, number: int, run: Running, update: Update) -> bytes:
        parts = [self._begin()]
        for sample in update.samples:
            for item, new, piece in self.items.take(sample):
                if new:
                    parts += [self._close(self.items.found[item.index - 1], "completed")] if item.index else []
                    parts.append(self._open(item))
                parts += [self._delta(item, piece)] if piece else []
        return b"".join(parts)

    def _open(self, item: Item) -> bytes:
        added = self._event(
            "response.output_item.added", {"output_index": item.index, "item": self.item(item, "in_progress")}
        )
        if item.kind == "call":
            return added
        return added + self._event("response.content_part.added", {**_place(item), "part": part(item, "")})

    def _delta(self, item: Item, piece: str) -> bytes:
        if item.kind == "call":
            where = {"item_id": item_id(item), "output_index": item.index}
            return self._event("response.function_call_arguments.delta", {**where, "delta": piece})
        more = {"logprobs": ()} if item.kind == "content" else {}
        return self._event(f"response.{_PARTS[item.kind]}.delta", {**_place(item), "delta": piece, **more})

    def _close(self, item: Item, status: str) -> bytes:
        text = item.text
        if item.kind == "call":
            where = {"item_id": item_id(item), "output_index": item.index, "name": item.name}
            done = self._event("response.function_call_arguments.done", {**where, "arguments": text})
        else:
            more = {"logprobs": ()} if item.kind == "content" else {}
            done = self._event(f"response.{_PARTS[item.kind]}.done", {**_place(item), "text": text, **more})
            done += self._event("response.content_part.done", {**_place(item), "part": part(item, text)})
        fields = {"output_index": item.index, "item": self.item(item, status)}
        return done + self._event("response.output_item.done", fields)

    def end(self, runs: Sequence[Running]) -> bytes:
        last = self.items.found[-1] if self.items.found else None
        closed = b"" if last is None else self._close(last, "incomplete" if self.cut else "completed")
        response = self.ended(usage_of(runs))
        return self._begin() + closed + self._event(f"response.{response['status']}", {"response": response})

    def failed(self, error: ApiError) -> bytes:
        fields = error_fields(error)
        response = self.response("failed") | {"error": {"code": "server_error", "message": fields["message"]}}
        named = {name: fields[name] for name in ("code", "message", "param")}
        return self._begin() + self._event("error", named) + self._event("response.failed", {"response": response})


class ResponseBody(ResponseRenderer):
    """One body."""

    def take(self, number: int, run: Running, update: Update) -> bytes:
        for sample in update.samples:
            for _ in self.items.take(sample):
                pass
        return b""

    def end(self, runs: Sequence[Running]) -> bytes:
        return encode(self.ended(usage_of(runs)))

    def failed(self, error: ApiError) -> bytes:
        raise AssertionError("a body is sent whole")


def _place(item: Item) -> dict[str, Any]:
    return {"item_id": item_id(item), "output_index": item.index, "content_index": 0}
