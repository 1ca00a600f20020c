"""From the scheduler's updates to `RequestOutput`s: text, stop strings, log-probs, metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from nanoengine.api.deltas import LogprobRows
from nanoengine.api.errors import RequestError, is_failure, text_failure
from nanoengine.core.request import Request, int32_bytes, request_seed
from nanoengine.core.scheduling.messages import Update
from nanoengine.params.generated import NOTHING, Beginning
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.preparation import Task
from nanoengine.text import IncrementalDetokenizer, Tokenizer

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of a token under the raw logits; rank 1 is the likeliest; the token's own text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Seconds on the monotonic clock. `arrival`: when added; others None until they happen.

    num_generated: tokens of all samples, without those that they began with. longest: of the sample that has the most.
    ttft: arrival to first token. itl: mean time between the tokens of that longest sample.
    """

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_generated: int = 0
    longest: int = 0

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def itl(self) -> float | None:
        if self.first_token is None or self.finished is None or self.longest < 2:
            return None
        return (self.finished - self.first_token) / (self.longest - 1)


class _CopiedWhenRead:
    """Base of a frozen dataclass with fields that are copied when first read, as most never are: `copy_when_read`."""

    __slots__ = ("_growing",)
    _growing: dict[str, tuple[list[Any], int]]  # field -> the list to copy, and how many of its entries

    if not TYPE_CHECKING:  # a type checker must see no names but the fields

        def __getattr__(self, name: str) -> Any:
            """Python calls this for a name that it does not find, such as a slot without a value."""
            if name == "_growing" or name not in getattr(self, "_growing", ()):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            entries, count = self._growing[name]
            value = tuple(entries[:count])
            object.__setattr__(self, name, value)
            return value


