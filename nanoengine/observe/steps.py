"""What the engine did, step by step: a frozen `StepRecord` for whoever observes it (`LLM.observe`).

Nothing is gathered while nobody observes: the engine then talks to a `Watch`, whose methods do nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nanoengine.api.errors import described
from nanoengine.core.delivery import Delivery, Watch
from nanoengine.core.outputs import RequestState
from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.block_manager import BlockUse
from nanoengine.core.scheduling.messages import Admission, Preemption, ScheduledStep, Update
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import GRAPH_DECODE, GRAPH_MIXED, GRAPH_TAIL, StepResult


class Span(NamedTuple):
    """Seconds on the monotonic clock, which is also that of `RequestMetrics`."""

    start: float
    end: float


class Row(NamedTuple):
    """A request's share of a step. "llm-3/0" is the first sample of the request "llm-3".

    Attributes:
        start, num_tokens: it computes the tokens at the positions [start, start + num_tokens).
        sampled: a token is drawn; False: a chunk of a prompt, of which more is to come.
        new_tokens: tokens the request got; 0 for a chunk, and for a row whose request had ended before.
    """

    request: str
    slot: int
    start: int
    num_tokens: int
    sampled: bool
    new_tokens: int


class Ending(NamedTuple):
    """A request that ended. reason: "stop", "length", "abort", or the code of its error. at: seconds, as in `Span`."""

    request: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step, handed out once its result is booked.

    Attributes:
        step: its number. Steps come in order.
        schedule, launch, wait, commit: what the engine did for it. Between launch and wait stand the schedule and
            launch of the next step, where the engine runs ahead.
        execution: when the device had it: from its launch, or the arrival of the step before, to its own arrival.
        rows: decode rows (`num_decode_rows` of them) first, then prefill rows.
        admitted: requests that got a slot. preempted: requests that lost theirs since the step before.
        ended: requests that ended since the step before: by this result, by an abort, by an error.
        graphs, parts: as in `StepResult`.
        blocks: KV blocks while the step ran. running, waiting: requests then.
        error: what the step raised; its requests are run again, one by one. None: it went well.
    """

    step: int
    schedule: Span
    launch: Span
    wait: Span
    commit: Span
    execution: Span
    rows: tuple[Row, ...]
    num_decode_rows: int
    admitted: tuple[Admission, ...]
    preempted: tuple[Preemption, ...]
    ended: tuple[Ending, ...]
    graphs: int
    parts: int
    blocks: BlockUse
    running: int
    waiting: int
    error: str | None = None

    @property
    def decode_rows(self) -> tuple[Row, ...]:
        return self.rows[: self.num_decode_rows]

    @property
    def prefill_rows(self) -> tuple[Row, ...]:
        return self.rows[self.num_decode_rows :]

    @property
    def new_tokens(self) -> int:
        return sum(row.new_tokens for row in self.rows)

    @property
    def graph(self) -> str:
        """Which parts ran as replayed CUDA graphs: "none", "decode", "mixed", "decode, tail" and so on."""
        names = ((GRAPH_DECODE, "decode"), (GRAPH_MIXED, "mixed"), (GRAPH_TAIL, "tail"))
        return ", ".join(name for bit, name in names if self.graphs & bit) or "none"


Observer = Callable[[StepRecord], None]
"""Called in the engine's thread, between steps. What it raises is raised by `step()`, once all outputs are out."""


@dataclass(slots=True)
class _Begun:
    """What is known of a step once it is scheduled. launch: its end is set later."""

    schedule: Span
    launch_end: float
    blocks: BlockUse
    running: int
    waiting: int


