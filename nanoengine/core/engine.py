"""The step loop: takes requests from a thread-safe inbox, keeps at most one step ahead of the device, gives outputs.

`LLM`, its streams and any server are clients of it. It speaks token ids; text is the output processor's.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from nanoengine.api.errors import (
    EngineClosed,
    NanoEngineError,
    RequestError,
    WorkerError,
    described,
    engine_failure,
    forget_locals,
    is_failure,
    is_out_of_memory,
)
from nanoengine.core.delivery import Outbox, Sink, Watch
from nanoengine.core.execution.executor import Executor, StepHandle
from nanoengine.core.execution.results import LaunchedStep
from nanoengine.core.outputs import OutputProcessor, RequestOutput, RequestState
from nanoengine.core.request import int32_bytes
from nanoengine.core.scheduling.messages import ScheduledStep, Update
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import StepResult
from nanoengine.params.arguments import check_priority, check_request_id, checked_prompt
from nanoengine.params.sampling_params import ParamsResolver, SamplingParams

Prompt = str | Sequence[int]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """vocab_size: legal ids. seed: of unseeded requests. overlap: run ahead."""

    vocab_size: int
    seed: int
    overlap: bool


class Engine:
    """Runs requests to their end, whatever any one of them does. Safe to call from several threads."""

    def __init__(
        self,
        limits: EngineLimits,
        make_scheduler: Callable[[], Scheduler],
        executor: Executor,
        outputs: OutputProcessor,
        resolver: ParamsResolver,
        encode: Callable[[str], list[int]],
    ) -> None:
        """`encode`: text to token ids; raises `TokenizerMissing` where there is no tokenizer."""
        self.limits, self.scheduler, self.outputs = limits, make_scheduler(), outputs
        self._make_scheduler = make_scheduler
        self._executor, self._resolver, self._encode = executor, resolver, encode
        self._inbox: deque[tuple[RequestState, Callable[[], None]]] = deque()
        self._known: dict[str, RequestState] = {}  # from add_request to the last output
        self._in_flight: deque[InFlight] = deque()
        self._outbox = Outbox(self._sink_failed)
        self._watch = Watch()
        self._said: set[str] = set()  # kinds of errors that broke steps
        self._booking = False  # scheduler and steps in flight do not tell one story just now
        self._lock = threading.RLock()  # one step at a time
        # Guards _known, _ordinal and the inbox's order; re-entrant, as a stream may be collected while it is held.
        self._ids = threading.RLock()
        self._gate = threading.RLock()  # `alone` holds it, so that nobody else enters; never asked for under _ids
        self._ordinal = 0
        self._closed, self._process = False, os.getpid()
        self._ended_by: WorkerError | None = None

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
            prompt_text: what `RequestOutput.prompt` shows when ids are given; valid Unicode.
            final_only: one output, at the end, instead of one a step.
            sink: receives this request's outputs in place of `step()`'s return value. If it raises, that is logged and
                this request is aborted; no other request or caller is concerned.

        Raises:
            ParamsError, TokenizerMissing, EngineClosed, RequestError("duplicate_id"). A prompt that cannot be served is
            no exception: it comes back as an output with an error.
        """
        self.check_open()
        check_request_id(request_id)
        resolved = self._resolver.resolve(params)
        self.outputs.check(resolved)
        level = check_priority(priority)
        most = self.scheduler.config.max_model_len
        ids, text = checked_prompt(prompt, prompt_text, self._encode, self.limits.vocab_size, most)
        error = ids if isinstance(ids, RequestError) else None
        state = self.outputs.new_state(
            request_id,
            text,
            () if isinstance(ids, RequestError) else ids,
            resolved,
            time.monotonic(),
            final_only=final_only,
            sink=sink,
        )
        if error is None:
            self._hash(state)
        with self._gate, self._ids:
            if request_id in self._known:
                raise RequestError("duplicate_id", f"request {request_id!r} is still running; give another id")
            self._known[request_id] = state
            ordinal, self._ordinal = self._ordinal, self._ordinal + 1
            level = resolved.priority if level is None else level
            self._inbox.append((state, lambda: self._enter(state, ordinal, level, error)))

    def abort_request(self, request_id: str) -> None:
        """End a request at once; its output says "abort" and keeps its tokens. Unknown or ended ids are no error."""
        if self._is_fork:  # which lets go of a stream; who held the lock may not be there
            return
        with self._ids:
            state = self._known.get(request_id)
            if state is not None:
                self._inbox.append((state, lambda: self._abort(state)))

    def has_unfinished_requests(self) -> bool:
        return bool(self._known or self._outbox.ready)

    def watch_by(self, change: Callable[[Watch], Watch]) -> None:
        """Between two steps: `change` is given the watch, and returns the one for the next step on."""
        if self._is_fork:
            return
        with self._lock:
            self._watch = change(self._watch)

    def step(self) -> list[RequestOutput]:
        """`advance`, and give the outputs that are there.

        Outputs are cumulative; those of requests with a sink went there. An empty list is no end: see
        `has_unfinished_requests`.
        """
        with self._held():
            self.advance()
            return self._outbox.take_ready()

    def advance(self) -> None:
        """Launch what can be launched, and wait for the oldest step. Outputs go to their sinks, or wait for `step`.

        An exception that an observer raises is raised here, once all outputs are delivered.
        """
        self._advance(self._launch_and_wait)

    def keep_busy(self) -> None:
        """`advance` by one step at most, and without a wait: the device works while requests are still being added."""
        self._advance(self._launch_one)

    def _launch_and_wait(self) -> None:
        self._launch_ahead()
        if self._in_flight:
            self._finish_oldest()

    def _launch_one(self) -> None:
        if len(self._in_flight) == self._depth and self._in_flight[0].has_arrived():
            self._finish_oldest()
        self._launch_ahead(min(self._depth, len(self._in_flight) + 1))

    @property
    def _depth(self) -> int:
        """The most steps in flight."""
        return 2 if self.limits.overlap else 1

    def _advance(self, work: Callable[[], None]) -> None:
        with self._held():
            self._book(work)
            self._outbox.deliver()

    def _book(self, work: Callable[[], None]) -> None:
        """Carry out what was added and aborted, and then `work`."""
        try:
            if self._booking:  # starting over was interrupted itself
                self._start_over()
            self._drain_inbox()
            work()
        except BaseException:  # Ctrl-C may come anywhere
            if self._booking:
                self._start_over()
            raise

    def _sink_failed(self, output: RequestOutput, error: BaseException) -> None:
        """The request ends: what else it would bring has no taker."""
        _log.warning("the sink of request %r raised %s; the request is aborted", output.request_id, described(error))
        with self._ids:
            state = self._known.get(output.request_id)
        if state is not None:
            state.sink = _discard
            self.abort_request(output.request_id)

    def settle(self) -> None:
        """Carry out what was added and aborted, without a step, so that counters show it. Calls no client.

        Nothing where the engine was closed, or where another thread makes a step: it will carry that out.
        """
        if self._is_fork or not self._lock.acquire(blocking=False):
            return
        try:
            if not self._closed:
                self._book(_nothing)
        finally:
            self._lock.release()

    def _start_over(self) -> None:
        """After an interrupt in the middle of the books: a fresh scheduler. What ran fails; the engine lives on."""
        self._in_flight.clear()
        with self._ids:  # who enters from here on is in both, and lives
            self._inbox.clear()
            lost = list(self._known.values())
        self.scheduler = self._make_scheduler()
        error = RequestError("interrupted", "the engine was interrupted in the middle of a step")
        self._watch.forget()
        for state in lost:
            self._lost(state, error)
        self._booking = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Other threads make no step meanwhile, and wait to add requests. Raises `NanoEngineError` while some run."""
        with self._held(), self._gate:
            self._book(_nothing)
            if self.has_unfinished_requests():
                raise NanoEngineError("requests are running; finish or abort them first")
            yield

    def reset_prefix_cache(self) -> None:
        """Forget every cached block. Raises `NanoEngineError` while requests are unfinished."""
        self._advance(self._reset_prefix_cache)

    def _reset_prefix_cache(self) -> None:
        if self._known:
            raise NanoEngineError("the prefix cache is in use; finish or abort the running requests first")
        while self._in_flight:  # a dead row behind the last stop
            self._finish_oldest()
        self.scheduler.blocks.reset_prefix_cache()

    def close(self) -> None:
        """Stop, drop what runs, give the memory back. Idempotent; in a fork of the engine's process, nothing."""
        if self._is_fork:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                for state in list(self._known.values()):  # whoever adds just now is on the way to be told
                    for request in state.unfinished():
                        self.scheduler.abort(request)
                self._in_flight.clear()
                self._known.clear()
                self._executor.shutdown()

    def _end(self, error: WorkerError) -> NoReturn:
        """A worker failed: what runs fails with that cause, and so does whoever comes later."""
        self._ended_by, self._booking = error, False
        steps = [each.step for each in self._in_flight]
        self._in_flight.clear()
        cause = RequestError("worker_failed", error.summary)
        cause.__cause__ = error
        for state in list(self._known.values()):
            self._fail(state, cause)
        self._outbox.put_records(self._watch.broken(steps, error))
        self.close()
        try:
            self._outbox.deliver()
        finally:
            error.outputs = self._outbox.take_ready()
            raise error

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The lock. A fork does not wait for it: who held it may be no thread of the fork's."""
        self.check_open()
        with self._lock:
            self.check_open()
            yield

    @property
    def _is_fork(self) -> bool:
        return os.getpid() != self._process

    def check_open(self) -> None:
        """Raises `EngineClosed` where it is, and in a fork of the engine's process."""
        if self._is_fork:
            raise EngineClosed(
                f"this engine runs in process {self._process}, and this is a fork of it; make an engine in each process"
            )
        if self._ended_by is not None:
            raise EngineClosed(f"this engine has ended: {self._ended_by.summary}") from self._ended_by
        if self._closed:
            raise EngineClosed

    def _hash(self, state: RequestState) -> None:
        """What the prefix index will look for, made here by the caller's thread: of a long prompt it takes a while."""
        state.prompt_bytes = int32_bytes(state.prompt_token_ids)
        state.block_hashes = self.scheduler.blocks.hashes_of(state.prompt_bytes, state.cache_key)

    def _drain_inbox(self) -> None:
        """What an entry raises fails its request alone."""
        while self._inbox:
            self._booking = True  # a request that is half entered would run for nobody
            state, entry = self._inbox.popleft()
            try:
                entry()
            except BaseException as error:
                if not is_failure(error):
                    raise
                self._fail(state, error if isinstance(error, RequestError) else engine_failure(error))
            self._booking = False

    def _enter(self, state: RequestState, ordinal: int, priority: int, error: RequestError | None) -> None:
        """Give the request's samples to the scheduler. Raises what is wrong with it, which fails it."""
        if error is not None:
            raise error
        for request in state.requests(ordinal, priority, self.limits.seed):
            self.scheduler.add(request)
            try:
                state.add_sample(request)
            except BaseException:  # a tokenizer's; of a sample that is not the state's, no end would be heard
                self.scheduler.abort(request)
                raise

    def _abort(self, state: RequestState) -> None:
        if self._known.get(state.request_id) is not state:  # it ended meanwhile, and its id may live again
            return
        for request in state.unfinished():
            self.scheduler.abort(request)
            self._watch.ended(request, "abort")
        self._publish(self.outputs.aborted(state, time.monotonic()))

    def _launch_ahead(self, depth: int | None = None) -> None:
        """Until so many steps are in flight (None: as many as may be), or nothing can be scheduled."""
        depth = self._depth if depth is None else depth
        while len(self._in_flight) < depth:
            self._booking = True
            self._watch.scheduling()
            step = self.scheduler.schedule()
            self._take(self.scheduler.take_updates())
            if step is None:
                self._booking = False
                break
            self._watch.scheduled(step, self.scheduler)
            handle = self._launch(step)
            self._in_flight.append(InFlight(step, handle))
            self._booking = False
            self._watch.launched(step)
            if isinstance(handle, NotLaunched):  # nothing runs behind it
                while self._in_flight:
                    self._finish_oldest()
                break
            now = time.monotonic()
            for request, _ in step.rows[step.plan.num_decode_rows :]:  # a request's first row is a prefill row
                state = self._known.get(request.parent)
                if state is not None:  # a sibling's host processor may just have failed it
                    state.scheduled(now)

    def _launch(self, step: ScheduledStep) -> StepHandle:
        try:
            return self._executor.launch(step.plan)
        except WorkerError as error:
            self._end(error)
        except BaseException as error:  # whatever a kernel or plugin raises ends this step alone
            if not is_failure(error):
                raise
            return NotLaunched(error)

    def _finish_oldest(self) -> None:
        oldest = self._in_flight[0]
        self._watch.waiting()
        try:
            result = oldest.handle.wait()
        except WorkerError as error:
            self._end(error)
        except BaseException as error:  # as above
            if not is_failure(error):
                raise
            wait_out(self._in_flight)
            self._booking = True
            steps = [each.step for each in self._in_flight]
            self._in_flight.clear()
            self._broken(steps, error)
            self._booking = False
            return
        self._watch.arrived(oldest.step)
        self._booking = True
        self._in_flight.popleft()
        self._take(self.scheduler.commit(oldest.step, result))
        self._booking = False
        self._outbox.put_records(self._watch.committed(oldest.step, result))

    def _take(self, updates: Sequence[Update]) -> None:
        if not updates:
            return
        outputs, stopped, broken = self.outputs.apply(updates, self._known, time.monotonic())
        self._watch.updated(updates, self._known)
        for request in stopped:
            self.scheduler.abort(request)
        for state, cause in broken:
            self._fail(state, cause)
        self._publish(outputs)

    def _broken(self, steps: Sequence[ScheduledStep], error: BaseException) -> None:
        """A step raised: its requests are run again one by one, and the one that raises alone fails alone."""
        if len(steps[0].rows) > 1:
            self._say_broken(error)
        for request in self.scheduler.fail(steps):
            cause = step_failure(error)
            state = self._known.get(request.parent)
            if state is not None:
                self._fail(state, cause)
        self._outbox.put_records(self._watch.broken(steps, error))

    def _say_broken(self, error: BaseException) -> None:
        """Each kind once: where all succeed one by one, no output tells what broke, and all is slow."""
        what = type(error).__name__
        if what not in self._said:
            self._said.add(what)
            _log.warning("a step raised %s; its requests run again one by one", described(error))
            _log.debug("where it was raised:", exc_info=error)

    def _fail(self, state: RequestState, error: RequestError) -> None:
        for request in state.unfinished():
            self.scheduler.abort(request)
        if self._known.get(state.request_id) is state:
            self._lost(state, error)

    def _lost(self, state: RequestState, error: RequestError) -> None:
        """What the scheduler does not hold any more."""
        for request in state.unfinished():
            self._watch.ended(request, error.code)
        self._publish([self.outputs.failed(state, error, time.monotonic())])

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            state = self._known[output.request_id]
            if output.finished:
                with self._ids:
                    del self._known[output.request_id]
            self._outbox.put(output, state.sink)


