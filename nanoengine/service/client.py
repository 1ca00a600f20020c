"""What a client of the engine sees, no matter whether the engine runs in this process or in another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from nanoengine.api.deltas import Pooling, RequestDelta
from nanoengine.params.pooling import PoolingDefaults
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.service.merge import merge_all

_MERGE_AT = 32  # deltas that a reader has not taken become one


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRequest:
    """A request, as a client adds it.

    Attributes:
        request_id: unique among the engine's unfinished requests, of all its clients. See also `of_id`.
        priority: lower runs first; None: that of the parameters.
        pooling: it wants a vector and no token; of `params` it takes only cache_salt and priority.
        generated: output tokens that it goes on behind, for each sample; () for none.
        every: a delta as soon as a sample has so many new tokens.
        client: who asks, for a fair policy, the limits and the counters.
        timeout: seconds until it must have started; else it fails with `RequestError("deadline")`.
        progress: send deltas while the prompt is computed, too.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int | None = None
    pooling: Pooling | None = None
    generated: tuple[tuple[int, ...], ...] = ()
    every: int = 1
    client: str = ""
    timeout: float | None = None
    progress: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a client must know of the engine to make prompts and parameters for it.

    Attributes:
        model: its folder or file. tokenizer: the folder of its tokenizer; None: there is none.
        vocab_size: ids are below it. max_model_len: most tokens of prompt and output.
        max_n, max_logprobs, scheduling_policy, chat_template_timeout (seconds), chat_template_memory (bytes): as in
            `EngineOptions`.
        sampling_names: the valid fields of `SamplingParams`. default_sampling: those that the model or the
            configuration sets. default_unsupported: what generation_config.json sets and the engine does not have.
        end_ids: end-of-text tokens. reasoning: as in `StructuredOutputsOptions`.
        pooling: how the model makes embeddings; None: the engine makes none.
        block_size, num_blocks: of the KV cache. max_num_seqs, max_num_batched_tokens: most requests and tokens a step.
        pid: the process that the engine runs in.
    """

    model: str
    tokenizer: str | None
    vocab_size: int
    max_model_len: int
    max_n: int = 64
    max_logprobs: int = 20
    sampling_names: frozenset[str] = frozenset()
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    default_unsupported: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()
    reasoning: str | int | None = None
    pooling: PoolingDefaults | None = None
    scheduling_policy: str = "fcfs"
    chat_template_timeout: float = 5.0
    chat_template_memory: int = 512 << 20
    block_size: int = 16
    num_blocks: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStats:
    """The engine now. Counts of samples are the scheduler's; counts of requests are the service's.

    Attributes:
        running, waiting: samples. preparing: requests whose constraint is being compiled.
        requests: open requests.
        queued_requests, queued_tokens: of them, those that have not started, and the tokens of their prompts. A request
            with n samples counts as n, and its prompt n times. queued_by_client: queued requests of each client.
        started_requests, started_tokens: what has left the queue since the start, counted in the same way.
        num_blocks, free_blocks: of the KV cache.
        steps, preemptions, prompt_tokens, prefix_hit_tokens, drafted, accepted: since the start.
        draining: it takes no new requests. uptime: seconds.
    """

    running: int = 0
    waiting: int = 0
    preparing: int = 0
    requests: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    queued_by_client: Mapping[str, int] = field(default_factory=dict)
    started_requests: int = 0
    started_tokens: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    draining: bool = False
    uptime: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the caller's side knows of a request that has ended, for the engine's counters.

    Attributes:
        prompt_tokens, cached_tokens, completion_tokens: as the user was answered.
        finish_reasons: of each sample. endpoint, status: HTTP path and status.
        ttft, duration: seconds from the request's arrival to its first token, and to its end; None: there was none.
    """

    client: str = ""
    endpoint: str = ""
    status: int = 200
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    ttft: float | None = None
    duration: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether the engine makes progress.

    Attributes:
        alive: the engine's process is there, and it made a step or said that it is idle within the deadline.
        ready: it is alive and takes new requests. draining: it takes none, and finishes those it has.
        since_progress: seconds since the last sign of the step loop. reason: why it is not ready.
    """

    alive: bool
    ready: bool
    draining: bool = False
    since_progress: float = 0.0
    reason: str | None = None


class DeltaBox:
    """Deltas that a stream has not returned yet. Clients refer to it and not to the stream: a stream that is dropped
    is collected, and so aborts its request. A reader that is slow finds one delta, merged, not many.

    Only the thread of the event loop may use it.
    """

    __slots__ = ("_deltas", "_waiter")

    def __init__(self) -> None:
        self._deltas: list[RequestDelta] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, delta: RequestDelta) -> None:
        if len(self._deltas) >= _MERGE_AT:
            self._deltas = [merge_all(self._deltas)]
        self._deltas.append(delta)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until a delta is there, or `wake` is called."""
        if not self._deltas:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def take(self) -> RequestDelta | None:
        """What is new, as one delta."""
        deltas, self._deltas = self._deltas, []
        return merge_all(deltas) if deltas else None


class RequestStream(AsyncIterator[RequestDelta]):
    """The deltas of one request. It ends behind the delta that is `finished` or has an `error`.

    One task at a time may read it. Closing it, or dropping it, aborts the request.
    """

    def __init__(self, request_id: str, box: DeltaBox, abort: Callable[[int | None], None]) -> None:
        """`abort`: aborts one sample, or (None) the request; it may be called when the request has ended."""
        self.request_id, self._box, self._abort = request_id, box, abort
        self._ended = False

    async def __anext__(self) -> RequestDelta:
        while not self._ended:
            delta = self._box.take()
            if delta is not None:
                self._ended = delta.finished or delta.error is not None
                return delta
            await self._box.wait()
        raise StopAsyncIteration

    def close(self) -> None:
        """Abort the request if it still runs; the stream ends. Idempotent."""
        if not self._ended:
            self._ended = True
            self._abort(None)
            self._box.wake()

    def abort_sample(self, index: int) -> None:
        """End one sample: its reader needs no more of it. What was on its way may still come."""
        if not self._ended:
            self._abort(index)

    def __aiter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self.close()


def of_id(request_id: str, name: str) -> bool:
    """Whether a request belongs to what its caller calls `name`: its id is that, or that, a space and more."""
    return request_id == name or request_id.startswith(f"{name} ")


class EngineClient(Protocol):
    """The engine, as one event loop uses it."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def health(self) -> Health: ...

    async def add(self, request: ClientRequest) -> RequestStream:
        """Returns when the engine has taken the request.

        Raises:
            RequestError: it is refused ("too_long", "duplicate_id", "overloaded" ...). ParamsError: its parameters are
            wrong. EngineUnavailable: there is no engine, or it is draining.
        """
        ...

    async def abort(self, request_id: str) -> int:
        """End the requests of any client that are `of_id`. Returns how many there were."""
        ...

    async def stats(self) -> ServiceStats: ...

    async def metrics(self) -> bytes:
        """The counters, as Prometheus reads them."""
        ...

    async def count(self, usage: Usage) -> None:
        """Add to the counters. Returns at once, and raises nothing where the engine is gone."""
        ...

    async def trace(self, seconds: float) -> bytes:
        """The steps of so many seconds, as JSON that chrome://tracing and Perfetto open."""
        ...

    async def drain(self, seconds: float) -> bool:
        """Take no new requests, of any client, and wait for the open ones. True: all have ended."""
        ...

    async def close(self) -> None:
        """Abort this client's requests and leave the engine."""
        ...