class StepWatch(Watch):
    """Gathers the records for `observers`."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self._begun: dict[int, _Begun] = {}  # by step number
        self._ended: list[Ending] = []
        self._live: list[bool] = []  # by row of the step being committed: its request had not ended before
        self._schedule_start = self._wait_start = self._arrival = self._last_arrival = 0.0

    def scheduling(self) -> None:
        self._schedule_start = time.monotonic()

    def scheduled(self, step: ScheduledStep, scheduler: Scheduler) -> None:
        now = time.monotonic()
        self._begun[step.plan.step] = _Begun(
            Span(self._schedule_start, now), now, scheduler.blocks.use(), len(scheduler.running), len(scheduler.waiting)
        )

    def launched(self, step: ScheduledStep) -> None:
        self._begun[step.plan.step].launch_end = time.monotonic()

    def waiting(self) -> None:
        self._wait_start = time.monotonic()

    def arrived(self, step: ScheduledStep) -> None:
        self._last_arrival, self._arrival = self._arrival, time.monotonic()
        self._live = [request.status is not Status.FINISHED for request, _ in step.rows]

    def updated(self, updates: Sequence[Update], known: Mapping[str, RequestState]) -> None:
        now = time.monotonic()
        for request, *_ in updates:
            state = known.get(request.parent)
            reason = None if state is None else state.samples[request.sample_index].finish_reason
            if reason is not None:
                self._ended.append(Ending(request.id, reason, now))

    def ended(self, request: Request, reason: str) -> None:
        self._ended.append(Ending(request.id, reason, time.monotonic()))

    def committed(self, step: ScheduledStep, result: StepResult) -> Sequence[Delivery]:
        begun = self._begun.pop(step.plan.step, None)
        if begun is None:  # it was launched before anybody observed
            return ()
        wait, commit = Span(self._wait_start, self._arrival), Span(self._arrival, time.monotonic())
        counts = [count if live else 0 for count, live in zip(result.counts.tolist(), self._live, strict=True)]
        return self._deliver(self._record(step, begun, wait, commit, counts, result.graphs, result.parts, None))

    def broken(self, steps: Sequence[ScheduledStep], error: BaseException) -> Sequence[Delivery]:
        now, out = time.monotonic(), []
        self._last_arrival, self._arrival = self._arrival, now
        for step in steps:
            begun = self._begun.pop(step.plan.step, None)
            if begun is not None:
                said, end, none = described(error), Span(now, now), [0] * len(step.rows)
                out += self._deliver(self._record(step, begun, end, end, none, 0, 1, said))
        return out

    def forget(self) -> None:
        self._begun.clear()

    def _deliver(self, record: StepRecord) -> list[Delivery]:
        return [(observer, record) for observer in self.observers]

    def _record(
        self,
        step: ScheduledStep,
        begun: _Begun,
        wait: Span,
        commit: Span,
        new_tokens: Sequence[int],
        graphs: int,
        parts: int,
        error: str | None,
    ) -> StepRecord:
        ended, self._ended = tuple(self._ended), []
        launch = Span(begun.schedule.end, begun.launch_end)
        return StepRecord(
            step=step.plan.step,
            schedule=begun.schedule,
            launch=launch,
            wait=wait,
            commit=commit,
            execution=Span(min(max(launch.start, self._last_arrival), self._arrival), self._arrival),
            rows=_rows(step, new_tokens),
            num_decode_rows=step.plan.num_decode_rows,
            admitted=step.admitted,
            preempted=step.preempted,
            ended=ended,
            graphs=graphs,
            parts=parts,
            blocks=begun.blocks,
            running=begun.running,
            waiting=begun.waiting,
            error=error,
        )


def _rows(step: ScheduledStep, new_tokens: Sequence[int]) -> tuple[Row, ...]:
    plan = step.plan
    each = zip(
        step.rows,
        plan.slots.tolist(),
        plan.starts.tolist(),
        plan.query_lens.tolist(),
        step.sampled,
        new_tokens,
        strict=True,
    )
    return tuple([Row(request.id, *facts) for (request, _), *facts in each])


def add_observer(observer: Observer, watch: Watch) -> Watch:
    """A watch by which `observer` gets the record of each step that is scheduled from here on."""
    watch = watch if isinstance(watch, StepWatch) else StepWatch()
    watch.observers.append(observer)
    return watch


def remove_observer(observer: Observer, watch: Watch) -> Watch:
    """Raises `ValueError` where it does not observe."""
    if not isinstance(watch, StepWatch):
        raise ValueError(f"{observer!r} does not observe this engine")
    watch.observers.remove(observer)
    return watch if watch.observers else Watch()
