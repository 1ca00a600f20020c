"""A client of an engine that does not exist: scripted tokens; it can die, refuse and be slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nanoengine.api.deltas import FinishReason, LogprobRows, RequestDelta, SampleDelta
from nanoengine.api.errors import EngineUnavailable, RequestError
from nanoengine.service.client import (
    ClientRequest,
    DeltaBox,
    EngineInfo,
    Health,
    RequestStream,
    ServiceStats,
    Usage,
    of_id,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the fake answers one request with.

    Attributes:
        samples: the tokens of each sample; of fewer samples than `n`, the last one is repeated.
        finish_reason, stop_reason: of each sample. They are cut by max_tokens and by stop_token_ids as an engine does.
        chunk: tokens in a delta. delay: seconds before each delta.
        cached: tokens of the prompt that the prefix cache had. seed: as in `RequestDelta`.
        error: ends the request instead of its last delta.
    """

    samples: Sequence[Sequence[int]]
    finish_reason: FinishReason = "stop"
    stop_reason: int | str | None = None
    chunk: int = 1
    delay: float = 0.0
    cached: int = 0
    seed: int = 0
    error: RequestError | None = None
    pooled: Sequence[float] | None = None


class FakeEngine:
    """An `EngineClient` with a script.

    Attributes:
        answer: makes the answer of a request; it may raise what `add` is to raise.
        added, usages, aborted: what the fake was asked for: requests, usages, (request id, sample or None).
        info, service_stats, prometheus: what it answers; they may be replaced.
    """

    def __init__(self, answer: Callable[[ClientRequest], Answer], info: EngineInfo | None = None) -> None:
        self.answer = answer
        self.info = info or EngineInfo(model="fake", tokenizer=None, vocab_size=256, max_model_len=4096)
        self.service_stats, self.prometheus = ServiceStats(), b""
        self.added: list[ClientRequest] = []
        self.usages: list[Usage] = []
        self.aborted: list[tuple[str, int | None]] = []
        self._open: dict[str, _Run] = {}
        self._dead: str | None = None
        self._draining = False

    @property
    def health(self) -> Health:
        if self._dead is not None:
            return Health(alive=False, ready=False, draining=self._draining, reason=self._dead)
        reason = "the engine is draining" if self._draining else None
        return Health(alive=True, ready=not self._draining, draining=self._draining, reason=reason)

    def die(self, reason: str = "the engine's process has ended") -> None:
        """All open requests fail, and all new ones are refused, until `revive`."""
        self._dead = reason
        for run in list(self._open.values()):
            run.end(EngineUnavailable(reason))

    def revive(self) -> None:
        self._dead = None

    async def add(self, request: ClientRequest) -> RequestStream:
        self.added.append(request)
        if self._dead is not None or self._draining:
            raise EngineUnavailable(self._dead or "the engine is draining")
        if request.request_id in self._open:
            raise RequestError("duplicate_id", f"request {request.request_id!r} is still running; give another id")
        run = _Run(request, self.answer(request), self._open)
        self._open[request.request_id] = run

        def abort(index: int | None) -> None:
            self.aborted.append((request.request_id, index))
            run.abort(index)

        return RequestStream(request.request_id, run.box, abort)

    async def abort(self, request_id: str) -> int:
        self.aborted.append((request_id, None))
        found = [run for name, run in self._open.items() if of_id(name, request_id)]
        for run in found:
            run.abort(None)
        return len(found)

    async def stats(self) -> ServiceStats:
        return replace(self.service_stats, requests=len(self._open), draining=self._draining)

    async def metrics(self) -> bytes:
        return self.prometheus

    async def count(self, usage: Usage) -> None:
        self.usages.append(usage)

    async def trace(self, seconds: float) -> bytes:
        return b"[]"

    async def drain(self, seconds: float) -> bool:
        self._draining = True
        runs = [run.task for run in self._open.values()]
        if runs:
            await asyncio.wait(runs, timeout=seconds)
        return not self._open

    async def close(self) -> None:
        self.die("the client is closed")