def copy_when_read(output: _CopiedWhenRead, fields: Mapping[str, list[Any]]) -> None:
    """Let each field be the tuple of its list's present entries, copied when the field is first read.

    Until then more entries may be appended; those that are there must stay.
    """
    for name in fields:
        object.__delattr__(output, name)
    object.__setattr__(output, "_growing", {name: (entries, len(entries)) for name, entries in fields.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput(_CopiedWhenRead):
    """One sample of a request.

    Attributes:
        text, token_ids: all so far. They begin with `num_given_chars` characters and `num_given_tokens` tokens that the
            request began with (`generated`).
        stop_reason: the stop string or stop token id that ended it; None for EOS.
        logprobs: of each token; None for a given one. cumulative_logprob: of the others.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    num_given_tokens: int = 0
    num_given_chars: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What a request has so far: cumulative, not a delta. If it was refused or failed: `error`, and no `outputs`.

    `seed`: of its draws; that of the parameters, or else one that the engine made. None if it was refused.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    num_cached_tokens: int = 0
    seed: int | None = None
    error: RequestError | None = None


Logprobs = dict[int, Logprob]

TEXT_BLOCK = 32  # tokens whose text is decoded at once where only the final output is wanted


@dataclass(slots=True)
class SampleState:
    """What one sample has so far.

    Attributes:
        token_ids: without those of an update that come after a stop string.
        num_given, given_chars: tokens that it began with, and characters of their text.
        decode_at: below so many tokens, new ones are only kept; their text is decoded later.
        ended: the output of a sample that has ended.
    """

    request: Request
    detokenizer: IncrementalDetokenizer | None
    logprobs: list[Logprobs | None] | None
    token_ids: list[int] = field(default_factory=list)
    num_given: int = 0
    given_chars: int = 0
    decode_at: int = 0
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    ended: CompletionOutput | None = None

    def decode(self) -> None:
        """Decode the tokens that have no text yet. A stop string found there ends the sample."""
        assert self.detokenizer is not None
        matched = self.detokenizer.read(self.token_ids[self.detokenizer.num_tokens :], self.finish_reason)
        if matched is not None:
            self.finish_reason, self.stop_reason, end = "stop", matched, self.detokenizer.num_tokens
            del self.token_ids[end:], self.request.output_token_ids[end:]

    def abort(self) -> None:
        self.finish_reason = "abort"
        if self.detokenizer is not None:
            self.decode()
        self.finish_reason, self.stop_reason = "abort", None

    def output(self, index: int) -> CompletionOutput:
        """The sample's output now, at a cost that does not grow with the sample."""
        if self.ended is not None:
            return self.ended
        output = CompletionOutput(
            index=index,
            text=self.detokenizer.text if self.detokenizer is not None else "",
            token_ids=(),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            num_given_tokens=self.num_given,
            num_given_chars=self.given_chars,
        )
        lists: dict[str, list[Any]] = {"token_ids": self.token_ids}
        if self.logprobs is not None:
            lists["logprobs"] = self.logprobs
        copy_when_read(output, lists)
        if self.finish_reason is not None:
            self.ended = output = replace(output)  # which reads all fields: it does not need the lists
        return output


@dataclass(slots=True)
class RequestState:
    """A request between `add_request` and its last output."""

    given: CheckedRequest
    arrival: float  # seconds on the monotonic clock, as the other times
    final_only: bool = False  # one output, at the end, instead of one a step
    sink: Callable[[RequestOutput], None] | None = None
    engine_seed: int = 0  # of which its own is made where its parameters have none
    ordinal: int = 0  # its number among all requests of the engine
    samples: list[SampleState] = field(default_factory=list)
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    cache_key: bytes = b""  # this and the next two: as in `Request`
    prompt_bytes: bytes = b""
    block_hashes: Sequence[bytes] = ()
    task: Task | None = None  # what must be done before it starts
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None

    def __post_init__(self) -> None:
        if self.given.params.prompt_logprobs is not None:
            self.prompt_logprobs = (None,)  # of the first token: there is no token before it

    def hash_prompt(self, hashes_of: Callable[[bytes, bytes], Sequence[bytes]]) -> None:
        """Hash the prompt's blocks for the prefix cache, once for all samples. `hashes_of`: `BlockManager`'s."""
        self.cache_key = _cache_key(self.given.params.cache_salt or "")
        self.prompt_bytes = int32_bytes(self.given.prompt_token_ids)
        self.block_hashes = hashes_of(self.prompt_bytes, self.cache_key)

    def requests(self) -> Iterator[tuple[Request, Beginning]]:
        """The scheduler's requests, one for each sample, and what it begins with."""
        given, params, prompt = self.given, self.given.params, list(self.given.prompt_token_ids)
        # The prompt's log-probs are the same for all samples: only the first one that runs asks for them.
        siblings = replace(params, prompt_logprobs=None) if params.n > 1 else params
        first = next((i for i, begun in enumerate(given.begun) if begun.finish_reason is None), 0)
        for index, begun in enumerate(given.begun or [NOTHING] * params.n):
            request = Request(
                id=f"{given.request_id}/{index}",
                parent=given.request_id,
                prompt_token_ids=prompt,
                params=params if index == first else siblings,
                seed=request_seed(self.engine_seed, self.ordinal) if params.seed is None else params.seed,
                sample_index=index,
                arrival=self.ordinal,
                priority=given.priority,
                cache_key=self.cache_key,
                prompt_bytes=self.prompt_bytes,
                block_hashes=[*self.block_hashes],
                output_token_ids=[*begun.token_ids],
            )
            yield request, begun

    def unfinished(self) -> list[Request]:
        return [s.request for s in self.samples if s.finish_reason is None]

    def output(self, error: RequestError | None = None) -> RequestOutput:
        lengths = [len(sample.token_ids) - sample.num_given for sample in self.samples]
        return RequestOutput(
            request_id=self.given.request_id,
            prompt=self.given.prompt,
            prompt_token_ids=self.given.prompt_token_ids,
            outputs=[] if error else [sample.output(i) for i, sample in enumerate(self.samples)],
            finished=self.finished is not None,
            metrics=RequestMetrics(
                arrival=self.arrival,
                first_scheduled=self.first_scheduled,
                first_token=self.first_token,
                finished=self.finished,
                num_generated=sum(lengths),
                longest=max(lengths, default=0),
            ),
            prompt_logprobs=None if error else self.prompt_logprobs,
            num_cached_tokens=(self.samples[0].request.num_cached or 0) if self.samples else 0,
            seed=self.samples[0].request.seed if self.samples else None,
            error=error,
        )


class OutputProcessor:
    """Makes outputs of the scheduler's updates: text where there is a tokenizer, stop strings, log-probs, metrics."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer

    def make_sample(self, request: Request, begun: Beginning = NOTHING) -> SampleState:
        """`request`: as the scheduler has it. `begun`: what it begins with."""
        given = len(begun.token_ids)
        return SampleState(
            request,
            begun.reader if given else IncrementalDetokenizer.from_params(self.tokenizer, request.params),
            None if request.params.logprobs is None else [None] * given,
            [*begun.token_ids],
            num_given=given,
            given_chars=len(begun.reader.text) if begun.reader is not None else 0,
            finish_reason=begun.finish_reason,
            stop_reason=begun.stop_reason,
        )

    def apply(
        self, updates: Sequence[Update], known: Mapping[str, RequestState], now: float
    ) -> tuple[list[RequestOutput], list[tuple[Request, FinishReason]], dict[str, RequestError]]:
        """Add a step's updates to the requests that are `known`, by request id.

        Returns:
            the outputs to publish; the samples that ended, of which the scheduler does not know those that a stop
            string ended; the error of each request that failed, by request id.
        """
        ended: list[tuple[Request, FinishReason]] = []
        failed: dict[str, RequestError] = {}
        touched: dict[str, RequestState] = {}
        for update in updates:
            request, new, finish_reason, _, drawn, prompt, error, _ = update
            request_id = request.parent
            state = known.get(request_id)
            if state is None or request_id in failed:
                continue
            sample = state.samples[request.sample_index]
            tokens = sample.token_ids
            if len(tokens) < sample.decode_at and new and finish_reason is None and drawn is None and prompt is None:
                tokens += new
                continue
            if error is None:
                try:
                    reason = self._take(state, update, now)
                except BaseException as raised:
                    if not is_failure(raised):
                        raise
                    error = text_failure(raised)
            if error is not None:
                failed[request_id] = error
                touched.pop(request_id, None)
                continue
            touched[request_id] = state
            if reason is not None:
                ended.append((request, reason))
        return self._outputs(touched.values(), now), ended, failed

    def end(self, state: RequestState, error: RequestError | None, now: float) -> RequestOutput:
        """The last output of a request that fails with `error` or (None) is aborted: then with what it has so far."""
        if not state.samples and error is None:  # it is aborted before it could start: its output has all samples
            for request, begun in state.requests():
                state.samples.append(self.make_sample(request, begun))
        for sample in state.samples:
            if sample.finish_reason is None and error is None:
                try:
                    sample.abort()
                except BaseException as raised:
                    if not is_failure(raised):
                        raise
                    error = text_failure(raised)
        state.finished = now
        return state.output(error)

    def _take(self, state: RequestState, update: Update, now: float) -> FinishReason | None:
        """Add an update to its sample. Returns the sample's finish_reason; None: it goes on."""
        sample = state.samples[update.request.sample_index]
        if update.prompt_logprobs is not None and state.prompt_logprobs is not None:
            state.prompt_logprobs += tuple(self._logprobs(update.prompt_logprobs))
        if not update.new_token_ids and update.finish_reason is None:
            return None
        if state.first_token is None and update.new_token_ids:  # a sample that ends without free blocks may get none
            state.first_token = now
        sample.finish_reason, sample.stop_reason = update.finish_reason, update.stop_reason
        before = len(sample.token_ids)
        sample.token_ids += update.new_token_ids
        if sample.detokenizer is not None:
            sample.decode()
        if state.final_only and not state.given.params.stop:
            sample.decode_at = len(sample.token_ids) + TEXT_BLOCK - 1
        if sample.logprobs is not None and update.sampled_logprobs is not None:
            kept = len(sample.token_ids) - before
            sample.logprobs += self._logprobs(update.sampled_logprobs)[:kept]
            for value in update.sampled_logprobs.logprobs[:kept].tolist():  # one by one, to round as in steps of one
                sample.cumulative_logprob += value
        return sample.finish_reason

    def _outputs(self, states: Iterable[RequestState], now: float) -> list[RequestOutput]:
        """Of the requests that have ended, and of those whose client wants an output for each step."""
        outputs = []
        for state in states:
            if all(sample.finish_reason is not None for sample in state.samples):
                state.finished = now
            if state.finished is not None or not state.final_only:
                outputs.append(state.output())
        return outputs

    def _logprobs(self, rows: LogprobRows) -> list[Logprobs]:
        """One dict for each position: the best tokens first, then the token itself if it is not one of them.

        Of tokens with equal log-probs each has the lowest of their ranks.
        """
        out: list[Logprobs] = []
        for i, (start, end) in enumerate(pairwise(rows.top_offsets.tolist())):
            ids, values = rows.top_ids[start:end].tolist(), rows.top_logprobs[start:end].tolist()
            best: Logprobs = {}
            rank = 1
            for at, (token_id, value) in enumerate(zip(ids, values, strict=True)):
                rank = at + 1 if at and value < values[at - 1] else rank
                best[token_id] = Logprob(value, rank, self._token_text(token_id))
            chosen = int(rows.token_ids[i])
            best[chosen] = Logprob(float(rows.logprobs[i]), int(rows.ranks[i]), self._token_text(chosen))
            out.append(best)
        return out

    def _token_text(self, token_id: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.token_text(token_id)


def _cache_key(salt: str) -> bytes:
    """What the prefix cache hashes and compares with each block: at most 64 bytes, however long the salt is."""
    key = salt.encode()
    return key if len(key) < 64 else hashlib.blake2b(key).digest()
