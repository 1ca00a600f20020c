"""What observers get: everything that happened, in agreement with the tokens and the counters, and nothing else."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import nanoengine
from nanoengine import LLM, SamplingParams, StepRecord, TraceFile
from nanoengine.api.errors import WorkerError
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import GRAPH_DECODE, GRAPH_MIXED, GRAPH_TAIL
from nanoengine.observe.steps import StepWatch, remove_observer
from nanoengine.testing.mock_model import MockModel

from .support import greedy, mock_llm, prompts, tokens_of
from .timeline import check, read, within

GREEDY = SamplingParams(temperature=0, max_tokens=12)
ASKED = prompts(12, shared=8, longest=20)
LONG = prompts(1, seed=5, shortest=70, longest=70)[0]


def tight(tmp_path: Path, **options: Any) -> LLM:
    """An engine that must chunk, share and preempt."""
    given = {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 32, "max_num_seqs": 6, **options}
    return mock_llm(tmp_path, **given)


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    with tight(tmp_path) as made:
        yield made


@pytest.mark.parametrize("overlap", [True, False])
def test_records_tell_what_happened(tmp_path: Path, overlap: bool) -> None:
    asked, records = [LONG, *ASKED], list[StepRecord]()
    with tight(tmp_path, overlap=overlap) as llm:
        with llm.observe(records.append):
            outputs = llm.generate(asked, GREEDY, use_tqdm=False)
        stats = llm.stats()
    assert tokens_of(outputs) == [greedy(prompt, 12) for prompt in asked]
    # a dead row behind the last stop may never be waited for
    assert [r.step for r in records] == list(range(len(records)))
    assert stats.steps - len(records) in (0, 1)
    assert sum(len(r.preempted) for r in records) == stats.preemptions > 0
    assert sum(not row.sampled for r in records for row in r.rows) == stats.chunks > 0
    admitted = [new for r in records for new in r.admitted]
    assert sum(new.cached for new in admitted if not new.resumed) == stats.prefix_hit_tokens > 0
    assert sum(new.cached for new in admitted if new.resumed) == stats.resumed_hit_tokens > 0
    assert sum(new.resumed for new in admitted) == stats.preemptions
    assert sum(r.new_tokens for r in records) == 12 * len(asked)
    assert sorted((end.request, end.reason) for r in records for end in r.ended) == sorted(
        (f"llm-{i}/0", "length") for i in range(len(asked))
    )
    for lost in (lost for r in records for lost in r.preempted):
        assert " KV blocks and " in lost.why
        assert lost.computed > 0
    assert max(r.blocks.shared for r in records) >= 2  # the common beginning: two blocks of 4
    assert max(r.blocks.cached for r in records) > 0
    assert all(r.blocks.shared <= r.blocks.used <= r.blocks.total == 24 for r in records)
    assert max(r.waiting for r in records) > 0
    assert max(r.running for r in records) == 6
    assert {r.graph for r in records} == {"none"}


def test_times_are_in_order(llm: LLM) -> None:
    records: list[StepRecord] = []
    with llm.observe(records.append):
        llm.generate(ASKED, GREEDY, use_tqdm=False)
    for r in records:
        assert r.schedule.start <= r.schedule.end == r.launch.start <= r.launch.end <= r.wait.start
        assert r.wait.start <= r.wait.end == r.commit.start <= r.commit.end
        assert r.launch.start <= r.execution.start <= r.execution.end == r.wait.end
    for a, b in pairwise(records):
        assert a.execution.end <= b.execution.start
    ahead = [a.commit.start > b.launch.end for a, b in pairwise(records)]
    assert any(ahead), "the engine ran ahead: the next step was launched before this one's result was there"


def test_rows_follow_each_request(llm: LLM) -> None:
    """Each request's rows are its tokens, one after the other, from where its admission says."""
    records: list[StepRecord] = []
    with llm.observe(records.append):
        outputs = llm.generate([LONG, *ASKED], GREEDY, use_tqdm=False)
    at: dict[str, int] = {}
    slots: dict[str, int] = {}
    for r in records:
        for lost in r.preempted:
            assert at.pop(lost.request) == lost.computed
            assert slots.pop(lost.request) == lost.slot
        for new in r.admitted:
            at[new.request], slots[new.request] = new.cached, new.slot
        for row in r.rows:
            assert (row.start, row.slot) == (at[row.request], slots[row.request])
            at[row.request] += row.num_tokens
        assert all(row.num_tokens == 1 and row.sampled for row in r.decode_rows)
        assert r.decode_rows + r.prefill_rows == r.rows
    lengths = {f"{o.request_id}/0": len(o.prompt_token_ids) + 11 for o in outputs}
    assert at == lengths  # the last token is drawn, and never computed


