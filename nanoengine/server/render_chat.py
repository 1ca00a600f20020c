"""The answers of /v1/chat/completions: chunks of a stream, or one body."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoengine.api.deltas import LogprobRows, join_rows
from nanoengine.server.answers import usage_of
from nanoengine.server.chunks import Chunks, encode, ids_json, progress_fields, usage_fields
from nanoengine.server.errors import ApiError
from nanoengine.server.events import (
    Content,
    Ended,
    Event,
    Reasoning,
    Running,
    SampleUpdate,
    ToolCallArguments,
    ToolCallBegin,
    Update,
)
from nanoengine.server.logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from nanoengine.server.protocol.chat import ChatRequest

_OPEN = b'"finish_reason":null,"stop_reason":null'


@dataclass(slots=True, kw_only=True)
class ChatStyle:
    """What both forms need."""

    id: str
    created: int
    model: str
    request: ChatRequest
    texts: TokenTexts

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    @property
    def reasoning(self) -> bool:
        """Whether the reasoning is shown."""
        return self.request.include_reasoning is not False


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ChatStream:
    """Chunks. Each has one kind of news; the end has a chunk of its own."""

    def __init__(self, style: ChatStyle) -> None:
        self._style, request = style, style.request
        self._chunks = Chunks(style.head("chat.completion.chunk"), request)
        self._logprobs, self._ids = bool(request.logprobs), bool(request.return_token_ids)
        self._more = self._logprobs or self._ids
        self._first: set[int] = set()
        self._around: dict[int, tuple[bytes, bytes]] = {}  # of the content in a plain chunk, by sample
        self._prompt: list[LogprobRows] = []

    def take(self, number: int, run: Running, update: Update) -> bytes:
        if update.prompt_logprobs is not None:
            self._prompt.append(update.prompt_logprobs)
        if not update.samples:
            if self._style.request.return_progress:
                return self._chunks.more(progress_fields(run.usage, update.num_computed))
            return b""
        return b"".join([self._sample(run, sample) for sample in update.samples])

    def _sample(self, run: Running, update: SampleUpdate) -> bytes:
        around = self._around.get(update.number)
        if around is not None and len(update.events) == 1 and type(first := update.events[0]) is Content:
            return around[0] + encode(first.text) + around[1]  # most chunks
        index, parts, chunk = update.number, list[bytes](), self._chunks.chunk
        if index not in self._first:
            self._first.add(index)
            parts.append(self._opening(index, run))
            if not self._more and not self._chunks.continuous:
                before, behind = b'{"index":%d,"delta":{"content":' % index, b'},"logprobs":null,%s}' % _OPEN
                self._around[index] = self._chunks.around(before, behind)
        more = self._of_tokens(update) if self._more and update.token_ids else b'"logprobs":null'
        said, usage = False, run.usage
        for each in update.events:
            if type(each) is Ended:
                if not said and self._more and update.token_ids:  # their text is nowhere, as that of a stop token
                    parts.append(chunk(b'{"index":%d,"delta":{},%s,%s}' % (index, more, _OPEN), usage))
                end = encode(each.finish_reason), encode(each.stop_reason)
                fields = index, *end
                parts.append(
                    chunk(
                        b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%s,"stop_reason":%s}' % fields, usage
                    )
                )
                continue
            delta = self._delta(each)
            if delta:
                parts.append(chunk(b'{"index":%d,"delta":%s,%s,%s}' % (index, delta, more, _OPEN), usage))
                more, said = b'"logprobs":null', True
        if not update.events and self._more and update.token_ids:
            parts.append(chunk(b'{"index":%d,"delta":{},%s,%s}' % (index, more, _OPEN), usage))
        return b"".join(parts)

    def _delta(self, event: Event) -> bytes:
        if type(event) is Content:
            return b'{"content":%s}' % encode(event.text)
        if type(event) is Reasoning:
            text = encode(event.text)
            return b'{"reasoning":%s,"reasoning_content":%s}' % (text, text) if self._style.reasoning else b""
        if type(event) is ToolCallBegin:
            function = {"name": event.name, "arguments": ""}
            call = {"index": event.index, "id": call_id(), "type": "function", "function": function}
            return encode({"tool_calls": [call]})
        assert isinstance(event, ToolCallArguments)
        return encode({"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]})

    def _of_tokens(self, update: SampleUpdate) -> bytes:
        rows = update.logprobs if self._logprobs else None
        logprobs = None if rows is None else {"content": chat_logprobs(rows, self._style.texts)}
        ids = b',"token_ids":' + ids_json(update.token_ids) if self._ids else b""
        return b'"logprobs":' + encode(logprobs) + ids

    def _opening(self, index: int, run: Running) -> bytes:
        fields: dict[str, Any] = {}
        if self._ids:
            fields["prompt_token_ids"] = run.generation.prompt_token_ids
        if self._style.request.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(self._prompt, self._style.texts)
        more = encode(fields)[1:-1] + b"," if fields else b""
        fixed = b'"delta":{"role":"assistant","content":""},%s"logprobs":null' % more
        return self._chunks.chunk(b'{"index":%d,%s,%s}' % (index, fixed, _OPEN), run.usage)

    def end(self, runs: Sequence[Running]) -> bytes:
        return self._chunks.end(usage_of(runs))

    def failed(self, error: ApiError) -> bytes:
        return self._chunks.failed(error)


@dataclass(slots=True)
class Message:
    """What a sample has said. calls: name and arguments of each."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[str, list[str]]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    rows: list[LogprobRows] = field(default_factory=list)
    ended: Ended | None = None

    def take(self, update: SampleUpdate) -> None:
        self.token_ids += update.token_ids
        self.rows += [] if update.logprobs is None else [update.logprobs]
        for event in update.events:
            if isinstance(event, Content):
                self.content.append(event.text)
            elif isinstance(event, Reasoning):
                self.reasoning.append(event.text)
            elif isinstance(event, ToolCallBegin):
                self.calls.append((event.name, []))
            elif isinstance(event, ToolCallArguments):
                self.calls[event.index][1].append(event.text)
            else:
                self.ended = event