def _discard(output: RequestOutput) -> None:
    """The sink of a request whose own sink failed."""


def _nothing() -> None:
    """The work of who asks for no step."""


@dataclass(frozen=True, slots=True)
class NotLaunched:
    """In place of the handle of a step whose launch raised `error`."""

    error: BaseException

    def wait(self) -> StepResult:
        raise self.error


@dataclass(frozen=True, slots=True)
class InFlight:
    step: ScheduledStep
    handle: StepHandle

    def has_arrived(self) -> bool:
        """Whether `wait` would not wait. Only a device's own handles can tell; on a CPU, batches depend on no clock."""
        try:
            return isinstance(self.handle, LaunchedStep) and self.handle.has_arrived()
        except BaseException as error:
            if not is_failure(error):
                raise
            return True  # a device that is lost raises again in `wait`, where it is answered for


def wait_out(in_flight: Iterable[InFlight]) -> None:
    """Until all have ended: the oldest one broke, and those behind it read its missing tokens."""
    for each in list(in_flight)[1:]:
        try:
            each.handle.wait()
        except BaseException as late:  # it broke on what the first one left undone; that is reported
            if not is_failure(late):
                raise
            forget_locals(late)


def step_failure(error: BaseException) -> RequestError:
    """What to tell whose request raised `error` when it ran alone."""
    text = f"running this request raised {described(error)}"
    if is_out_of_memory(error):
        mend = "no part of its step was small enough; leave more room: lower engine.kv_cache_memory or max_num_seqs"
        cause = RequestError("out_of_memory", f"{text}; {mend}, on a GPU also gpu_memory_utilization")
    else:
        cause = RequestError("step_failed", text)
    cause.__cause__ = error
    forget_locals(error)
    return cause