def test_the_row_behind_a_stop_token_got_nothing(llm: LLM) -> None:
    """Under run-ahead a stop token is seen when the next row is already launched."""
    stop = greedy(ASKED[0], 5)[-1]
    expected = len(greedy(ASKED[0], 12, [stop]))
    stops = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop])
    records: list[StepRecord] = []
    with llm.observe(records.append):
        llm.generate(ASKED[:2], [stops, GREEDY], use_tqdm=False)
    drawn = [row.new_tokens for r in records for row in r.rows if row.request == "llm-0/0"]
    assert drawn == [1] * expected + [0]


def test_a_stop_string_an_abort_and_a_failure_are_reported_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, poison = MockModel.forward, 96

    def poisoned(self: MockModel, input_ids: Any, positions: Any, batch: Any) -> Any:
        if (input_ids == poison).any():
            raise RuntimeError("a kernel blew up")
        return forward(self, input_ids, positions, batch)

    monkeypatch.setattr(MockModel, "forward", poisoned)
    fine = [p for p in prompts(60, seed=3) if poison not in [*p, *greedy(p, 12)]][:2]
    stop = greedy(fine[0], 3)[-1]
    records: list[StepRecord] = []
    with mock_llm(tmp_path) as llm, llm.observe(records.append):
        engine = llm.engine
        engine.add_request("stops", fine[0], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop]))
        engine.add_request("aborted", fine[1], SamplingParams(temperature=0, max_tokens=500, ignore_eos=True))
        engine.add_request("breaks", [1, poison, 2], GREEDY)
        for _ in range(12):
            engine.step()
        engine.abort_request("aborted")
        while engine.has_unfinished_requests():
            engine.step()
        llm.generate([[5, 6]], GREEDY, use_tqdm=False)  # an ending is in the record of the step that follows it
    reasons = {end.request: end.reason for r in records for end in r.ended}
    assert reasons == {"stops/0": "stop", "aborted/0": "abort", "breaks/0": "step_failed", "llm-0/0": "length"}
    broke = [r for r in records if r.error is not None]
    assert {r.error for r in broke} == {"RuntimeError: a kernel blew up"}
    whys = {lost.why for r in records for lost in r.preempted}
    assert f"step {broke[0].step} broke" in whys <= {f"step {r.step} broke" for r in broke}
    assert all(row.new_tokens == 0 for r in broke for row in r.rows)


