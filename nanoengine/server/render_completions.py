"""The answers of /v1/completions: chunks of a stream, or one body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoengine.api.deltas import LogprobRows, join_rows
from nanoengine.server.answers import usage_of
from nanoengine.server.chunks import Chunks, encode, ids_json, progress_fields, usage_fields
from nanoengine.server.errors import ApiError
from nanoengine.server.events import Content, Ended, Event, Running, SampleUpdate, Update
from nanoengine.server.logprobs import CompletionLogprobs, TokenTexts, prompt_logprobs
from nanoengine.server.protocol.completions import CompletionRequest

_OPEN = b'"finish_reason":null,"stop_reason":null'


@dataclass(slots=True, kw_only=True)
class CompletionStyle:
    """What both forms need. echo: texts of the prompts; () without echo."""

    id: str
    created: int
    model: str
    request: CompletionRequest
    texts: TokenTexts
    echo: Sequence[str] = ()

    @property
    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}


def _read(events: Sequence[Event]) -> tuple[str, Ended | None]:
    """The text of a sample's events, and their end."""
    if len(events) == 1 and type(first := events[0]) is Content:
        return first.text, None
    last = events[-1] if events else None
    text = "".join(event.text for event in events if isinstance(event, Content))
    return text, last if isinstance(last, Ended) else None


class CompletionStream:
    """Chunks. The prompt is repeated in front of the first one, and what is asked for of it comes with that."""

    def __init__(self, style: CompletionStyle) -> None:
        self._style, request = style, style.request
        self._chunks = Chunks(style.head, request)
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._wanted = request.logprobs
        self._ids = bool(request.return_token_ids)
        self._first: set[int] = set()
        self._prompts: dict[int, list[LogprobRows]] = {}
        self._plain = self._wanted is None and not self._ids
        self._around: dict[int, tuple[bytes, bytes]] = {}  # of most chunks, by sample

    def take(self, number: int, run: Running, update: Update) -> bytes:
        if update.prompt_logprobs is not None:
            self._prompts.setdefault(number, []).append(update.prompt_logprobs)
        if not update.samples:
            if self._style.request.return_progress:
                return self._chunks.more(progress_fields(run.usage, update.num_computed))
            return b""
        return b"".join([self._sample(number, run, sample) for sample in update.samples])

    def _sample(self, number: int, run: Running, update: SampleUpdate) -> bytes:
        index, events = number * run.generation.params.core.n + update.number, update.events
        around = self._around.get(index)
        if around is not None and self._plain and len(events) == 1 and type(first := events[0]) is Content:
            return around[0] + encode(first.text) + around[1]  # most chunks
        if around is not None and self._ids and not events and update.token_ids:
            return around[0] + encode(update.token_ids) + around[1]
        text, ended = _read(events)
        data = b""
        if index not in self._first:
            self._first.add(index)
            data = self._opening(number, index, run)
            self._note_around(index)
        if text or (update.token_ids and not self._plain):
            logprobs = b"null"
            if self._wanted is not None and update.logprobs is not None:
                logprobs = encode(self._logprobs[index].of(update.logprobs))
            more = b',"token_ids":' + ids_json(update.token_ids) if self._ids else b""
            data += self._chunk(run, index, text, logprobs, more)
        if ended is not None:
            reason = b'"finish_reason":%s,"stop_reason":%s' % (encode(ended.finish_reason), encode(ended.stop_reason))
            data += self._chunk(run, index, "", b"null", b"", reason)
        return data

    def _note_around(self, index: int) -> None:
        """Of chunks that differ in one value: the text, or, without text, the ids."""
        if self._chunks.continuous or self._wanted is not None:
            return
        if self._plain:
            around = b'{"index":%d,"text":' % index, b',"logprobs":null,%s}' % _OPEN
        else:
            around = b'{"index":%d,"text":"","logprobs":null,%s,"token_ids":' % (index, _OPEN), b"}"
        self._around[index] = self._chunks.around(*around)

    def _opening(self, number: int, index: int, run: Running) -> bytes:
        """The prompt, as far as it is wanted, in front of a sample's first tokens."""
        style, echo = self._style, self._style.echo
        texts, prompt, parts = style.texts, run.generation.prompt_token_ids, self._prompts.get(number, [])
        text = echo[number] if echo else ""
        self._logprobs[index] = own = CompletionLogprobs(texts, self._wanted or 0, 0)
        logprobs = b"null"
        if echo and self._wanted is not None:
            logprobs = encode(own.of(join_rows(parts), prompt[0]))
        more = b',"prompt_token_ids":' + ids_json(prompt) if self._ids else b""
        if style.request.prompt_logprobs is not None:
            more += b',"prompt_logprobs":' + encode(prompt_logprobs(parts, texts))
        return self._chunk(run, index, text, logprobs, more) if text or more or logprobs != b"null" else b""

    def _chunk(
        self, run: Running, index: int, text: str, logprobs: bytes, more: bytes,
        reason: bytes = _OPEN,
    ) -> bytes:  # fmt: skip
        choice = b'{"index":%d,"text":%s,"logprobs":%s,%s%s}' % (index, encode(text), logprobs, reason, more)
        return self._chunks.chunk(choice, run.usage)

    def end(self, runs: Sequence[Running]) -> bytes:
        return self._chunks.end(usage_of(runs))

    def failed(self, error: ApiError) -> bytes:
        return self._chunks.failed(error)


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    rows: list[LogprobRows] = field(default_factory=list)
    ended: Ended | None = None


