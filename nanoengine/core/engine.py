"""The step loop: takes requests from any thread, keeps one step ahead of the device, and publishes deltas.

`LLM`, its streams and any server are clients. They encode prompts and make text: the engine knows token ids only.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from nanoengine.api.deltas import Pooling, RequestDelta
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
    step_failure,
)
from nanoengine.api.plugin_calls import called_by
from nanoengine.core.delivery import START, OpenRequests, Watch
from nanoengine.core.execution.executor import Executor
from nanoengine.core.execution.results import NotLaunched, StepHandle, wait_out
from nanoengine.core.host_states import LastAsked, supplied_columns
from nanoengine.core.outputs import ALL, Report, RequestState, Sink
from nanoengine.core.scheduling.commit import publish_prompts
from nanoengine.core.scheduling.messages import ScheduledStep, Update
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.params.generated import Generated
from nanoengine.params.host_states import start_states
from nanoengine.params.input_processor import CheckedRequest, InputProcessor
from nanoengine.params.preparation import Preparations
from nanoengine.params.sampling_params import SamplingParams

_log = logging.getLogger(__name__)


class Engine:
    """Runs requests until each has ended. Any thread may call its methods; one at a time makes a step."""

    def __init__(
        self,
        make_scheduler: Callable[[], Scheduler],
        executor: Executor,
        inputs: InputProcessor,
        preparations: Preparations,
        *,
        seed: int,
        overlap: bool,
    ) -> None:
        """`seed`: of requests without one. `overlap`: launch a step while the step before it runs."""
        self.scheduler, self._make_scheduler = make_scheduler(), make_scheduler
        self._executor, self._inputs = executor, inputs
        self._seed, self._depth = seed, 2 if overlap else 1  # the most steps in flight
        self._requests = OpenRequests(preparations)
        self._in_flight: deque[InFlight] = deque()
        self._watch: Watch | None = None
        self._mid_update = False  # True while scheduler, steps in flight and open requests do not agree
        self._logged_errors: set[type[BaseException]] = set()  # types of errors that broke steps
        self._asked, self._closed, self._pid = LastAsked(), False, os.getpid()
        self._ended_by: WorkerError | None = None
        self._running: Any = None  # the frame of `_run`
        self._step_lock = threading.RLock()  # one step at a time; taken before the locks of _requests

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        priority: int | None = None,
        *,
        generated: Generated = (),
        every: int = 1,
        pooling: Pooling | None = None,
        sink: Sink | None = None,
        client: str = "",
    ) -> None:
        """Add a request; it starts with the next `step()`.

        Args:
            request_id: unique among unfinished ones. priority: lower first; None: the parameters'. client: who asks.
            generated: output tokens of an earlier run that this one continues; with n > 1 a list for each sample. Its
                parameters must be the same, with the seed of the earlier run.
            every: a sample is reported with its first new token, each so many, and its end.
            pooling: it wants a vector and no token. Of the parameters it takes only cache_salt and priority.
            sink: gets the deltas, which `step()` then does not return. What it raises is logged and aborts the request.

        Raises ParamsError, EngineClosed, RequestError("duplicate_id"). What else cannot run has an error in its delta.
        """
        given = self._inputs.process(request_id, prompt_token_ids, params, priority, generated, pooling, client)
        self.add_checked(given, every, sink)

    def add_checked(self, given: CheckedRequest, every: int = 1, sink: Sink | None = None) -> None:
        """`add_request` with what this engine's `InputProcessor` made of the other arguments."""
        self.check_open()
        state = RequestState(given, every, sink, self._seed)
        if given.error is None:
            state.hash_prompt(self.scheduler.blocks.hashes_of)  # on the caller's thread: a long prompt takes a while
        self._requests.add(state, self._inputs.preparations(given))

    def abort_request(self, request_id: str, sample_index: int | None = None) -> None:
        """End a request, or a sample that its client has stopped. The last delta has the tokens so far. Idempotent."""
        if not self._is_fork:  # a fork drops its streams; the thread that held a lock may not exist there
            self._requests.abort(request_id, sample_index)

    def has_unfinished_requests(self) -> bool:
        """Whether a request runs, or a delta has not gone to its client yet."""
        return bool(self._requests.known or self._requests.ready or self._requests.undelivered)

    # A step

    def step(self) -> list[RequestDelta]:
        """`advance`, and return the deltas of requests without a sink: maybe none, though some are unfinished."""
        with self._locked():
            self.advance()
            return self._requests.take_ready()

    def advance(self) -> None:
        """Launch what can be launched, wait for the oldest step, and call the sinks. An exception that an observer
        raises is raised here, after all deltas are delivered."""
        self._run_and_deliver(self._launch_and_wait)

    def keep_busy(self) -> None:
        """`advance` by at most one step, without waiting for a result: for the time while requests are being added."""
        self._run_and_deliver(self._finish_arrived)  # whose deltas may abort requests
        self._run_and_deliver(lambda: self._launch_ahead(min(self._depth, len(self._in_flight) + 1)))

    def _launch_and_wait(self) -> None:
        self._launch_ahead(self._depth)
        if self._in_flight:
            self._finish_oldest()
        else:
            self._requests.wait()

    def _finish_arrived(self) -> None:
        if len(self._in_flight) == self._depth and self._in_flight[0].handle.has_arrived():
            self._finish_oldest()

    def _launch_ahead(self, depth: int) -> None:
        """Schedule and launch until `depth` steps are in flight, or nothing can be scheduled."""
        while True:
            self._supply_oldest()
            if len(self._in_flight) >= depth:
                break
            if self._in_flight and isinstance(self._in_flight[-1].handle, NotLaunched):
                break  # nothing runs behind a step that was not launched
            scheduling, self._mid_update = time.monotonic(), True
            step = self.scheduler.schedule()
            self._process(self.scheduler.take_updates())
            if step is None:
                self._mid_update = False
                break
            launching = time.monotonic()
            self._in_flight.append(InFlight(step, self._launched(partial(self._executor.launch, step.plan))))
            if self._watch is not None:
                self._watch.launched(step, self.scheduler, scheduling, launching)
            publish_prompts(step, self.scheduler.blocks)
            self._mid_update = False
            for request, _ in step.rows if step.admitted else ():
                state = self._requests.known.get(request.parent)
                if state is not None and state.first_scheduled is None:  # None: a sibling's processor just failed it
                    state.first_scheduled = launching

    def _launched(self, launch: Callable[[], StepHandle]) -> StepHandle:
        try:
            return launch()
        except WorkerError as error:
            self._end(error)
        except BaseException as error:  # whatever a kernel or plugin raises ends this step alone
            if not is_failure(error):
                raise
            return NotLaunched(error)

    def _supply_oldest(self) -> None:
        """The columns of the oldest step, if it waits for them: all tokens before its draws are known."""
        if not self._in_flight or not self._in_flight[0].handle.late:
            return
        oldest, self._mid_update = self._in_flight[0], True
        vocab_size, most_forced = self._inputs.ctx.vocab_size, self.scheduler.config.most_forced
        columns, failed = supplied_columns(oldest.step, vocab_size, most_forced, oldest.handle.room, self._asked)
        self._in_flight[0] = InFlight(oldest.step, self._launched(partial(oldest.handle.supply, columns)))
        self._process(failed)
        self._mid_update = False

    def _finish_oldest(self) -> None:
        oldest, waiting = self._in_flight[0], time.monotonic()
        try:
            result = oldest.handle.wait()
        except WorkerError as error:
            self._end(error)
        except BaseException as error:  # as above
            if not is_failure(error):
                raise
            self._broken(error)
            return
        if self._watch is not None:
            self._watch.arrived(oldest.step, waiting)
        self._mid_update = True
        self._in_flight.popleft()
        self._process(self.scheduler.commit(oldest.step, result))
        self._mid_update = False
        self._supply_oldest()
        if self._watch is not None:
            self._requests.put_records(self._watch.committed(oldest.step, result))

    def _process(self, updates: Sequence[Update]) -> None:
        """Publish what the scheduler's updates bring."""
        if not updates:
            return
        report = Report.of(updates, self._requests.known)
        for request, reason in report.ended:
            self._asked = LastAsked()  # the states of a request go with it
            if self._watch is not None:
                self._watch.ended(request, reason)
        self._requests.publish(report.news)
        for request_id, error in report.failed.items():
            self._end_request(self._requests.known[request_id], error)

    # The end of a request

    def _end_request(
        self, state: RequestState, error: RequestError | None = None, which: int = ALL, *, scheduled: bool = True
    ) -> None:
        """End a request with an error, or (None) abort it. `which`: of its samples; one that has not started ends when
        it does. `scheduled`: the scheduler may still have them."""
        if self._requests.known.get(state.given.request_id) is not state:  # it has ended; the id may be in use again
            return
        for request in state.unfinished(which):
            if scheduled:
                self.scheduler.abort(request)
            if self._watch is not None:
                self._watch.ended(request, error.code if error is not None else "abort" if which == ALL else "stop")
        self._requests.publish([(state, delta) for delta in state.last_deltas(error, which)])

    def _broken(self, error: BaseException) -> None:
        """The oldest step raised, and those behind it break with it: they read tokens that it did not write. Their
        requests run again, in smaller steps or one by one. One that raises alone fails alone."""
        wait_out([each.handle for each in self._in_flight][1:])
        steps, self._mid_update = [each.step for each in self._in_flight], True
        self._in_flight.clear()
        short = is_out_of_memory(error)
        failed = self.scheduler.withdraw(steps) if short else self.scheduler.fail(steps)
        if not failed:
            self._log_broken(error, "in smaller steps" if short else "one by one")
        self._process([Update(request, error=step_failure(error)) for request in failed])
        if self._watch is not None:
            self._requests.put_records(self._watch.broken(steps, error))
        forget_locals(error)
        self._mid_update = False

    def _log_broken(self, error: BaseException, how: str) -> None:
        """A warning for the first error of each type: where all requests end well, only this shows what is slow."""
        level = logging.DEBUG if type(error) in self._logged_errors else logging.WARNING
        self._logged_errors.add(type(error))
        _log.log(level, "a step raised %s; its requests run again %s", described(error), how)
        _log.debug("where it was raised:", exc_info=error)

    # Consistency

    def _run_and_deliver(self, work: Callable[[], None] | None = None) -> None:
        with self._locked():
            self._run(work)
            self._requests.deliver()

    def _run(self, work: Callable[[], None] | None = None) -> None:
        """Add and abort what is in the inbox, then do `work`. No client is called. Ctrl-C may come anywhere: in the
        middle of an update it costs the requests that run, else nothing."""
        try:
            self._running = sys._getframe()
            if self._mid_update:  # starting over was interrupted, too
                self._start_over()
            self._drain_inbox()
            if work is not None:
                work()
        except BaseException:
            if self._mid_update:
                self._start_over()
            raise
        finally:
            self._running = None

    def _drain_inbox(self) -> None:
        """Add and abort. What that raises fails the request alone."""
        if self._requests.preparations.tasks:
            self._requests.preparations.expire()
        while self._requests.inbox:
            self._mid_update = True  # an interrupt must leave no request that is half in the scheduler
            state, what = self._requests.inbox.popleft()
            try:
                if what != START:
                    self._end_request(state, which=what)
                elif self._requests.known.get(state.given.request_id) is state:  # it may have ended before
                    self._enter(state)
            except BaseException as error:
                if not is_failure(error):
                    raise
                self._end_request(state, engine_failure(error))
            self._mid_update = False

    def _enter(self, state: RequestState) -> None:
        """Give the request's samples to the scheduler. Raises what is wrong with the request."""
        if state.given.error is not None:
            raise state.given.error
        for request, begun in state.requests():
            if begun.finish_reason is None:
                request.host_states = start_states(request.params, request.prompt_token_ids, self._inputs.ctx)
                self.scheduler.add(request)
            state.add_sample(request, begun)  # which `_end_request` takes from the scheduler
        for index in state.aborted:
            self._end_request(state, which=index)

    def _start_over(self) -> None:
        """After an interrupt in the middle of an update: a fresh scheduler. All requests so far fail."""
        self._in_flight.clear()
        lost = self._requests.clear_inbox()
        self.scheduler = self._make_scheduler()
        error = RequestError("interrupted", "the engine was interrupted in the middle of a step")
        for state in lost:
            self._end_request(state, error, scheduled=False)
        self._mid_update = False

    # Between steps, and the end

    def apply_inbox(self) -> None:
        """Add and abort without making a step, so that counters show it. No sink is called. No effect where the engine
        is closed, or where a step is made: that one does it."""
        if self._is_fork or not self._step_lock.acquire(blocking=False):
            return
        try:
            if not self._closed and not (self._running and called_by(self._running)):
                self._run()
        finally:
            self._step_lock.release()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within it, only this thread adds requests and makes steps. Raises `NanoEngineError` while requests run."""
        with self._locked():
            self._run_and_deliver()
            with self._requests.entry_lock:
                if self._requests.known:
                    raise NanoEngineError("requests are running; finish or abort them first")
                yield

    def reset_prefix_cache(self) -> None:
        """Forget every cached block. Raises `NanoEngineError` while requests run."""
        with self.exclusive():
            self._run(self._reset_prefix_cache)

    def _reset_prefix_cache(self) -> None:
        while self._in_flight:  # a step that was launched before the last request was seen to stop
            self._finish_oldest()
        self.scheduler.blocks.reset_prefix_cache()

    def change_watch(self, change: Callable[[Watch | None], Watch | None]) -> None:
        """Replace the watch by what `change` makes of it (None: no observer is there) from the next step on."""
        if not self._is_fork:
            with self._step_lock:
                self._watch = change(self._watch)

    def close(self) -> None:
        """Drop what runs and give the memory back. Idempotent. No effect in a fork of the engine's process."""
        if self._is_fork:
            return
        with self._step_lock:
            self._closed = True  # and all the rest again, which an interrupt may have cut short before
            for state in list(self._requests.known.values()):  # another thread may just be adding one
                for request in state.unfinished():
                    self.scheduler.abort(request)
            self._in_flight.clear()
            self._requests.close()
            self._executor.shutdown()

    def _end(self, error: WorkerError) -> NoReturn:
        """A worker failed: all requests fail with that cause, and the engine is closed."""
        self._ended_by, self._mid_update = error, False
        steps = [each.step for each in self._in_flight]
        self._in_flight.clear()
        cause = RequestError("worker_failed", error.summary)
        cause.__cause__ = error
        for state in list(self._requests.known.values()):
            self._end_request(state, cause)
        if self._watch is not None:
            self._requests.put_records(self._watch.broken(steps, error))
        self.close()
        try:
            self._requests.deliver()
        finally:
            error.outputs = self._requests.take_ready()
            raise error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the step lock. Raises `EngineClosed`; in a fork at once, where nothing may ever release the lock."""
        self.check_open()
        if threading.current_thread() is self._executor.thread or (self._running and called_by(self._running)):
            raise NanoEngineError("a plugin or function that the engine calls in a step cannot run the engine")
        with self._step_lock:
            self.check_open()
            yield

    @property
    def _is_fork(self) -> bool:
        return os.getpid() != self._pid

    def check_open(self) -> None:
        """Raises `EngineClosed` where the engine is closed, and in a fork of its process."""
        if self._is_fork:
            raise EngineClosed(
                f"this engine runs in process {self._pid}, and this is a fork of it; make an engine in each process"
            )
        if self._ended_by is not None:
            raise EngineClosed(f"this engine has ended: {self._ended_by.summary}") from self._ended_by
        if self._closed:
            raise EngineClosed


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that was launched and is not committed yet."""

    step: ScheduledStep
    handle: StepHandle