def test_a_rank_s_failure_is_the_last_record(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[StepRecord] = []
    launch, count = llm.engine._executor.launch, iter(range(100))

    class Fails:
        late = False

        def wait(self) -> Any:
            raise WorkerError(1, 2, "step 5", "it was killed")

    monkeypatch.setattr(llm.engine._executor, "launch", lambda plan: Fails() if next(count) == 5 else launch(plan))
    with llm.observe(records.append), pytest.raises(WorkerError, match="it was killed"):
        llm.generate(ASKED[:2], GREEDY, use_tqdm=False)
    assert [r.error is None for r in records] == [True] * 5 + [False] * (len(records) - 5)
    assert len(records) > 5
    assert "rank 1 of 2 failed (step 5): it was killed" in str(records[5].error)
    assert {(end.request, end.reason) for end in records[5].ended} == {
        ("llm-0/0", "worker_failed"),
        ("llm-1/0", "worker_failed"),
    }


def test_an_interrupt_amid_a_step_leaves_records_and_trace_sound(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine begins anew with a fresh scheduler, whose steps count from 0."""
    commit, count = Scheduler.commit, iter(range(1000))

    def interrupted(self: Scheduler, *arguments: Any) -> Any:
        if next(count) == 5:
            raise KeyboardInterrupt
        return commit(self, *arguments)

    monkeypatch.setattr(Scheduler, "commit", interrupted)
    records: list[StepRecord] = []
    with TraceFile(tmp_path / "out.json") as trace, llm.observe(trace), llm.observe(records.append):
        with pytest.raises(KeyboardInterrupt):
            llm.generate(ASKED, GREEDY, use_tqdm=False)
        assert tokens_of(llm.generate(ASKED, GREEDY, use_tqdm=False)) == [greedy(p, 12) for p in ASKED]
    assert [r.step for r in records] == [*range(5), *range(len(records) - 5)]
    found = read(tmp_path / "out.json")
    ends = [stay.args["ended"] for each in found.requests().values() for stay in each]
    assert "interrupted" in ends
    assert ends.count("length") == len(ASKED)


def test_graphs_have_names(llm: LLM) -> None:
    records: list[StepRecord] = []
    with llm.observe(records.append):
        llm.generate(ASKED[:1], GREEDY, use_tqdm=False)
    names = [replace(records[0], graphs=bits).graph for bits in (0, GRAPH_DECODE, GRAPH_MIXED | GRAPH_TAIL)]
    assert names == ["none", "decode", "mixed, tail"]


def test_without_an_observer_nothing_is_collected(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StepRecord] = []
    with llm.observe(seen.append):
        llm.generate(ASKED[:2], GREEDY, use_tqdm=False)
    monkeypatch.setattr(StepWatch, "__init__", lambda self: pytest.fail("there is an observer"))
    count = len(seen)
    llm.generate(ASKED[:2], GREEDY, use_tqdm=False)
    assert len(seen) == count > 0
    with pytest.raises(ValueError, match="does not observe"):
        llm.engine.change_watch(partial(remove_observer, seen.append))


def test_several_observers_and_one_that_raises(llm: LLM) -> None:
    """As with sinks: the others lose nothing, and the thread that makes the step gets the error."""
    seen: list[StepRecord] = []

    def clumsy(record: StepRecord) -> None:
        raise ValueError("an observer's own mistake")

    with llm.observe(clumsy), llm.observe(seen.append), pytest.raises(ValueError, match="an observer's own mistake"):
        llm.generate(ASKED[:2], GREEDY, use_tqdm=False)
    assert len(seen) == 1
    assert tokens_of(llm.generate(ASKED[:2], GREEDY, use_tqdm=False)) == [greedy(p, 12) for p in ASKED[:2]]


def test_the_example_of_the_manual(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/cli.md").read_text("utf-8")
    [code] = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {"nanoengine": nanoengine, "llm": llm, "prompts": ASKED, "params": GREEDY})
    assert read(tmp_path / "trace.json").steps
    blocks, preempted = map(int, capsys.readouterr().out.split())
    assert 0 < blocks <= 24
    assert preempted > 0


# -- the file --------------------------------------------------------------------------------------------------------


def test_the_trace_shows_what_the_records_say(llm: LLM, tmp_path: Path) -> None:
    records: list[StepRecord] = []
    path = tmp_path / "out.json"
    with TraceFile(path, {"model": "mock"}) as trace, llm.observe(trace), llm.observe(records.append):
        llm.generate([LONG, *ASKED], GREEDY, use_tqdm=False)
    found = read(path)
    assert (found.about["format"], found.about["model"]) == (1, "mock")
    assert [each.args["step"] for each in found.steps] == [r.step for r in records]
    assert found.counters["KV blocks"] == [
        {"used": r.blocks.used, "shared": r.blocks.shared, "cached": r.blocks.cached} for r in records
    ]
    stays = found.requests()
    lost = {p.request for r in records for p in r.preempted}
    assert stays.keys() == {f"llm-{i}/0" for i in range(13)}
    for request, each in stays.items():
        assert [stay.args["ended"] for stay in each[:-1]] == ["preempted"] * (len(each) - 1)
        assert each[-1].args["ended"] == "length"
        assert (len(each) > 1) == (request in lost)
    assert {i["args"]["request"] for i in found.instants if i["name"] == "preempted"} == lost != set()
    assert max(stay.args["cached"] for each in stays.values() for stay in each) >= 8
    steps = {each.args["step"]: each for each in found.steps}
    for r in records:
        for row in (row for row in r.rows if row.new_tokens or not row.sampled):
            assert any(within(steps[r.step], stay) for stay in stays[row.request]), f"{row} lies in no stay"
    chunks = [each for each in found.inside("llm-0/0") if each.args.get("chunk")]
    assert [each.name for each in chunks] == ["prefill 0–32", "prefill 32–64"]
    assert any(each.name == "decode" for each in found.inside("llm-0/0"))


def test_a_trace_of_aborts_and_late_beginnings_is_sound(llm: LLM, tmp_path: Path) -> None:
    path, engine = tmp_path / "out.json", llm.engine
    for i, prompt in enumerate(ASKED):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    for _ in range(6):
        engine.step()
    with TraceFile(path) as trace, llm.observe(trace):
        for round_ in range(6):
            for _ in range(3):
                engine.step()
            engine.abort_request(str(round_))
        engine.step()
    found = read(path)
    ends = [stay.args["ended"] for each in found.requests().values() for stay in each]
    assert ends.count("abort") >= 3
    assert "not seen" in ends  # still running when the trace was closed
    assert any(stay.args.get("seen") == "late" for each in found.requests().values() for stay in each)


def test_a_trace_without_its_end_is_read_to_where_it_goes(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    trace = TraceFile(path)
    with llm.observe(trace):
        llm.generate(ASKED, GREEDY, use_tqdm=False)
    text = path.read_text("utf-8")  # as if the process had been killed here
    assert text.endswith("},\n")
    found = check(json.loads(text.rstrip(",\n") + "]"), cut=True)
    assert len(found.steps) > 10
    trace.close()
    trace.close()
    read(path)


def test_a_full_disk_ends_the_trace_and_not_the_run(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    trace = TraceFile(path)

    class Full:
        """Takes 5000 bytes more."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 5000

        def write(self, data: Any) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            part = self.file.write(bytes(data[: self.left]))
            self.left -= part
            return part

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    trace._file._file = Full(trace._file._file)
    with llm.observe(trace):
        outputs = llm.generate(ASKED, GREEDY, use_tqdm=False)
    assert tokens_of(outputs) == [greedy(p, 12) for p in ASKED]
    with pytest.raises(OSError, match="No space left"):
        trace.close()
    check(json.loads(path.read_text("utf-8").rstrip(",\n") + "]"), cut=True)


# -- mutants: what the checks above must see -------------------------------------------------------------------------


_launched, _arrived = StepWatch.launched, StepWatch.arrived


def _a_launch_without_its_time(self: StepWatch, step: Any, scheduler: Any, scheduling: float, launching: float) -> None:
    _launched(self, step, scheduler, scheduling, 0.0)


def test_mutants_are_seen(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sound() -> None:
        with TraceFile(tmp_path / "out.json") as trace, llm.observe(trace):
            llm.generate([LONG, *ASKED], GREEDY, use_tqdm=False)
        read(tmp_path / "out.json")

    sound()
    with monkeypatch.context() as patch:
        patch.setattr(StepWatch, "launched", _a_launch_without_its_time)
        with pytest.raises(AssertionError):
            sound()
    with monkeypatch.context() as patch:  # a step begins when it is launched, though another one still runs
        patch.setattr(StepWatch, "arrived", _without_the_arrival_before)
        with pytest.raises(AssertionError, match="crosses"):
            sound()
    with monkeypatch.context() as patch:
        patch.setattr(TraceFile, "_end", lambda self, slot, track, *_: setattr(track, "request", None) or [])
        with pytest.raises(AssertionError, match="without an end"):
            sound()


def _without_the_arrival_before(self: StepWatch, step: Any, waiting: float) -> None:
    _arrived(self, step, waiting)
    self._last_arrival = 0.0
