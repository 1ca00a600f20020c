"""From a request to events: the one path that all endpoints share.

    request model -> Generation -> Running: updates, each with the new events of samples -> a renderer's bytes

An endpoint makes a `Generation`, starts it, and gives each `Update` to its renderer, streamed or at the end. Text, stop
strings and the parsing of tools and reasoning happen here, so that no endpoint has them for itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nanoengine.api.deltas import Float32, LogprobRows, Pooling, SampleDelta
from nanoengine.api.errors import NanoEngineError, is_failure, text_failure
from nanoengine.api.tool_parsers import Content, ParserEvent, Reasoning, ToolCallArguments, ToolCallBegin
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.service.client import ClientRequest, EngineClient, RequestStream
from nanoengine.text import IncrementalDetokenizer, Tokenizer

__all__ = [
    "Content", "Ended", "Event", "Generation", "OutputParser", "Reasoning", "Running", "SampleUpdate", "TokenUsage",
    "ToolCallArguments", "ToolCallBegin", "Update",
]  # fmt: skip


class Ended(NamedTuple):
    """The end of a sample: its last event. stop_reason: the stop string or id, as in `SampleDelta`."""

    finish_reason: str
    stop_reason: int | str | None = None


Event = ParserEvent | Ended


class OutputParser(Protocol):
    """Splits the text of one sample into events: a `SampleParser`, which says what these mean."""

    @property
    def ended(self) -> bool: ...
    @property
    def reasons(self) -> bool: ...
    @property
    def may_reason(self) -> bool: ...
    def feed(self, text: str) -> list[ParserEvent]: ...
    def finish(self) -> list[ParserEvent]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prompt, ready for the engine.

    Attributes:
        request_id: unique; the engine's. prompt_token_ids: in the vocabulary. params: with all defaults filled in.
        prompt: its text, for `echo`; None: it was given as ids, or rendered.
        parser: makes the parser of one sample's text; None: all text is content.
        nothing_new: only the prompt is wanted (max_tokens 0): the engine makes one token, which is left out.
        priority, pooling, client, timeout, progress: as in `ClientRequest`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None
    parser: Callable[[], OutputParser] | None = None
    nothing_new: bool = False
    priority: int | None = None
    pooling: Pooling | None = None
    client: str = ""
    timeout: float | None = None
    progress: bool = False

    def request(self) -> ClientRequest:
        return ClientRequest(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            params=self.params,
            priority=self.priority,
            pooling=self.pooling,
            client=self.client,
            timeout=self.timeout,
            progress=self.progress,
        )


class SampleUpdate(NamedTuple):
    """What is new of the sample `number`. token_ids, logprobs: also of those whose text is held back."""

    number: int
    events: Sequence[Event]
    token_ids: Sequence[int] = ()
    logprobs: LogprobRows | None = None


class Update(NamedTuple):
    """What is new of a request. num_computed: prompt tokens that are computed so far."""

    samples: Sequence[SampleUpdate]
    prompt_logprobs: LogprobRows | None = None
    num_computed: int = 0


@dataclass(slots=True)
class TokenUsage:
    """Tokens of a request so far. completion_tokens: of all samples; reasoning_tokens: those of them that reason."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


class _Sample:
    """The text of one sample, and its events."""

    __slots__ = ("_detokenizer", "_nothing_new", "_parser", "_trim", "finish_reason", "reasoning_tokens")

    def __init__(self, tokenizer: Tokenizer | None, generation: Generation) -> None:
        core = generation.params.core
        self._detokenizer = None
        if tokenizer is not None and core.detokenize and generation.pooling is None:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                stop=core.stop_strings,
                skip_special_tokens=core.skip_special_tokens,
                include_stop_str_in_output=core.include_stop_str_in_output,
                min_tokens=core.min_tokens,
            )
        self._parser = generation.parser() if generation.parser is not None else None
        self._trim = _Trim()
        self._nothing_new = generation.nothing_new
        self.finish_reason: str | None = None
        self.reasoning_tokens = 0

    def take(self, delta: SampleDelta) -> SampleUpdate:
        """Raises what a tokenizer or a parser raises."""
        if self._parser is None or not self._parser.may_reason:
            return self._take(delta)
        events, ids = list[Event](), list[int]()
        for one in _singles(delta):  # which shows which tokens are the reasoning's
            before = self._parser.reasons
            update = self._take(one)
            events += update.events
            ids += update.token_ids
            self.reasoning_tokens += len(update.token_ids) if before or self._parser.reasons else 0
            if self.finish_reason is not None:
                break
        logprobs = None if delta.logprobs is None else delta.logprobs.part(0, len(ids))
        return SampleUpdate(delta.sample_index, joined(events), tuple(ids), logprobs)

    def _take(self, delta: SampleDelta) -> SampleUpdate:
        index, ids, logprobs, reason, stop_reason = delta
        if self._nothing_new:
            self.finish_reason = "length"
            return SampleUpdate(index, (Ended("length"),))
        text = ""
        if self._detokenizer is not None:
            before = self._detokenizer.num_tokens
            matched = self._detokenizer.read(ids, reason)
            if matched is not None:
                kept = self._detokenizer.num_tokens - before
                ids, logprobs = ids[:kept], None if logprobs is None else logprobs.part(0, kept)
                reason, stop_reason = "stop", matched
            text = self._detokenizer.take()
        if reason is None and self._parser is None:
            return SampleUpdate(index, (Content(text),) if text else (), ids, logprobs)
        return SampleUpdate(index, self._events(text, reason, stop_reason), ids, logprobs)

    def _events(self, text: str, reason: str | None, stop_reason: int | str | None) -> list[Event]:
        events = list[Event]()
        if self._parser is None:
            events += [Content(text)] if text else []
        else:
            found = self._parser.feed(text) if text else []
            found = found if reason is None else [*found, *self._parser.finish()]
            if self._parser.ended and reason is None:
                reason, stop_reason = "stop", None
            events += self._trim.trimmed(found, ended=reason is not None)
        if reason is not None:
            called = self._trim.called and reason == "stop" and self._trim.is_complete
            self.finish_reason = "tool_calls" if called else reason
            events.append(Ended(self.finish_reason, stop_reason))
        return events


