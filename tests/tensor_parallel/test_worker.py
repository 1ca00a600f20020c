"""The ends of the channel by themselves: frames and parcels, the ring, a worker where launching is only enqueuing, and
whose error it is."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoengine.api.errors import ConfigError
from nanoengine.core.execution.results import LateStep
from nanoengine.core.step import StepPlan, StepResult, SuppliedColumn, i32
from nanoengine.distributed import worker as main
from nanoengine.distributed.channel import Channel, Frame, Kind, Parcel
from nanoengine.distributed.faults import exit_words, first_error, late_error, phase_of, report_of
from nanoengine.distributed.group import CollectiveFailed
from nanoengine.distributed.shared import READY, RING, Layout, Shared, Word
from nanoengine.distributed.wire import decode, encode
from nanoengine.distributed.worker import SuppliedColumns, Worker
from nanoengine.setup.start.clock import PHASES


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    here, there = Channel.pair()
    other = Channel(there)
    yield here, other
    here.close()
    other.close()


def test_frames_and_parcels(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    big = os.urandom(3 << 20)  # far more than a socket holds
    with Parcel(big) as parcel:
        for number in range(3):
            here.send(Kind.PLAN, number, parcel)
        here.send(Kind.STOP)
    for number in range(3):
        assert there.receive() == Frame(Kind.PLAN, number, bytearray(big))
    assert there.receive() == Frame(Kind.STOP, 0, None)
    here.close()
    assert there.receive() is None
    with pytest.raises(BrokenPipeError):
        there.send(Kind.READY)


def test_a_frame_in_pieces(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    here.send(Kind.RESULT, 1 << 40)
    raw = there._socket.recv(64)

    def send() -> None:
        for i in range(0, len(raw), 5):
            here._socket.send(raw[i : i + 5])
            time.sleep(0.01)

    sender = threading.Thread(target=send)
    sender.start()
    assert there.receive() == Frame(Kind.RESULT, 1 << 40, None)
    sender.join()


def test_slots_of_the_rings() -> None:
    shared = Shared.create(Layout(3, 64))
    other = Shared(os.dup(shared.fd), shared.layout)
    places = [at(n) for at in (shared.layout.plan_at, shared.layout.result_at) for n in range(RING)]
    for i, at in enumerate(places):
        assert shared.put(at, bytes([i + 1]) * 64)
    assert [other.take(at) for at in places] == [bytearray([i + 1]) * 64 for i in range(len(places))]
    assert shared.layout.plan_at(1) == shared.layout.plan_at(1 + RING)
    assert not shared.put(places[0], bytes(65))
    assert other.take(places[0]) is None
    assert not other.holds(places[0])
    for rank in range(3):
        other.note(rank, Word.READ, 7 + rank)
    assert (shared.least(Word.READ), shared.word(2, Word.READ), shared.word(2, Word.LAUNCHED)) == (7, 9, 0)
    for view in (shared, other):
        view.close()
        view.close()


def test_memory_of_an_engine_that_is_dropped_and_not_closed() -> None:
    shared = Shared.create(Layout(3, 64))
    fd = shared.fd
    os.fstat(fd)
    del shared
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


class Step:
    def __init__(self, plan: StepPlan, gate: threading.Event) -> None:
        self.plan, self.gate = plan, gate

    def wait(self) -> StepResult:
        self.gate.wait(60)
        if self.plan.step == 13:
            raise RuntimeError("the device says no")
        return StepResult(step=self.plan.step, token_ids=i32([self.plan.step]))


class Device:
    """A runner that enqueues: nothing has a result before the gate is open."""

    device = SimpleNamespace(type="cuda")

    def __init__(self) -> None:
        self.gate, self.launched = threading.Event(), SimpleQueue[int]()

    def launch(self, plan: StepPlan) -> Any:
        self.launched.put(plan.step)
        return LateStep(lambda columns: self.finish(plan, columns)) if plan.late else Step(plan, self.gate)

    def finish(self, plan: StepPlan, columns: Sequence[SuppliedColumn]) -> Any:
        self.launched.put(-sum(int(column.values.sum()) for column in columns))
        return Step(plan, self.gate)

    def call(self, target: str, *args: Any) -> Any:
        return getattr(self, target)(*args)

    def ask(self, what: int) -> int:
        assert self.gate.is_set(), "a call comes after the launched steps"
        return what + 1


class Hosted:
    """A worker of rank 0 on a thread of this process, and the engine's end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slot_bytes: int) -> None:
        self.runner, self.exited = Device(), SimpleQueue[int]()
        monkeypatch.setattr(Worker, "_start_runner", lambda worker, clock: (self.runner, "memory"))
        monkeypatch.setattr(main.os, "_exit", lambda status: self.exited.put(status))
        self.layout = Layout(1, slot_bytes)
        self.shared = Shared.create(self.layout)
        self.channel, there = Channel.pair()
        self.theirs = Channel(there)
        start: Any = SimpleNamespace(rank=0, layout=self.layout)
        worker = Worker(start, self.theirs, Shared(os.dup(self.shared.fd), self.layout))
        self.thread = threading.Thread(target=lambda: self.exited.put(worker.run()), daemon=True)
        self.thread.start()
        ready = self.hear(Kind.READY)
        assert pickle.loads(ready.parcel or b"") == "memory"
        self.worker = worker

    def hear(self, kind: Kind) -> Frame:
        frame = self.channel.receive()
        assert frame is not None
        assert frame.kind is kind
        return frame

    def plan(self, number: int, step: int, *, late: bool = False) -> None:
        plan = StepPlan(step=step, slots=i32(range(40)), late=late)
        self.send(Kind.PLAN, number, self.layout.plan_at(number), encode(plan))

    def columns(self, number: int, *values: int) -> None:
        made = [
            SuppliedColumn(processor="p", column="c", draws=i32([0]), values=i32([value]), offsets=i32([0, 1]))
            for value in values
        ]
        self.send(Kind.COLUMNS, number, self.layout.columns_at(number), encode(SuppliedColumns(tuple(made))))

    def send(self, kind: Kind, number: int, at: int, data: bytes) -> None:
        if self.shared.put(at, data):
            self.channel.send(kind, number)
        else:
            with Parcel(data) as parcel:
                self.channel.send(kind, number, parcel)

    def result(self, number: int) -> int:
        frame = self.hear(Kind.RESULT)
        data = frame.parcel or self.shared.take(self.layout.result_at(number))
        assert data is not None
        assert frame.number == number
        return int(decode(StepResult, data).token_ids[0])

    def close(self) -> None:
        self.channel.close()
        self.thread.join(60)
        self.theirs.close()
        self.worker._shared.close()
        self.shared.close()


