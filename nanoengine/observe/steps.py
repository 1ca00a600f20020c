"""What the engine did, step by step: a frozen `StepRecord` for each observer (`LLM.observe`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nanoengine.api.errors import described
from nanoengine.core.delivery import Delivery, Watch
from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import BlockUse
from nanoengine.core.scheduling.messages import Admission, Preemption, ScheduledStep
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import GRAPH_DECODE, GRAPH_MISSING, GRAPH_MIXED, GRAPH_TAIL, StepResult


class Span(NamedTuple):
    """Seconds on the monotonic clock, which is also that of `RequestMetrics`."""

    start: float
    end: float


class Row(NamedTuple):
    """What a step computes for one sample. "llm-3/0" is the first sample of the request "llm-3".

    Attributes:
        start, num_tokens: it computes the tokens at the positions [start, start + num_tokens).
        sampled: a token is drawn; False: a part of a prompt that is not its last.
        new_tokens: tokens that the sample got; 0 for such a part, and for a row whose request had ended before.
        drafted: of its tokens, the last so many were drafts. accepted: of them, the first so many were what was drawn;
            a sample that ended inside them got fewer tokens.
    """

    request: str
    slot: int
    start: int
    num_tokens: int
    sampled: bool
    new_tokens: int
    drafted: int = 0
    accepted: int = 0


class Drafts(NamedTuple):
    """By position in the draft: how many drafts the rows of a step had, and how many of them were accepted."""

    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


class Ending(NamedTuple):
    """A sample that ended.

    Attributes:
        reason: "stop" (also at a stop string, which its client finds), "length", "abort", or the code of its error.
        at: seconds, as in `Span`.
    """

    request: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step, made when its result is committed.

    Attributes:
        step: its number. Steps come in order.
        schedule, launch, wait, commit: what the engine did for it. Where the engine runs ahead, it schedules and
            launches the next step between this one's launch and wait.
        execution: when the device ran it: from its launch, or the arrival of the step before, to its own arrival.
        rows: decode rows (`num_decode_rows` of them) first, then prefill rows.
        admitted: requests that got a slot. preempted: requests that lost theirs since the step before.
        ended: samples that ended since the step before: by this result, by an abort, by an error.
        graphs: as in `StepResult`.
        blocks: KV blocks while the step ran. running, waiting: requests then.
        error: what the step raised; its rows run again, in smaller steps where memory ran out, else each request alone.
            None: it went well.
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
    def drafts(self) -> Drafts:
        rows = [row for row in self.decode_rows if row.drafted]
        longest = range(max((row.drafted for row in rows), default=0))
        counts = [(sum(row.drafted > i for row in rows), sum(row.accepted > i for row in rows)) for i in longest]
        return Drafts(*zip(*counts, strict=True)) if counts else Drafts()

    @property
    def graph(self) -> str:
        """Which parts ran as replayed CUDA graphs: "none", "decode", "mixed", "decode, tail" and so on; "not
        captured" where a capture failed."""
        names = {GRAPH_DECODE: "decode", GRAPH_MIXED: "mixed", GRAPH_TAIL: "tail", GRAPH_MISSING: "not captured"}
        return ", ".join(name for bit, name in names.items() if self.graphs & bit) or "none"


Observer = Callable[[StepRecord], None]
"""Called in the thread that makes the step, after it. What it raises is raised by `step()`, after all outputs."""


class _Launched(NamedTuple):
    """What is known of a step once it is launched."""

    schedule: Span
    launch: Span
    blocks: BlockUse
    running: int
    waiting: int


