"""`Preparations`: runs what must be done before a request can start, on threads of its own, not in a step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanoengine.api.errors import RequestError, described, is_failure

THREAD = "nanoengine-prepare"
Job = Callable[[], Any]
Finish = Callable[[RequestError | None], None]
_IDLE_SECONDS = 10.0  # after which a thread without work ends
_CLOSE_SECONDS = 1.0  # that `close` waits for the threads


@dataclass(slots=True, eq=False)
class Task:
    """The jobs of one request. started: on the monotonic clock; None while it waits. done: it has ended, or is given
    up: what its jobs do from then on has no effect."""

    jobs: Sequence[Job]
    finish: Finish
    started: float | None = None
    done: bool = False

    def cancel(self) -> None:
        """Its `finish` is not called any more, unless that is happening now."""
        self.done = True


class Preparations:
    """A few threads, started when they are first needed. `tasks`: those that wait or run.

    A thread whose job takes longer than it may is given up: it can be stuck for ever, so another one takes its place.
    """

    def __init__(self, workers: int, seconds: float, counted_from: Callable[[], float] = lambda: 0.0) -> None:
        """`seconds`: that the jobs of one request may take together; time before `counted_from()` does not count."""
        self._workers, self._seconds, self._counted_from = workers, seconds, counted_from
        self.tasks: set[Task] = set()
        self._queue: deque[Task] = deque()
        self._running: set[Task] = set()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, jobs: Sequence[Job], finish: Finish) -> Task:
        """Run jobs one after the other, then call `finish` on that thread: with the error of the first one that failed.

        It is called once, and not at all if the task was cancelled or this was closed.
        """
        task = Task(jobs, finish)
        with self._changed:
            self.tasks.add(task)
            self._queue.append(task)
            self._add_thread()
            self._changed.notify()
        return task

    def expire(self) -> None:
        """Give up tasks that have run for too long: calls their `finish` with an error, on this thread."""
        begun_before = time.monotonic() - self._seconds
        with self._changed:
            late = [t for t in self._running if t.started is not None and t.started < begun_before]
            if late and self._counted_from() >= begun_before:
                late = []
            self._running.difference_update(late)
            self.tasks.difference_update(late)
            late = [task for task in late if not task.done]
            for task in late:
                task.done = True
            if self._queue:
                self._add_thread()
        for task in late:
            text = f"preparing this request took more than {self._seconds:g} s (engine.structured_outputs.timeout)"
            task.finish(RequestError("prepare_timeout", text))

    def close(self) -> None:
        """Drop all tasks and end the threads. Idempotent."""
        with self._changed:
            self._closed = True
            for task in (*self._queue, *self._running):
                task.done = True
            self._queue.clear()
            self.tasks.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        until = time.monotonic() + _CLOSE_SECONDS
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def _add_thread(self) -> None:
        if self._idle < len(self._queue) and len(self._running) + self._idle < self._workers and not self._closed:
            thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
            thread.start()  # it waits for the lock; one that the system refuses is not counted
            self._threads.add(thread)
            self._idle += 1

    def _work(self) -> None:
        while (task := self._next()) is not None:
            error = _run(task)
            with self._changed:
                given_up = task not in self._running
                self._running.discard(task)
                self.tasks.discard(task)
                report = not task.done
                task.done = True
                if given_up:  # another thread has this one's place
                    self._threads.discard(threading.current_thread())
                else:
                    self._idle += 1
            if report:
                task.finish(error)
            if given_up:
                return

    def _next(self) -> Task | None:
        """The next task; None: this thread ends."""
        with self._changed:
            while True:
                while self._queue:
                    task = self._queue.popleft()
                    if task.done:
                        self.tasks.discard(task)
                    else:
                        task.started = time.monotonic()
                        self._running.add(task)
                        self._idle -= 1
                        return task
                if (self._closed or not self._changed.wait(_IDLE_SECONDS)) and not self._queue:
                    self._idle -= 1
                    self._threads.discard(threading.current_thread())
                    return None


def _run(task: Task) -> RequestError | None:
    """Runs the jobs. What one raises becomes the error of the request."""
    for job in task.jobs:
        if task.done:
            return None
        try:
            job()
        except RequestError as error:
            return error
        except BaseException as error:
            if not is_failure(error):
                raise
            failure = RequestError("prepare_failed", f"preparing this request raised {described(error)}")
            failure.__cause__ = error
            return failure
    return None