class CompletionBody:
    """One body."""

    def __init__(self, style: CompletionStyle) -> None:
        self._style = style
        self._choices: dict[int, _Choice] = {}
        self._prompts: dict[int, list[LogprobRows]] = {}

    def take(self, number: int, run: Running, update: Update) -> bytes:
        if update.prompt_logprobs is not None:
            self._prompts.setdefault(number, []).append(update.prompt_logprobs)
        for sample in update.samples:
            index = number * run.generation.params.core.n + sample.number
            choice = self._choices.setdefault(index, _Choice())
            text, ended = _read(sample.events)
            choice.text.append(text)
            choice.token_ids += sample.token_ids
            choice.rows += [] if sample.logprobs is None else [sample.logprobs]
            choice.ended = ended or choice.ended
        return b""

    def end(self, runs: Sequence[Running]) -> bytes:
        choices = []
        for index, choice in sorted(self._choices.items()):
            number = index // runs[0].generation.params.core.n
            choices.append(self._choice(index, choice, number, runs[number]))
        return encode({**self._style.head, "choices": choices, "usage": usage_fields(usage_of(runs))})

    def _choice(self, index: int, choice: _Choice, number: int, run: Running) -> dict[str, Any]:
        style, request, prompt = self._style, self._style.request, run.generation.prompt_token_ids
        parts, own = self._prompts.get(number, []), join_rows(choice.rows)
        logprobs = None
        if request.logprobs is not None:
            form = CompletionLogprobs(style.texts, request.logprobs)
            logprobs = form.of(join_rows(parts), prompt[0]) if style.echo else form.of(own)
            if style.echo:
                more = form.of(own)
                for key, values in logprobs.items():
                    logprobs[key] = None if values is None else values + more[key]
        ended = choice.ended
        found: dict[str, Any] = {
            "index": index,
            "text": (style.echo[number] if style.echo else "") + "".join(choice.text),
            "logprobs": logprobs,
            "finish_reason": None if ended is None else ended.finish_reason,
            "stop_reason": None if ended is None else ended.stop_reason,
        }
        if request.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(parts, style.texts)
        if request.return_token_ids:
            found |= {"prompt_token_ids": list(prompt), "token_ids": choice.token_ids}
        return found

    def failed(self, error: ApiError) -> bytes:
        raise AssertionError("a body is sent whole")