@pytest.mark.parametrize("slot_bytes", [4096, 64])
def test_a_worker_launches_while_results_are_awaited(monkeypatch: pytest.MonkeyPatch, slot_bytes: int) -> None:
    hosted = Hosted(monkeypatch, slot_bytes)
    hosted.plan(1, 101)
    hosted.plan(2, 102)
    hosted.channel.send(Kind.PLAN, 2)  # announced twice, after an interrupt
    assert [hosted.runner.launched.get(timeout=60) for _ in range(2)] == [101, 102]
    with Parcel(pickle.dumps(("ask", (41,)))) as parcel:
        hosted.channel.send(Kind.CALL, 0, parcel)
    time.sleep(0.05)
    hosted.runner.gate.set()
    assert [hosted.result(1), hosted.result(2)] == [101, 102]
    assert pickle.loads(hosted.hear(Kind.ANSWER).parcel or b"") == 42
    assert hosted.runner.launched.empty()
    hosted.channel.send(Kind.STOP)
    assert hosted.exited.get(timeout=60) == 0
    hosted.close()


@pytest.mark.parametrize("slot_bytes", [4096, 64])
def test_a_worker_finishes_a_late_step_when_its_columns_come(monkeypatch: pytest.MonkeyPatch, slot_bytes: int) -> None:
    """And a late step without columns, after an interrupt, is dropped when the next one comes."""
    hosted = Hosted(monkeypatch, slot_bytes)
    hosted.runner.gate.set()
    hosted.plan(1, 101, late=True)
    assert hosted.runner.launched.get(timeout=60) == 101
    assert hosted.shared.word(0, Word.LAUNCHED) == 0
    hosted.columns(1, 40, 2)
    assert hosted.runner.launched.get(timeout=60) == -42
    assert hosted.result(1) == 101
    hosted.channel.send(Kind.COLUMNS, 1)  # announced twice, after an interrupt
    hosted.plan(2, 102, late=True)
    hosted.plan(3, 103, late=True)
    hosted.columns(3)
    hosted.plan(4, 104)
    assert [hosted.runner.launched.get(timeout=60) for _ in range(4)] == [102, 103, 0, 104]
    assert [hosted.result(3), hosted.result(4)] == [103, 104]
    hosted.channel.send(Kind.STOP)
    assert hosted.exited.get(timeout=60) == 0
    hosted.close()


