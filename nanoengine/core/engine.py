"""The step loop: takes requests from a thread-safe inbox, keeps at most one step ahead of the device, gives outputs.

`LLM`, its streams and any server are clients of it. It speaks token ids; text is the output processor's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nanoengine.core.errors import EngineClosed, NanoEngineError, ParamsError, RequestError
from nanoengine.core.execution.executor import Executor, StepHandle
from nanoengine.core.output import OutputProcessor, RequestState
from nanoengine.core.request import Request, RequestOutput
from nanoengine.core.sampling_params import ParamsResolver, ResolvedParams, SamplingParams
from nanoengine.core.scheduling.scheduler import ScheduledStep, Scheduler, Update
from nanoengine.core.seeds import request_seed

Prompt = str | Sequence[int]
Sink = Callable[[RequestOutput], None]


class Encoder(Protocol):
    """Text to token ids; raises `TokenizerMissing` where there is no tokenizer."""

    def __call__(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """vocab_size: legal ids. max_model_len: prompt plus output. seed: of unseeded requests. overlap: run ahead."""

    vocab_size: int
    max_model_len: int
    seed: int
    overlap: bool


@dataclass(frozen=True, slots=True)
class _InFlight:
    step: ScheduledStep
    handle: StepHandle


class Engine:
    """Runs requests to their end, whatever any one of them does. Safe to call from several threads."""

    def __init__(
        self,
        limits: EngineLimits,
        scheduler: Scheduler,
        executor: Executor,
        outputs: OutputProcessor,
        resolver: ParamsResolver,
        encode: Encoder,
    ) -> None:
        self.limits, self.scheduler, self.outputs = limits, scheduler, outputs
        self._executor, self._resolver, self._encode = executor, resolver, encode
        self._inbox: deque[Callable[[], None]] = deque()
        self._known: dict[str, RequestState] = {}  # from add_request to the last output
        self._in_flight: deque[_InFlight] = deque()
        self._ready: list[RequestOutput] = []
        self._lock = threading.RLock()  # one step at a time
        # Guards _known, _ordinal and the inbox's order; re-entrant, as a stream may be collected while it is held.
        self._ids = threading.RLock()
        self._ordinal = 0
        self._closed = False

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int | None = None,
        *,
        prompt_text: str | None = None,
        final_only: bool = False,
        sink: Sink | None = None,
    ) -> None:
        """Hand over a request; it starts with the next `step()`. Thread-safe.

        Args:
            request_id: unique among the unfinished ones.
            prompt: text, or token ids.
            priority: lower runs first (scheduling_policy "priority"); default: the parameters' own.
            prompt_text: what `RequestOutput.prompt` shows when ids are given.
            final_only: one output, at the end, instead of one a step.
            sink: receives this request's outputs in place of `step()`'s return value.

        Raises:
            ParamsError, TokenizerMissing, EngineClosed, RequestError("duplicate_id"). A prompt that cannot be served is
            no exception: it comes back as an output with an error.
        """
        self._check_open()
        resolved = self._resolver.resolve(params)
        self.outputs.check(resolved)
        check_priority(priority)
        token_ids: Any = prompt
        if isinstance(prompt, str):
            token_ids, prompt_text = self._ids_of(prompt), prompt
        error = self._prompt_error(token_ids)
        state = self.outputs.new_state(
            request_id,
            prompt_text,
            () if error else tuple(token_ids),
            resolved,
            time.monotonic(),
            final_only=final_only,
            sink=sink,
        )
        with self._ids:
            if request_id in self._known:
                raise RequestError("duplicate_id", f"request {request_id!r} is still running; give another id")
            self._known[request_id] = state
            ordinal, self._ordinal = self._ordinal, self._ordinal + 1
            level = resolved.priority if priority is None else priority
            self._inbox.append(lambda: self._enter(state, resolved, ordinal, level, error))

    def abort_request(self, request_id: str) -> None:
        """End a request at once; its output says "abort" and keeps its tokens. Unknown or ended ids are no error."""
        with self._ids:
            if request_id in self._known:
                self._inbox.append(lambda: self._abort(request_id))

    def has_unfinished_requests(self) -> bool:
        return bool(self._known or self._ready)

    def step(self) -> list[RequestOutput]:
        """Launch what can be launched, wait for the oldest step, and give the outputs that it brought.

        Outputs are cumulative; those of requests with a sink go there. An empty list is no end: see
        `has_unfinished_requests`.
        """
        with self._lock:
            self._check_open()
            self._drain_inbox()
            self._launch_ahead()
            if self._in_flight:
                self._finish_oldest()
            ready, self._ready = self._ready, []
            return ready

    def reset_prefix_cache(self) -> None:
        """Forget every cached block. Raises `NanoEngineError` while requests are unfinished."""
        with self._lock:
            self._drain_inbox()
            if self._known:
                raise NanoEngineError("the prefix cache is in use; finish or abort the running requests first")
            while self._in_flight:  # a dead row behind the last stop
                self._finish_oldest()
            self.scheduler.blocks.reset_prefix_cache()

    def close(self) -> None:
        """Stop, drop what runs, give the memory back. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for state in self._known.values():
                    for request in state.unfinished():
                        self.scheduler.abort(request)
                self._in_flight.clear()
                self._known.clear()
                self._executor.shutdown()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("this engine was closed; make a new one")

    def _ids_of(self, text: str) -> list[int] | RequestError:
        try:
            return self._encode(text)
        except RequestError as error:  # text that has no tokens, such as half a surrogate pair
            return error

    def _prompt_error(self, token_ids: Any) -> RequestError | None:
        if isinstance(token_ids, RequestError):  # what the caller could not make a prompt of
            return token_ids
        if isinstance(token_ids, bytes | Mapping) or not hasattr(token_ids, "__len__"):
            valid = "text, token ids, {'prompt': text} or {'prompt_token_ids': ids}"
            return RequestError("invalid_prompt", f"a prompt is {valid}, not {_shown(token_ids)}")
        if not len(token_ids):
            return RequestError("invalid_prompt", "the prompt is empty: at least one token is needed")
        for i, token in enumerate(token_ids):
            if not _is_int(token):
                return RequestError("invalid_prompt", f"prompt[{i}] is {token!r}, not a token id")
            if not 0 <= token < self.limits.vocab_size:
                size = self.limits.vocab_size
                return RequestError("invalid_prompt", f"prompt[{i}] is {token}, outside the vocabulary 0..{size - 1}")
        return None

    def _drain_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _enter(
        self, state: RequestState, params: ResolvedParams, ordinal: int, priority: int, error: RequestError | None
    ) -> None:
        """Make the request's samples and give them to the scheduler."""
        if error is not None:
            self._fail(state, error)
            return
        seed = request_seed(self.limits.seed, ordinal) if params.seed is None else params.seed
        prompt = list(map(int, state.prompt_token_ids))
        siblings = replace(params, prompt_logprobs=None)  # one sample's prompt log-probs are all samples'
        room = self.limits.max_model_len - len(prompt)
        for index in range(params.n):
            request = Request(
                id=f"{state.request_id}/{index}",
                parent=state.request_id,
                prompt_token_ids=prompt,
                params=params if index == 0 else siblings,
                seed=seed,
                sample_index=index,
                arrival=ordinal,
                priority=priority,
                max_len=len(prompt) + min(room, params.max_tokens or room),
                cache_key=(params.cache_salt or "").encode(),
            )
            try:
                self.scheduler.add(request)
            except RequestError as refused:
                self._fail(state, refused)
                return
            state.add_sample(request)

    def _abort(self, request_id: str) -> None:
        state = self._known.get(request_id)
        if state is None:
            return
        for request in state.unfinished():
            self.scheduler.abort(request)
        self._publish(self.outputs.aborted(state, time.monotonic()))

    def _launch_ahead(self) -> None:
        depth = 2 if self.limits.overlap else 1
        while len(self._in_flight) < depth:
            step = self.scheduler.schedule()
            self._take(self.scheduler.take_updates())
            if step is None:
                break
            try:
                handle = self._executor.launch(step.plan)
            except Exception as error:  # noqa: BLE001 - whatever a kernel or plugin raises ends this step alone
                while self._in_flight:
                    self._finish_oldest()
                self._broken([step], error)
                break
            self._in_flight.append(_InFlight(step, handle))
            now = time.monotonic()
            for request, _ in step.rows:
                state = self._known.get(request.parent)
                if state is not None:  # a sibling's host stage may just have failed it
                    state.scheduled(now)

    def _finish_oldest(self) -> None:
        oldest = self._in_flight[0]
        try:
            result = oldest.handle.wait()
        except Exception as error:  # noqa: BLE001 - as above
            self._broken(self._drop_in_flight(error), error)
            return
        self._in_flight.popleft()
        self._take(self.scheduler.commit(oldest.step, result))

    def _take(self, updates: Sequence[Update]) -> None:
        if not updates:
            return
        outputs, stopped, broken = self.outputs.apply(updates, self._known, time.monotonic())
        for request in stopped:
            self.scheduler.finish(request)
        for state, cause in broken:
            self._fail(state, cause)
        self._publish(outputs)

    def _drop_in_flight(self, error: Exception) -> list[ScheduledStep]:
        """All steps in flight, after they ended: what was launched behind a broken step read its missing tokens."""
        dropped = list(self._in_flight)
        self._in_flight.clear()
        for each in dropped[1:]:
            try:
                each.handle.wait()
            except Exception:  # noqa: BLE001 - it broke on what the first one left undone; that is reported
                continue
        return [each.step for each in dropped]

    def _broken(self, steps: Sequence[ScheduledStep], error: Exception) -> None:
        """A step raised: its requests are run again one by one, and the one that raises alone fails alone."""
        for request in self.scheduler.fail(steps):
            where = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            text = f"running this request raised {type(error).__name__}: {error}{where}"
            cause = RequestError("step_failed", text)
            cause.__cause__ = error
            state = self._known.get(request.parent)
            if state is not None:
                self._fail(state, cause)

    def _fail(self, state: RequestState, error: RequestError) -> None:
        for request in state.unfinished():
            self.scheduler.abort(request)
        self._publish([self.outputs.failed(state, error, time.monotonic())])

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            state = self._known[output.request_id]
            if output.finished:
                with self._ids:
                    del self._known[output.request_id]
            if state.sink is None:
                self._ready.append(output)
            else:
                state.sink(output)


def check_priority(priority: object) -> None:
    if priority is not None and not _is_int(priority):
        raise ParamsError(f"priority must be a whole number, not {priority!r}")


def _shown(value: object) -> str:
    return f"a dict with {list(value)}" if isinstance(value, Mapping) else type(value).__name__


def _is_int(value: object) -> bool:
    """ints and numpy's, not bools."""
    return hasattr(value, "__index__") and not isinstance(value, bool)
