"""From the scheduler's updates to the deltas that clients get. Tokens only: a client makes text of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nanoengine.api.deltas import FinishReason, Float32, LogprobRows, RequestDelta, SampleDelta, join_rows
from nanoengine.api.errors import ParamsError, RequestError
from nanoengine.core.request import Request, int32_bytes
from nanoengine.core.scheduling.messages import Update
from nanoengine.params.generated import NOTHING, Beginning
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.preparation import Task
from nanoengine.params.seeds import request_seed

Sink = Callable[[RequestDelta], None]
ALL = -2  # samples of a request
_new = tuple.__new__  # quicker than the constructor of a named tuple; it takes all fields, in their order


@dataclass(slots=True)
class SampleState:
    """One sample of a request. every: as in `Engine.add_request`. reported: output tokens that its client has.
    logprobs: of those that it does not have yet."""

    request: Request
    every: int
    reported: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[LogprobRows] = field(default_factory=list)

    def delta(self, finish_reason: FinishReason | None = None, stop_reason: int | str | None = None) -> SampleDelta:
        """All that its client does not have yet."""
        request, self.finish_reason = self.request, finish_reason
        logprobs, self.logprobs = join_rows(self.logprobs), []
        new = tuple(request.output_token_ids[self.reported :])
        self.reported += len(new)
        request.report_at = self.reported + self.every
        return _new(SampleDelta, (request.sample_index, new, logprobs, finish_reason, stop_reason))


@dataclass(slots=True)
class RequestState:
    """A request between `add_request` and its last delta."""

    given: CheckedRequest
    every: int = 1
    sink: Sink | None = None
    engine_seed: int = 0  # of which its own is made where its parameters have none
    ordinal: int = 0  # its number among all requests of the engine
    samples: list[SampleState] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)  # samples that were aborted before the request started
    prompt_bytes: bytes = b""  # this and the next one: as in `Request`
    block_hashes: Sequence[bytes] = ()
    task: Task | None = None  # what must be done before it starts
    first_scheduled: float | None = None  # seconds on the monotonic clock

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ParamsError(f"every must be a whole number of tokens from 1 up, not {self.every!r}")

    def hash_prompt(self, hashes_of: Callable[[bytes, bytes], Sequence[bytes]]) -> None:
        """Hash the prompt's blocks for the prefix cache, once for all samples. `hashes_of`: `BlockManager`'s."""
        self.prompt_bytes = int32_bytes(self.given.prompt_token_ids)
        self.block_hashes = hashes_of(self.prompt_bytes, self.given.cache_key)

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
                client=given.client,
                cache_key=given.cache_key,
                prompt_bytes=self.prompt_bytes,
                block_hashes=[*self.block_hashes],
                output_token_ids=[*begun.token_ids],
            )
            yield request, begun

    def add_sample(self, request: Request, begun: Beginning = NOTHING) -> None:
        self.samples.append(SampleState(request, self.every, len(begun.token_ids), begun.finish_reason))

    def unfinished(self, which: int = ALL) -> list[Request]:
        """Of all samples or of this one."""
        return [sample.request for sample in self._open(which)]

    def _open(self, which: int) -> list[SampleState]:
        return [s for i, s in enumerate(self.samples) if s.finish_reason is None and which in (i, ALL)]

    def delta(
        self,
        samples: tuple[SampleDelta, ...],
        prompt_logprobs: LogprobRows | None = None,
        pooled: Float32 | None = None,
        error: RequestError | None = None,
    ) -> RequestDelta:
        finished, cached, computed, seed = True, 0, 0, None
        if self.samples:
            request = self.samples[0].request
            cached, computed, seed = request.num_cached or 0, request.prompt_done, request.seed
            finished = error is not None or None not in [sample.finish_reason for sample in self.samples]
        name, begun = self.given.request_id, self.first_scheduled
        return RequestDelta(name, samples, finished, prompt_logprobs, cached, computed, seed, begun, pooled, error)

    def last_deltas(self, error: RequestError | None, which: int = ALL) -> list[RequestDelta]:
        """The last one of a request that fails with `error` or (None) is aborted, or of this sample: with the tokens so
        far. None of a sample that has ended, or that has not started: that is noted in `aborted`."""
        if not self.samples and which != ALL:
            self.aborted.append(which)
        elif not self.samples and error is None:
            for request, begun in self.requests():
                self.add_sample(request, begun)
        reason: FinishReason | None = "abort" if error is None else None
        left = tuple([sample.delta(reason) for sample in self._open(which)])
        return [self.delta(left, error=error)] if left or which == ALL else []


News = tuple[RequestState, RequestDelta]
_Several = dict[str, tuple[RequestState, list[SampleDelta], list[LogprobRows]]]


@dataclass(slots=True)
class Report:
    """What a step's updates mean for clients. news: the deltas that are due, one a request. ended: samples, and why.
    failed: request id -> error."""

    news: list[News] = field(default_factory=list)
    ended: list[tuple[Request, FinishReason]] = field(default_factory=list)
    failed: dict[str, RequestError] = field(default_factory=dict)

    @classmethod
    def of(cls, updates: Sequence[Update], known: Mapping[str, RequestState]) -> Report:
        """Of the requests that are `known`, by request id."""
        report, several = cls(), _Several()
        for update in updates:
            request, new, finish_reason, _, drawn, prompt, error, _ = update
            count = len(request.output_token_ids)
            goes_on = finish_reason is None and prompt is None and error is None
            if goes_on and drawn is None and count < request.report_at:
                continue
            state = known.get(request.parent)
            if state is None:
                continue
            if not goes_on or drawn is not None or len(state.samples) > 1:
                report._add(state, update, several)
                continue
            sample = state.samples[0]  # most deltas of streams are made right here
            if sample.reported + len(new) != count:
                new = tuple(request.output_token_ids[sample.reported :])
            sample.reported, request.report_at = count, count + sample.every
            samples, cached = (_new(SampleDelta, (0, new, None, None, None)),), request.num_cached or 0
            computed, begun = request.prompt_done, state.first_scheduled
            fields = (request.parent, samples, False, None, cached, computed, request.seed, begun, None, None)
            report.news.append((state, _new(RequestDelta, fields)))
        for state, each, prompts in several.values():
            report.news.append((state, state.delta(tuple(each), prompts[0] if prompts else None)))
        return report

    def _add(self, state: RequestState, update: Update, several: _Several) -> None:
        """Any update. `several`: what is new of requests of several samples."""
        request, new, finish_reason, stop_reason, drawn, prompt, error, pooled = update
        if error is not None:
            self.failed.setdefault(request.parent, error)
            return
        sample = state.samples[request.sample_index]
        sample.logprobs += [] if drawn is None else [drawn]
        if finish_reason is not None:
            self.ended.append((request, finish_reason))
        due = finish_reason is not None or (new and len(request.output_token_ids) >= request.report_at)
        made = (sample.delta(finish_reason, stop_reason),) if due else ()
        if not due and prompt is None:
            return
        if len(state.samples) == 1:
            self.news.append((state, state.delta(made, prompt, pooled)))
        else:
            _, samples, prompts = several.setdefault(request.parent, (state, [], []))
            samples += made
            prompts += [] if prompt is None else [prompt]  # of one sample only