def test_what_a_device_says_late_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted = Hosted(monkeypatch, 4096)
    hosted.runner.gate.set()
    hosted.plan(1, 13)
    report = pickle.loads(hosted.hear(Kind.FAILED).parcel or b"")
    assert (report.phase, report.cause, report.follows) == ("step 1", "RuntimeError: the device says no", False)
    assert hosted.exited.get(timeout=60) == 1
    hosted.close()


def test_who_is_to_blame() -> None:
    shared = Shared.create(Layout(3, 64))
    for rank in range(3):
        shared.note(rank, Word.PHASE, READY)
    follows = CollectiveFailed("a collective of 3 ranks failed")
    try:
        raise RuntimeError("in a wrapper") from follows
    except RuntimeError as error:
        broken = report_of(error, "step 4")
    time.sleep(0.01)
    own, later = report_of(ConfigError("of rank 2"), "step 4"), report_of(KeyError("x"), "step 4")
    assert broken.follows
    assert not own.follows
    assert first_error(3, {0: broken, 2: own, 1: later}, dict.fromkeys(range(3), (1, "")), shared).rank == 2
    shared.note(1, Word.READ, 5)
    died = first_error(3, {0: broken}, {0: (1, ""), 1: (-11, "its stack")}, shared)
    assert (died.rank, died.phase, died.cause) == (1, "step 5", "the process ended: killed by SIGSEGV")
    assert died.traceback == "its stack"
    assert first_error(3, {2: broken}, {2: (1, "")}, shared).rank == 2
    ours = first_error(3, {2: own}, {}, shared)
    assert isinstance(ours.__cause__, ConfigError)
    assert "of rank 2" in ours.traceback
    assert "Traceback" not in str(ours), "in our own words already"
    assert ours.summary == "rank 2 of 3 failed (step 4): ConfigError: of rank 2"
    assert pickle.loads(pickle.dumps(ours)).summary == ours.summary
    shared.close()


def test_where_a_rank_stands() -> None:
    shared = Shared.create(Layout(2, 64))
    assert phase_of(shared, 0) == "spawn"
    shared.note(0, Word.PHASE, PHASES.index("capture"))
    shared.note(1, Word.PHASE, READY)
    assert (phase_of(shared, 0), phase_of(shared, 1)) == ("capture", "idle")
    late = late_error(2, shared, ["a stack", "another"], 3.5, "worker_start_timeout")
    assert (late.rank, late.phase) == (0, "capture")
    shared.note(0, Word.PHASE, READY)
    for step, words in (("step 7", (7, 6, 5)), ("step 6", (7, 7, 5)), ("idle", (7, 7, 7))):  # launched while one runs
        for word, value in zip((Word.READ, Word.LAUNCHED, Word.FINISHED), words, strict=True):
            shared.note(0, word, value)
            shared.note(1, word, 7)
        assert phase_of(shared, 0) == step
    for word, behind in ((Word.READ, 1), (Word.COLLECTIVES, 0)):
        shared.note(1 - behind, word, 9)
        shared.note(behind, word, 8)
        assert late_error(2, shared, ["a stack", "another"], 3.5, "step_timeout").rank == behind
        shared.note(behind, word, 9)
    assert "rank 1, idle:\nanother" in late.traceback
    shared.close()


def test_figures_of_a_gpu_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"memory_allocated": 3 << 30, "memory_reserved": 4 << 30, "mem_get_info": (1 << 29, 8 << 30)}
    for name, value in {**figures, "is_available": True, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    report = report_of(torch.OutOfMemoryError("CUDA out of memory."), "step 3")
    text = "GPU 1: 3.00 GiB in use by torch, 4.00 GiB held by it, 0.50 GiB of 8.00 GiB free"
    assert report.cause == f"OutOfMemoryError: CUDA out of memory. [{text}]"


def test_exit_words() -> None:
    assert exit_words(3) == "exit status 3"
    assert exit_words(-9).startswith("killed by SIGKILL, as the kernel")
    assert exit_words(None) == "it closed its connection"