class StepWatch:
    """Makes the records for `observers`. The engine calls it, as the protocol `Watch` says."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self._launched: dict[int, _Launched] = {}  # by step number
        self._ended: list[Ending] = []  # since the last record
        self._said: list[int] = []  # by row of the step being committed: output tokens before it
        self._wait_start = self._arrival = self._last_arrival = 0.0

    def launched(self, step: ScheduledStep, scheduler: Scheduler, scheduling: float, launching: float) -> None:
        schedule, launch = Span(scheduling, launching), Span(launching, time.monotonic())
        self._launched[step.plan.step] = _Launched(
            schedule, launch, scheduler.blocks.use(), len(scheduler.running), len(scheduler.waiting)
        )

    def arrived(self, step: ScheduledStep, waiting: float) -> None:
        self._last_arrival, self._arrival, self._wait_start = self._arrival, time.monotonic(), waiting
        self._said = [len(request.output_token_ids) for request, _ in step.rows]

    def ended(self, request: Request, reason: str) -> None:
        self._ended.append(Ending(request.id, reason, time.monotonic()))

    def committed(self, step: ScheduledStep, result: StepResult) -> Sequence[Delivery]:
        known = self._launched.pop(step.plan.step, None)
        if known is None:  # it was launched before it was observed
            return ()
        wait, commit = Span(self._wait_start, self._arrival), Span(self._arrival, time.monotonic())
        new = [len(request.output_token_ids) - n for (request, _), n in zip(step.rows, self._said, strict=True)]
        rows = _rows(step, new, result.counts.tolist())
        return self._deliver(self._record(step, known, wait, commit, rows, result.graphs, None))

    def broken(self, steps: Sequence[ScheduledStep], error: BaseException) -> Sequence[Delivery]:
        now, out = time.monotonic(), []
        self._last_arrival, self._arrival = self._arrival, now
        for step in steps:
            known = self._launched.pop(step.plan.step, None)
            if known is not None:
                text, end, none = described(error), Span(now, now), [0] * len(step.rows)
                out += self._deliver(self._record(step, known, end, end, _rows(step, none, none), 0, text))
        return out

    def _deliver(self, record: StepRecord) -> list[Delivery]:
        return [(observer, record) for observer in self.observers]

    def _record(
        self,
        step: ScheduledStep,
        known: _Launched,
        wait: Span,
        commit: Span,
        rows: tuple[Row, ...],
        graphs: int,
        error: str | None,
    ) -> StepRecord:
        ended, self._ended = tuple(self._ended), []
        return StepRecord(
            step=step.plan.step,
            schedule=known.schedule,
            launch=known.launch,
            wait=wait,
            commit=commit,
            execution=Span(min(max(known.launch.start, self._last_arrival), self._arrival), self._arrival),
            rows=rows,
            num_decode_rows=step.plan.num_decode_rows,
            admitted=step.admitted,
            preempted=step.preempted,
            ended=ended,
            graphs=graphs,
            blocks=known.blocks,
            running=known.running,
            waiting=known.waiting,
            error=error,
        )


def _rows(step: ScheduledStep, new_tokens: Sequence[int], counts: Sequence[int]) -> tuple[Row, ...]:
    """counts: as in `StepResult`."""
    plan = step.plan
    drafted = plan.drafts.tolist() or [0] * len(step.rows)
    each = zip(
        step.rows,
        plan.slots.tolist(),
        plan.starts.tolist(),
        plan.query_lens.tolist(),
        map(bool, step.drawn),
        new_tokens,
        drafted,
        [min(of, max(0, count - 1)) for of, count in zip(drafted, counts, strict=True)],
        strict=True,
    )
    return tuple([Row(request.id, *facts) for (request, _), *facts in each])


def add_observer(observer: Observer, watch: Watch | None) -> StepWatch:
    """A watch by which `observer` gets the record of each step that is launched from here on."""
    found = watch if isinstance(watch, StepWatch) else StepWatch()
    found.observers.append(observer)
    return found


def remove_observer(observer: Observer, watch: Watch | None) -> StepWatch | None:
    """The watch without `observer`; None once it has none. Raises `ValueError` where it does not observe."""
    if not isinstance(watch, StepWatch):
        raise ValueError(f"{observer!r} does not observe this engine")
    watch.observers.remove(observer)
    return watch if watch.observers else None