def _singles(delta: SampleDelta) -> Iterator[SampleDelta]:
    """The delta as one for each token, without log-probs."""
    for token in delta.token_ids[:-1]:
        yield SampleDelta(delta.sample_index, (token,))
    yield delta._replace(token_ids=delta.token_ids[-1:], logprobs=None)


def joined(events: Sequence[Event]) -> list[Event]:
    """The events, in which neighbours of one kind are one."""
    found = list[Event]()
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Content | Reasoning) and type(last) is type(event):
            found[-1] = type(event)(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments) and last.index == event.index:
            found[-1] = ToolCallArguments(event.index, last.text + event.text)
        else:
            found.append(event)
    return found


class _Trim:
    """Leaves out white space around calls. called: whether there was a call."""

    __slots__ = ("_arguments", "_behind", "_held", "called")

    def __init__(self) -> None:
        self._held = ""  # white space at the end of the content so far
        self._behind = False  # the last event was a call's
        self._arguments = list[str]()  # of the last call
        self.called = False

    @property
    def is_complete(self) -> bool:
        """Whether the last call can be made: a stop string, too, may have cut its arguments."""
        try:
            json.loads("".join(self._arguments))
        except (ValueError, RecursionError):
            return False
        return True

    def trimmed(self, events: Sequence[ParserEvent], ended: bool) -> list[ParserEvent]:
        kept = list[ParserEvent]()
        for event in events:
            if isinstance(event, Content):
                kept += self._content(event.text)
                continue
            if isinstance(event, ToolCallBegin):
                self._held, self._behind, self.called = "", True, True
                self._arguments = []
            elif isinstance(event, ToolCallArguments):
                self._arguments.append(event.text)
            kept.append(event)
        if ended and self._held and not self.called:
            kept.append(Content(self._held))
        return kept

    def _content(self, text: str) -> list[ParserEvent]:
        text = text.lstrip() if self._behind else self._held + text
        if not text:
            return []
        self._behind, shown = False, text.rstrip()
        self._held = text[len(shown) :]
        return [Content(shown)] if shown else []


class Running:
    """A request that runs. It is read by one task, and closed by the one that stops it; dropping it aborts it.

    Attributes:
        generation: what runs. usage: its tokens so far. seed: of its draws, once the engine said it.
        first_scheduled: when it first ran, monotonic seconds; None: it has not.
        pooled: the vector of a request that pools, once it has ended.
    """

    def __init__(self, generation: Generation, stream: RequestStream, tokenizer: Tokenizer | None) -> None:
        self.generation, self._stream = generation, stream
        self.usage = TokenUsage(prompt_tokens=len(generation.prompt_token_ids))
        self.seed: int | None = None
        self.first_scheduled: float | None = None
        self.pooled: Float32 | None = None
        self._samples = [_Sample(tokenizer, generation) for _ in range(generation.params.core.n)]

    @classmethod
    async def start(cls, client: EngineClient, generation: Generation, tokenizer: Tokenizer | None) -> Running:
        """Returns when the engine has taken it. Raises what `EngineClient.add` does."""
        return cls(generation, await client.add(generation.request()), tokenizer)

    @property
    def finish_reasons(self) -> list[str | None]:
        """Of each sample; None: it has not ended."""
        return [sample.finish_reason for sample in self._samples]

    async def update(self) -> Update | None:
        """What is new, as soon as there is something; None: it has ended, or was closed.

        Raises the `RequestError` of a request that failed. It is closed then.
        """
        try:
            delta = await anext(self._stream)
        except StopAsyncIteration:
            return None
        if delta.error is not None:
            raise delta.error
        usage = self.usage
        usage.cached_tokens, self.seed, self.pooled = delta.num_cached_tokens, delta.seed, delta.pooled
        self.first_scheduled = self.first_scheduled or delta.first_scheduled
        updates = []
        for each in delta.samples:
            sample = self._samples[each.sample_index]
            if sample.finish_reason is not None:
                continue  # a stop string ended it; this was on its way
            try:
                update = sample.take(each)
            except BaseException as error:  # a tokenizer's, or a parser's
                self.close()
                if isinstance(error, NanoEngineError) or not is_failure(error):
                    raise
                raise text_failure(error) from error
            usage.completion_tokens += len(update.token_ids)
            if sample.reasoning_tokens:
                usage.reasoning_tokens = sum(each.reasoning_tokens for each in self._samples)
            updates.append(update)
            if sample.finish_reason is not None and each.finish_reason is None:
                self._stream.abort_sample(each.sample_index)
        return Update(updates, delta.prompt_logprobs, delta.num_computed_tokens)

    def close(self) -> None:
        """Abort it if it still runs; `update` then returns None. Idempotent."""
        self._stream.close()