class _Run:
    """One request that runs."""

    def __init__(self, request: ClientRequest, answer: Answer, runs: dict[str, _Run]) -> None:
        self.box = DeltaBox()
        self._request, self._answer, self._runs = request, answer, runs
        self._ended: set[int] = set()
        self.task = asyncio.get_running_loop().create_task(self._go())

    def end(self, error: RequestError) -> None:
        self.task.cancel()
        self._put(RequestDelta(self._request.request_id, finished=True, error=error))

    def abort(self, index: int | None) -> None:
        if index is not None:
            self._ended.add(index)
        elif self._request.request_id in self._runs:
            self.task.cancel()
            left = [i for i in range(self._request.params.core.n) if i not in self._ended]
            samples = tuple(SampleDelta(i, finish_reason="abort") for i in left)
            self._put(RequestDelta(self._request.request_id, samples, True, seed=self._answer.seed))

    def _put(self, delta: RequestDelta) -> None:
        if delta.finished and self._runs.get(self._request.request_id) is self:
            del self._runs[self._request.request_id]
        self.box.put(delta)

    async def _go(self) -> None:
        answer, prompt, n = self._answer, self._request.prompt_token_ids, self._request.params.core.n
        began = time.monotonic()
        plans = {i: self._plan(answer.samples[min(i, len(answer.samples) - 1)]) for i in range(n)}
        done, first = dict.fromkeys(plans, 0), True
        while True:
            await asyncio.sleep(answer.delay)
            samples = []
            for i, (tokens, reason, stopped_by) in plans.items():
                if i in self._ended:
                    continue
                new = tuple(tokens[done[i] : done[i] + answer.chunk])
                at, done[i] = len(prompt) + done[i], done[i] + len(new)
                last = done[i] >= len(tokens)
                if last:
                    self._ended.add(i)
                rows = None if self._request.params.core.logprobs is None else _rows(new, at, self._logprobs())
                samples.append(SampleDelta(i, new, rows, *((reason, stopped_by) if last else (None, None))))
            finished = len(self._ended) == n
            error = answer.error if finished else None
            self._put(
                RequestDelta(
                    self._request.request_id,
                    () if error is not None else tuple(samples),
                    finished,
                    self._prompt_rows() if first else None,
                    answer.cached,
                    len(prompt),
                    answer.seed,
                    began,
                    None if answer.pooled is None or not finished else np.asarray(answer.pooled, np.float32),
                    error,
                )
            )
            first = False
            if finished:
                return

    def _plan(self, tokens: Sequence[int]) -> tuple[Sequence[int], FinishReason, int | str | None]:
        core = self._request.params.core
        for at, token in enumerate(tokens):
            if token in (core.stop_token_ids or ()):
                return tokens[: at + 1], "stop", token
            if at + 1 == core.max_tokens and at + 1 < len(tokens):
                return tokens[: at + 1], "length", None
        return tokens, self._answer.finish_reason, self._answer.stop_reason

    def _logprobs(self) -> int:
        return max(0, self._request.params.core.logprobs or 0)

    def _prompt_rows(self) -> LogprobRows | None:
        wanted = self._request.params.core.prompt_logprobs
        return None if wanted is None else _rows(self._request.prompt_token_ids[1:], 1, max(0, wanted))


def _rows(tokens: Sequence[int], position: int, tops: int) -> LogprobRows:
    """Log-probs that are a plain function of the token: -token / 100; of the likeliest ones, ids 0, 1, …: -id / 100."""
    count, best = len(tokens), range(tops)
    return LogprobRows(
        rows=np.zeros(count, np.int32),
        positions=np.arange(position, position + count, dtype=np.int32),
        token_ids=np.asarray(tokens, np.int32),
        logprobs=np.asarray(tokens, np.float32) / np.float32(-100),
        ranks=np.asarray(tokens, np.int32) + 1,
        top_ids=np.asarray([*best] * count, np.int32),
        top_logprobs=np.asarray([*best] * count, np.float32) / np.float32(-100),
        top_offsets=np.arange(count + 1, dtype=np.int32) * tops,
    )


def scripted(
    answers: Mapping[tuple[int, ...], Any], otherwise: Answer | None = None
) -> Callable[[ClientRequest], Answer]:
    """The answer of each prompt, by its token ids: an `Answer`, or the tokens of one."""

    def answer(request: ClientRequest) -> Answer:
        found = answers.get(request.prompt_token_ids, otherwise)
        if found is None:
            raise RequestError("invalid_prompt", f"the script has no prompt {request.prompt_token_ids}")
        return found if isinstance(found, Answer) else Answer(samples=[found])

    return answer
