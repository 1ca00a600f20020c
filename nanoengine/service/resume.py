"""A request that is open at a client: what is needed to go on with it in another engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from nanoengine.api.deltas import LogprobRows, RequestDelta, SampleDelta
from nanoengine.api.errors import EngineUnavailable, NanoEngineError, RequestError
from nanoengine.service.client import ClientRequest, DeltaBox

MOST_RESUMES = 3  # without a new token between them: the request may be what ends the engines


class OpenStream:
    """One request, from `add` to its last delta. Nothing that its reader got is repeated or taken back.

    Attributes:
        taken: done when the engine has taken or refused the request.
        ended: samples that have ended, or that the reader wants no more of.
    """

    def __init__(self, request: ClientRequest, taken: asyncio.Future[None]) -> None:
        self.request, self.taken, self.box = request, taken, DeltaBox()
        n = request.params.core.n
        given = request.generated or ((),) * n
        self._tokens = [list(ids) for ids in given]
        self.ended: set[int] = set()
        self._finished: set[int] = set()  # of them, those whose end the reader has
        self._seed = request.params.core.seed
        self._prompt_rows = 0  # prompt log-probs that the reader has
        self._skip_rows = 0  # of them, those that this engine has still to repeat
        self._cached: int | None = None
        self._computed = 0
        self._first_scheduled: float | None = None
        self._began = time.monotonic()
        self._resumes = 0  # since the last token
        self._is_resumed = False

    @property
    def is_doubtful(self) -> bool:
        """It was in two engines that ended, and has got no token since."""
        return self._resumes >= 1

    def take(self, delta: RequestDelta) -> bool:
        """Give the reader what is new to it. Returns whether that was the last of it."""
        if not self.taken.done():  # the step loop's thread may be faster than the answer to `add`
            self.taken.set_result(None)
        if self._is_resumed:
            delta = self._new(delta)
        for sample in delta.samples:
            self._tokens[sample.sample_index] += sample.token_ids
            if sample.finish_reason is not None:
                self.ended.add(sample.sample_index)
                self._finished.add(sample.sample_index)
            self._resumes = 0
        self._computed = delta.num_computed_tokens
        if delta.prompt_logprobs is not None:
            self._prompt_rows += len(delta.prompt_logprobs.rows)
        if delta.seed is not None:
            self._seed, self._first_scheduled = delta.seed, delta.first_scheduled
            if delta.samples and self._cached is None:
                self._cached = delta.num_cached_tokens
        self.box.put(delta)
        return delta.finished or delta.error is not None

    def _new(self, delta: RequestDelta) -> RequestDelta:
        """Without what the reader has: prompt log-probs, and samples that ended in an engine before this one."""
        return delta._replace(
            samples=tuple(s for s in delta.samples if self._is_new(s)),
            prompt_logprobs=self._new_rows(delta.prompt_logprobs),
            num_cached_tokens=delta.num_cached_tokens if self._cached is None else self._cached,
            num_computed_tokens=max(self._computed, delta.num_computed_tokens),
            first_scheduled=self._first_scheduled or delta.first_scheduled,
        )

    def _is_new(self, sample: SampleDelta) -> bool:
        index = sample.sample_index
        return index not in self._finished and (index not in self.ended or sample.finish_reason is not None)

    def _new_rows(self, rows: LogprobRows | None) -> LogprobRows | None:
        if rows is None or not self._skip_rows:
            return rows
        count = len(rows.rows)
        skipped = min(count, self._skip_rows)
        self._skip_rows -= skipped
        return rows.part(skipped, count) if skipped < count else None

    def resumed(self, now: float) -> ClientRequest | None:
        """The request that goes on where this one is. None: all of its samples have ended, and its reader knows now.

        Raises `RequestError` where it cannot go on.
        """
        n = self.request.params.core.n
        if len(self.ended) == n:
            left = [i for i in range(n) if i not in self._finished]
            samples = tuple(SampleDelta(i, finish_reason="abort") for i in left)
            self.box.put(RequestDelta(self.request.request_id, samples, True, seed=self._seed))
            return None
        self._resumes += 1
        if self._resumes > MOST_RESUMES:
            raise EngineUnavailable(f"{self._resumes} engines have ended while this request ran, without a new token")
        timeout, started = self.request.timeout, self._first_scheduled is not None or any(self._tokens)
        if timeout is not None and not started:
            timeout = max(self._began + timeout - now, 0.001)
        self._is_resumed, self._skip_rows = True, self._prompt_rows
        params = self.request.params
        return replace(
            self.request,
            params=params if self._seed is None else params.replace(seed=self._seed),
            generated=tuple(map(tuple, self._tokens)) if any(self._tokens) else (),
            timeout=None if started else timeout,
        )

    def fail(self, error: NanoEngineError) -> None:
        """Refused, or ended by an error."""
        if not self.taken.done():
            self.taken.set_exception(error)
            return
        failure = error if isinstance(error, RequestError) else RequestError("engine_failed", str(error))
        self.box.put(RequestDelta(self.request.request_id, finished=True, seed=self._seed, error=failure))
