"""Runs every rank, also rank 0, in its own process. This process uses no device, and recovery means ending the ranks.

For a step, the plan is encoded once into shared memory and a frame is sent to each rank; the result comes back from
rank 0 in the same way. Every wait has a deadline, and detects the end of a rank at once.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch

from nanoengine.api.errors import EngineClosed, WorkerError
from nanoengine.core.execution.executor import Executor
from nanoengine.core.execution.results import LateStep, StepHandle
from nanoengine.core.step import StepPlan, StepResult, SuppliedColumn
from nanoengine.distributed.channel import Kind, Parcel
from nanoengine.distributed.faults import Report, first_error, late_error
from nanoengine.distributed.process import RankProcess, end, environment, stacks
from nanoengine.distributed.shared import RING, SLOT_BYTES, Layout, Shared, Word
from nanoengine.distributed.wire import decode, encode
from nanoengine.distributed.worker import StartMessage, SuppliedColumns
from nanoengine.params.engine_plan import EnginePlan
from nanoengine.setup.start.memory import MemoryReport

_GRACE_SECONDS = 1.0  # after the first sign of a fault, the rank that caused it has so long to report it
_SLICE_SECONDS = 1.0  # how often a wait checks the ranks' progress, because an interrupt may lose a frame


@dataclass(frozen=True, slots=True)
class _WorkerStep(StepHandle):
    executor: WorkersExecutor
    number: int

    def wait(self) -> StepResult:
        return self.executor._result(self.number)


class WorkersExecutor(Executor):
    """Runs `tensor_parallel_size` ranks on this host. After a rank has failed, all calls raise `WorkerError`."""

    def __init__(self, slot_bytes: int = SLOT_BYTES) -> None:
        """`slot_bytes`: bytes of a slot in the rings. A larger plan or result is sent as a parcel."""
        self._slot_bytes = slot_bytes
        self._ranks: list[RankProcess] = []
        self._shared: Shared | None = None
        self._number = 0  # number of the last launched plan
        self._supplied = 0  # number of the last plan whose columns were supplied
        self._parcels: dict[int, Parcel] = {}  # plans too large for the ring, until all ranks have them
        self._columns: Parcel | None = None  # of `_supplied`, if they are too large for the ring
        self.parcels_sent = 0
        self._results: dict[int, bytearray] = {}  # results too large for the ring, from rank 0
        self._answers: dict[int, bytearray] = {}
        self._reports: dict[int, Report] = {}
        self._shortage = ""  # where memory ran out last, and why
        self._withdrawn = False  # the next step is the first since then
        self._gone: set[int] = set()  # ranks whose socket is closed
        self._ready: dict[int, MemoryReport] = {}
        self._error: WorkerError | None = None
        self._poller = select.poll()
        self._step_seconds = 0.0
        self._unattended = weakref.finalize(self, end, self._ranks, ask=False)

    def start(self, plan: EnginePlan) -> MemoryReport:
        """Starts the ranks and waits until all are ready.

        Raises `WorkerError`. Its `__cause__` is the error that the rank raised, if that is a `NanoEngineError`.
        """
        size, self._step_seconds = plan.options.tensor_parallel_size, plan.options.step_timeout
        layout = Layout(size, self._slot_bytes)
        self._shared = Shared.create(layout)
        threads = max(1, torch.get_num_threads() // size)
        level = logging.getLogger("nanoengine").getEffectiveLevel()
        message = StartMessage(
            plan=plan,
            rank=0,
            layout=layout,
            sys_path=tuple(map(os.path.abspath, sys.path)),
            engine=os.getpid(),
            threads=threads,
            log_level=level,
        )
        for rank in range(size):
            try:
                self._ranks.append(RankProcess(rank, self._shared.fd, environment(threads)))
            except OSError as error:
                self._fail(WorkerError(rank, size, "spawn", f"{type(error).__name__}: {error}"))
            self._poller.register(self._ranks[rank].channel, select.POLLIN)
            own = replace(message, rank=rank, log_level=max(level, logging.WARNING) if rank else level)
            with Parcel(pickle.dumps(own)) as parcel:
                self._ranks[rank].send(Kind.START, 0, parcel)
        self._until(lambda: len(self._ready) == size, plan.options.worker_start_timeout, "worker_start_timeout")
        failed = {name: cause for report in self._ready.values() for name, cause in report.failed_processors.items()}
        return replace(self._ready[0], failed_processors=failed)

    def launch(self, plan: StepPlan) -> StepHandle:
        self._check_ranks(0.0)
        shared, number = self._open(), self._number + 1
        self._until_read(number - RING)
        self._close_read()
        data = encode(plan)
        if not shared.put(shared.layout.plan_at(number), data):
            self._parcels[number] = Parcel(data)
            self.parcels_sent += 1
        if self._withdrawn:
            shared.resume(number)
        self._number, self._withdrawn = number, False
        for rank in self._ranks:
            self._announce(rank)
        return LateStep(partial(self._supply, number)) if plan.late else _WorkerStep(self, number)

    def _supply(self, number: int, columns: Sequence[SuppliedColumn]) -> StepHandle:
        self._check_ranks(0.0)
        self._until_read(number - RING + 1)  # so all have the columns of the plan before that, which were in this slot
        shared, data, old = self._open(), encode(SuppliedColumns(tuple(columns))), self._columns
        fits = shared.put(shared.layout.columns_at(number), data)
        self._columns = None if fits else Parcel(data)
        self._supplied = number
        if old is not None:  # all ranks have it: the plan behind it was launched
            old.close()
        for rank in self._ranks:
            self._announce(rank)
        return _WorkerStep(self, number)

    def _close_read(self) -> None:
        """Closes the parcels that all ranks have read. A rank reads a plan's columns before the plan behind it."""
        read = self._open().least(Word.READ)
        for old in [n for n in self._parcels if n <= read]:
            self._parcels.pop(old).close()
        if self._columns is not None and self._supplied < read:
            self._columns.close()
            self._columns = None

    def _until_read(self, number: int) -> None:
        """Waits until all ranks have read the plan of this number. They send no frame when they have."""
        shared = self._open()
        if shared.least(Word.READ) < number:
            self._until(lambda: shared.least(Word.READ) >= number, self._step_seconds, "step_timeout", every=0.001)

    def _announce(self, rank: RankProcess) -> None:
        """Sends a frame for each new plan, and for its columns. After an interrupt either may be announced twice, which
        the rank ignores; columns that not all ranks got go before the next plan, so that all ranks run the same."""
        for number in range(rank.announced, self._number + 1):
            if number > rank.announced:
                rank.send(Kind.PLAN, number, self._parcels.get(number))
                rank.announced = number
            if number == self._supplied > rank.supplied:
                rank.send(Kind.COLUMNS, number, self._columns)
                rank.supplied = number

    def call(self, name: str, *args: Any) -> list[Any]:
        self._check_ranks(0.0)
        self._answers.clear()
        with Parcel(pickle.dumps((name, args))) as parcel:
            for rank in self._ranks:
                rank.send(Kind.CALL, 0, parcel)
            self._until(lambda: len(self._answers) == len(self._ranks), self._step_seconds, "step_timeout")
        return [pickle.loads(self._answers.pop(rank.rank)) for rank in self._ranks]

    def shutdown(self) -> None:
        started = len(self._ready) == len(self._ranks)  # a rank that is loading reads no frames
        self._end(ask=started and self._error is None)

    def _end(self, *, ask: bool) -> None:
        if self._shared is None:
            return
        end(self._ranks, ask=ask)
        self._unattended.detach()
        for parcel in filter(None, (*self._parcels.values(), self._columns)):
            parcel.close()
        self._parcels.clear()
        self._shared.close()
        self._shared = None  # last, so that after an interrupt all this is done again

    def _result(self, number: int) -> StepResult:
        shared = self._open()
        at = shared.layout.result_at(number)

        def arrived() -> bool:
            if shared.word(0, Word.FINISHED) < number:
                return False
            return shared.is_withdrawn(number) or shared.holds(at) or number in self._results

        self._until(arrived, self._step_seconds, "step_timeout")
        if shared.is_withdrawn(number):
            self._withdrawn = True
            while self._receive(0.0):
                pass  # the rank sent the cause before it noted the step
            raise MemoryError(self._shortage)
        data = shared.take(at)
        if data is None:
            data = self._results[number]
        for old in [n for n in self._results if n <= number]:
            del self._results[old]
        return decode(StepResult, data)

    def _open(self) -> Shared:
        if self._error is not None:
            raise self._error
        if self._shared is None:
            raise EngineClosed
        return self._shared

    def _until(self, done: Callable[[], bool], seconds: float, option: str, *, every: float = _SLICE_SECONDS) -> None:
        """Waits until `done`. If a rank fails, or after `seconds`, ends all ranks and raises `WorkerError`."""
        shared, deadline = self._open(), time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                self._fail(late_error(len(self._ranks), shared, stacks(self._ranks), seconds, option))
            self._check_ranks(min(left, every))

    def _check_ranks(self, seconds: float) -> None:
        """Receives what the ranks have sent; waits at most `seconds`. Raises `WorkerError` if a rank has failed."""
        shared = self._open()
        self._receive(seconds)
        if not self._reports and not self._gone:
            return
        deadline = time.monotonic() + _GRACE_SECONDS
        while all(report.follows for report in self._reports.values()) and len(self._gone) < len(self._ranks):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._receive(left)
        ended = {rank: (self._ranks[rank].status(), self._ranks[rank].written_stack()) for rank in self._gone}
        self._fail(first_error(len(self._ranks), self._reports, ended, shared))

    def _fail(self, error: WorkerError) -> NoReturn:
        self._error = error
        self._end(ask=False)
        raise error

    def _receive(self, seconds: float) -> bool:
        """Whether a rank had sent something."""
        ready = {fd for fd, _ in self._poller.poll(seconds * 1000)}
        for rank in self._ranks:
            if rank.rank not in self._gone and rank.channel.fileno() in ready:
                self._take(rank)
        return bool(ready)

    def _take(self, rank: RankProcess) -> None:
        frame = rank.channel.receive()
        if frame is None:
            self._gone.add(rank.rank)
            self._poller.unregister(rank.channel)
        elif frame.kind is Kind.PORT:
            for other in self._ranks:
                if other is not rank:
                    other.send(Kind.PORT, frame.number)
        elif frame.parcel is None:
            return  # a result that is in the ring
        elif frame.kind is Kind.RESULT:
            self._results[frame.number] = frame.parcel
        elif frame.kind is Kind.SHORT:
            self._shortage = f"rank {rank.rank} of {len(self._ranks)}: {frame.parcel.decode()}"
        elif frame.kind is Kind.ANSWER:
            self._answers[rank.rank] = frame.parcel
        elif frame.kind is Kind.READY:
            self._ready[rank.rank] = pickle.loads(frame.parcel)
        else:
            self._reports[rank.rank] = pickle.loads(frame.parcel)
