"""The process of a rank: `python -m nanoengine.distributed.worker` with three inherited descriptors.

It imports the targets of its plan, and nothing of the program that started the engine. It ends when the engine requests
it, when the engine's end of the socket closes (whatever it is doing then), and after it has reported an error.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from nanoengine.api.errors import forget_locals, is_out_of_memory
from nanoengine.core.step import StepPlan, SuppliedColumn
from nanoengine.distributed.channel import STACK_SIGNAL, Channel, Frame, Kind, Parcel
from nanoengine.distributed.shared import READY, Layout, Shared, Word
from nanoengine.distributed.wire import decode, encode
from nanoengine.params.engine_plan import EnginePlan
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.start.clock import PHASES, StartClock
from nanoengine.setup.start.wake import rank_processes

if TYPE_CHECKING:
    from nanoengine.core.execution.results import StepHandle
    from nanoengine.core.execution.runner import ModelRunner
    from nanoengine.kernels.compile_processes import CompileProcesses
    from nanoengine.setup.start.memory import MemoryReport

_PARENT_CHECK_MS = 2000


@dataclass(frozen=True, slots=True)
class StartMessage:
    """What a rank needs to start. `engine`: the process id of the engine. `threads`: torch's threads on a CPU."""

    plan: EnginePlan
    rank: int
    layout: Layout
    sys_path: tuple[str, ...]
    engine: int
    threads: int
    log_level: int


@dataclass(frozen=True, slots=True)
class SuppliedColumns:
    """The columns of a late plan, as a message."""

    columns: tuple[SuppliedColumn, ...]


def main(socket_fd: int, memory_fd: int, stack_fd: int) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine handles Ctrl-C
    faulthandler.enable(file=stack_fd)
    faulthandler.register(STACK_SIGNAL, file=stack_fd)
    channel = Channel(socket.socket(fileno=socket_fd))
    frame = channel.receive()
    if frame is None or frame.parcel is None:
        return 1
    start: StartMessage = pickle.loads(frame.parcel)
    sys.path[:] = start.sys_path
    threading.Thread(target=_watch, args=(channel.fileno(), start.engine), daemon=True).start()
    _log_to_stderr(start)
    return Worker(start, channel, Shared(memory_fd, start.layout)).run()


def _watch(fd: int, engine: int) -> None:
    """Ends this process when the engine's process ends, even while the main thread is in a collective."""
    poller = select.poll()
    poller.register(fd, 0)  # reports only that the other end is closed
    while not poller.poll(_PARENT_CHECK_MS) and os.getppid() == engine:
        pass  # a fork of the engine's process may keep the other end of the socket open
    os._exit(1)


def _log_to_stderr(start: StartMessage) -> None:
    prefix = f"rank {start.rank}: "
    logging.basicConfig(level=start.log_level, format=f"{prefix}%(levelname)s %(name)s: %(message)s")


class PhaseClock(StartClock):
    """A clock that also writes the current phase to the shared memory, for the engine."""

    def __init__(self, shared: Shared, rank: int) -> None:
        super().__init__()
        self._shared, self._rank = shared, rank

    def enter(self, name: str) -> None:
        self._shared.note(self._rank, Word.PHASE, PHASES.index(name))

    def lap(self, name: str) -> None:
        super().lap(name)
        self.enter(PHASES[min(PHASES.index(name) + 1, len(PHASES) - 1)])