class ChatBody:
    """One body."""

    def __init__(self, style: ChatStyle) -> None:
        self._style = style
        self._messages: dict[int, Message] = {}
        self._prompt: list[LogprobRows] = []

    def take(self, number: int, run: Running, update: Update) -> bytes:
        if update.prompt_logprobs is not None:
            self._prompt.append(update.prompt_logprobs)
        for sample in update.samples:
            self._messages.setdefault(sample.number, Message()).take(sample)
        return b""

    def end(self, runs: Sequence[Running]) -> bytes:
        style, request = self._style, self._style.request
        found: dict[str, Any] = style.head("chat.completion")
        found["choices"] = [self._choice(*each) for each in sorted(self._messages.items())]
        found["usage"] = usage_fields(usage_of(runs))
        if request.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(self._prompt, style.texts)
        if request.return_token_ids:
            found["prompt_token_ids"] = runs[0].generation.prompt_token_ids
        return encode(found)

    def _choice(self, index: int, said: Message) -> dict[str, Any]:
        request, ended = self._style.request, said.ended
        message: dict[str, Any] = {"role": "assistant", "content": "".join(said.content), "refusal": None}
        if said.reasoning and self._style.reasoning:
            message["reasoning"] = message["reasoning_content"] = "".join(said.reasoning)
        if said.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {"id": call_id(), "type": "function", "function": {"name": name, "arguments": "".join(arguments)}}
                for name, arguments in said.calls
            ]
        rows = join_rows(said.rows) if request.logprobs else None
        found = {
            "index": index,
            "message": message,
            "logprobs": None if rows is None else {"content": chat_logprobs(rows, self._style.texts)},
            "finish_reason": None if ended is None else ended.finish_reason,
            "stop_reason": None if ended is None else ended.stop_reason,
        }
        if request.return_token_ids:
            found["token_ids"] = said.token_ids
        return found

    def failed(self, error: ApiError) -> bytes:
        raise AssertionError("a body is sent whole")
