"""From the scheduler's updates to the deltas that clients get. Tokens only: a client makes text of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nanoengine.api.deltas import FinishReason, Float32, LogprobRows, RequestDelta, SampleDelta
from nanoengine.api.errors import ParamsError, RequestError
from nanoengine.core.request import Request, int32_bytes, request_seed
from nanoengine.core.scheduling.messages import Update
from nanoengine.params.generated import NOTHING, Beginning
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.preparation import Task

Sink = Callable[[RequestDelta], None]
ALL = -2  # samples of a request
_new = tuple.__new__  # quicker than the constructor of a named tuple; it takes all fields, in their order


@dataclass(slots=True)
class SampleState:
    """One sample of a request. every: as in `Engine.add_request`. reported: output tokens that its client has."""

    request: Request
    every: int
    reported: int = 0
    finish_reason: FinishReason | None = None

    def delta(
        self,
        finish_reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
        logprobs: LogprobRows | None = None,
    ) -> SampleDelta:
        """All that its client does not have yet. `logprobs`: of these tokens."""
        request, self.finish_reason = self.request, finish_reason
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
    cache_key: bytes = b""  # this and the next two: as in `Request`
    prompt_bytes: bytes = b""
    block_hashes: Sequence[bytes] = ()
    task: Task | None = None  # what must be done before it starts
    first_scheduled: float | None = None  # seconds on the monotonic clock

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ParamsError(f"every must be a whole number of tokens from 1 up, not {self.every!r}")

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
                client=given.client,
                cache_key=self.cache_key,
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
        return _new(
            RequestDelta,
            (
                self.given.request_id, samples, finished, prompt_logprobs, cached, computed, seed, self.first_scheduled,
                pooled, error,
            ),
        )  # fmt: skip

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


Ended = tuple[Request, FinishReason]


def deltas_of(
    updates: Sequence[Update], known: Mapping[str, RequestState]
) -> tuple[list[RequestDelta], list[Ended], dict[str, RequestError]]:
    """What a step's updates mean for the requests that are `known`, by request id.

    Returns the deltas that are due, one a request; the samples that ended; the error of each request that failed, by
    request id.
    """
    ended: list[Ended] = []
    failed: dict[str, RequestError] = {}
    several: dict[str, tuple[RequestState, list[SampleDelta], list[LogprobRows]]] = {}
    deltas: list[RequestDelta] = []
    for request, new, finish_reason, stop_reason, drawn, prompt, error, pooled in updates:
        plain = finish_reason is None and drawn is None and prompt is None and error is None
        if plain and len(request.output_token_ids) < request.report_at:
            continue
        state = known.get(request.parent)
        if state is None:
            continue
        if error is not None:
            failed.setdefault(request.parent, error)
            continue
        sample: tuple[SampleDelta, ...] = ()
        if new or finish_reason is not None:
            sample = (state.samples[request.sample_index].delta(finish_reason, stop_reason, drawn),)
        if finish_reason is not None:
            ended.append((request, finish_reason))
        if len(state.samples) == 1:
            deltas.append(state.delta(sample, prompt, pooled))
            continue
        _, samples, prompts = several.setdefault(request.parent, (state, [], []))
        samples += sample
        if prompt is not None:  # of one sample only
            prompts.append(prompt)
    for state, samples, prompts in several.values():
        deltas.append(state.delta(tuple(samples), prompts[0] if prompts else None))
    return deltas, ended, failed


def _cache_key(salt: str) -> bytes:
    """What the prefix cache hashes and compares with each block: at most 64 bytes, however long the salt is."""
    key = salt.encode()
    return key if len(key) < 64 else hashlib.blake2b(key).digest()