class Worker:
    """Reads plans from the ring and runs them in order. Rank 0 writes the results."""

    def __init__(self, start: StartMessage, channel: Channel, shared: Shared) -> None:
        self._start, self._channel, self._shared, self._rank = start, channel, shared, start.rank
        self._sending = threading.Lock()
        self._parcels: dict[int, bytearray] = {}  # plans that were too large for the ring
        self._step = 0  # the step that is being launched; 0: none
        self._late: tuple[int, StepHandle | None] | None = None  # the newest step, which waits for columns
        self._launched: SimpleQueue[tuple[int, StepHandle | None]] = SimpleQueue()
        self._finished = threading.Semaphore(0)  # one for each launched step whose result has arrived

    def run(self) -> int:
        """Runs until the engine ends it. Returns the exit status."""
        try:
            self._build()
            self._serve()
        except BaseException as error:  # noqa: BLE001 - a plugin may even call sys.exit(); the engine must get the error
            self._report(error)
            return 1
        return 0

    def _build(self) -> None:
        clock = PhaseClock(self._shared, self._rank)
        clock.enter("import")
        self._runner, memory = self._start_runner(clock)
        self._in_order = self._runner.device.type == "cpu"
        if not self._in_order:
            threading.Thread(target=self._finish_launched, daemon=True).start()
        self._note(Word.PHASE, READY)
        self._send(Kind.READY, 0, pickle.dumps(memory))

    def _start_runner(self, clock: PhaseClock) -> tuple[ModelRunner, MemoryReport]:
        processes = rank_processes(self._start.plan.options)  # which import torch beside this one
        try:
            return self._make_runner(clock, processes)
        finally:
            if processes is not None:
                processes.close()

    def _make_runner(self, clock: PhaseClock, processes: CompileProcesses | None) -> tuple[ModelRunner, MemoryReport]:
        import torch

        from nanoengine.core.execution.step_inputs import MOST_PREFILL_ROWS
        from nanoengine.distributed.group import DistributedGroup, join_store, make_store
        from nanoengine.kernels.choice import KernelChoice
        from nanoengine.setup.start.starter import start_runner

        plan, size = self._start.plan, self._start.layout.size
        clock.lap("import")
        clock.enter("device")
        if plan.options.device == "cuda":
            plan = replace(plan, options=replace(plan.options, device=f"cuda:{self._rank}"))
            torch.cuda.set_device(self._rank)
        else:
            torch.set_num_threads(self._start.threads)
        if self._rank == 0:
            store = make_store(size)
            self._send(Kind.PORT, store.port)
        else:
            store = join_store(self._port(), size)
        rows = plan.options.max_num_seqs + MOST_PREFILL_ROWS if plan.options.custom_all_reduce else 0
        device = torch.device(plan.options.device)
        pushes = KernelChoice.of(plan.options.kernels).has("sums_pushed")
        group = DistributedGroup(self._rank, size, device, store, self._entered, shared_rows=rows, pushes=pushes)
        return start_runner(plan, TargetLoader(plan.plugin_files), group, clock, processes=processes)

    def _port(self) -> int:
        frame = self._channel.receive()
        if frame is None:
            raise EOFError("the engine is gone")
        assert frame.kind is Kind.PORT, frame.kind
        return frame.number

    def _word(self, word: Word) -> int:
        return self._shared.word(self._rank, word)

    def _note(self, word: Word, value: int) -> None:
        self._shared.note(self._rank, word, value)

    def _entered(self) -> None:
        """Returns when all ranks have reached this collective.

        Raises `MemoryError` if one has run out of memory. So all ranks leave the step before the same collective, and
        none waits in it.
        """
        number = self._word(Word.COLLECTIVES) + 1
        self._note(Word.COLLECTIVES, number)
        for seconds in _pauses():
            if self._shared.least(Word.COLLECTIVES) >= number:
                return
            if self._shared.is_withdrawn(self._step):
                self._note(Word.COLLECTIVES, number - 1)
                raise MemoryError("another rank ran out of memory")
            time.sleep(seconds)

    def _serve(self) -> None:
        while (frame := self._channel.receive()) is not None and frame.kind is not Kind.STOP:
            if frame.kind is Kind.PLAN:
                self._plans(frame)
            elif frame.kind is Kind.COLUMNS:
                self._columns(frame)
            elif frame.kind is Kind.CALL:
                self._call(frame)

    def _plans(self, frame: Frame) -> None:
        if frame.parcel is not None and frame.number > self._word(Word.READ):
            self._parcels[frame.number] = frame.parcel
        for number in range(self._word(Word.READ) + 1, frame.number + 1):
            data = self._shared.take(self._shared.layout.plan_at(number)) or self._parcels.pop(number)
            self._note(Word.READ, number)
            plan = decode(StepPlan, data)
            handle = self._launch(number, partial(self._runner.launch, plan))
            self._late = (number, handle) if plan.late else None  # an older one is dropped: the engine was interrupted
            if not plan.late:
                self._launched_whole(number, handle)

    def _columns(self, frame: Frame) -> None:
        """Launches the tail of the late step. No effect where the columns are announced twice."""
        late, self._late = self._late, None
        if late is None:
            return
        number, handle = late
        assert number == frame.number, (number, frame.number)
        data = frame.parcel or self._shared.take(self._shared.layout.columns_at(number))
        assert data is not None, "columns are neither in the ring nor in a parcel"
        columns = decode(SuppliedColumns, data).columns
        if handle is not None:
            handle = self._launch(number, partial(handle.supply, columns))
        self._launched_whole(number, handle)

    def _launched_whole(self, number: int, handle: StepHandle | None) -> None:
        self._note(Word.LAUNCHED, number)
        if self._in_order:
            self._finish(number, handle)
        else:
            self._launched.put((number, handle))

    def _launch(self, number: int, launch: Callable[[], StepHandle]) -> StepHandle | None:
        """Launches a step, or the tail of a late one.

        None: a rank ran out of memory in this step or the one before; the engine withdraws both.
        """
        if self._shared.is_withdrawn(number):
            return None
        self._step = number
        try:
            return launch()
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
            self._leave(number, error)
            return None
        finally:
            self._step = 0

    def _leave(self, number: int, error: BaseException) -> None:
        from nanoengine.distributed.faults import cause_of

        if not self._in_order:
            sys.modules["torch"].cuda.synchronize()  # a peer may still be reading what the next step writes
        if not self._shared.is_withdrawn(number):
            self._send(Kind.SHORT, number, cause_of(error).encode())
            self._note(Word.SHORT, number)
        forget_locals(error)

    def _finish_launched(self) -> None:
        """Runs in a thread if a launch only enqueues work: waits for the device during the next launch."""
        try:
            while True:
                self._finish(*self._launched.get())
        except BaseException as error:  # noqa: BLE001 - as in `run`
            self._report(error)
            os._exit(1)

    def _finish(self, number: int, handle: StepHandle | None) -> None:
        """Rank 0 gives a result only when no rank can run out of memory any more in this step."""
        result, parcel = handle and handle.wait(), None
        if self._rank == 0:
            for seconds in _pauses():
                if self._shared.least(Word.LAUNCHED) >= number:
                    break
                time.sleep(seconds)
            if result is not None:
                data = encode(result)
                if not self._shared.put(self._shared.layout.result_at(number), data):
                    parcel = data
        self._note(Word.FINISHED, number)
        self._finished.release()
        if self._rank == 0:
            self._send(Kind.RESULT, number, parcel)

    def _call(self, frame: Frame) -> None:
        """Calls a function of the runner after all launched steps, and sends its return value."""
        assert frame.parcel is not None
        name, args = pickle.loads(frame.parcel)
        while self._word(Word.FINISHED) < self._word(Word.LAUNCHED):
            self._finished.acquire()
        answer: Any = self._runner.call(name, *args)
        self._send(Kind.ANSWER, frame.number, pickle.dumps(answer))

    def _send(self, kind: Kind, number: int = 0, data: bytes | None = None) -> None:
        with self._sending:
            if data is None:
                self._channel.send(kind, number)
                return
            with Parcel(data) as parcel:
                self._channel.send(kind, number, parcel)

    def _report(self, error: BaseException) -> None:
        from nanoengine.distributed.faults import phase_of, report_of

        try:
            self._send(Kind.FAILED, 0, pickle.dumps(report_of(error, phase_of(self._shared, self._rank))))
        except OSError:  # the engine does not exist any more
            logging.getLogger(__name__).error("the engine is gone; this rank ends", exc_info=error)


def _pauses() -> Iterator[float]:
    """Seconds between two looks at the other ranks: none at first, as they mostly come within microseconds."""
    return chain(repeat(0.0, 200), repeat(5e-5, 2000), repeat(1e-3))


if __name__ == "__main__":
    status = main(*map(int, sys.argv[1:4]))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without waiting for other threads (collectives, drivers)
