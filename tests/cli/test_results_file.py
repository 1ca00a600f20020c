"""What reaches the results file, and what stays in it: rows of an earlier run, rows of a file that vanishes."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from nanoengine.api.errors import ModelSourceError
from nanoengine.api.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanoengine.cli import results as results_file
from nanoengine.cli.results import KEYS, result_row
from nanoengine.core.scheduling.block_manager import BlockUse
from nanoengine.observe.files import GrowingFile
from nanoengine.observe.steps import Span, StepRecord
from nanoengine.observe.trace import TraceFile
from nanoengine.setup.config.prompts import PromptRow
from nanoengine.testing.checkpoints import tiny_llama

from .conftest import FakeEngine

pytestmark = pytest.mark.usefixtures("forked")

Run = Callable[..., Result]
Rows = Callable[[], list[dict[str, Any]]]
OLD = '{"index": 0, "of": "the run before"}\n'
FAKE = (sys.executable, str(Path(__file__).with_name("fake_process.py")))


@pytest.fixture(autouse=True)
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model: a/b\nprompts: [one, two words, three]\noutput: results.jsonl\n")
    return path


# -- log-probs -------------------------------------------------------------------------------------------------------


def positions(found: Any) -> list[dict[int, Logprob] | None]:
    """JSON's form, read as vLLM's users have it in Python."""
    return [None if at is None else {int(token): Logprob(**each) for token, each in at.items()} for at in found]


def test_log_probs_are_in_the_rows_when_asked_for(
    nanoengine: Run, rows: Rows, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, RequestOutput] = {}

    def observed(index: int, row: PromptRow, hashed: str, output: RequestOutput) -> dict[str, Any]:
        seen[index] = output
        return result_row(index, row, hashed, output)

    monkeypatch.setattr(results_file, "result_row", observed)
    tiny_llama(tmp_path / "tiny", with_tokenizer=True)
    config.write_text(
        "model: ./tiny\nchat: false\nprompts: [a b c, d]\noutput: results.jsonl\n"
        "sampler: {max_tokens: 3, ignore_eos: true, n: 2, logprobs: 2, prompt_logprobs: 1}\n"
    )
    result = nanoengine("run", "run.yaml")
    assert result.exit_code == 0, result.stderr
    assert len(rows()) == 2
    for row in rows():
        output = seen[row["index"]]
        for sample, wanted in zip(row["outputs"], output.outputs, strict=True):
            assert wanted.logprobs is not None
            assert len(wanted.logprobs) == 3
            assert positions(sample["logprobs"]) == list(wanted.logprobs)
            assert sample["cumulative_logprob"] == wanted.cumulative_logprob
            assert wanted.cumulative_logprob is not None
            assert wanted.cumulative_logprob < 0
        assert output.prompt_logprobs is not None
        assert row["prompt_logprobs"][0] is None
        assert len(row["prompt_logprobs"]) == len(row["prompt_token_ids"])
        assert positions(row["prompt_logprobs"]) == list(output.prompt_logprobs)
    assert nanoengine("run", "run.yaml", "~sampler", "+sampler.max_tokens=1").exit_code == 0
    assert "prompt_logprobs" not in rows()[0]
    assert rows()[0]["outputs"][0].keys() == {"text", "token_ids", "finish_reason", "stop_reason"}


def test_a_log_prob_without_end_is_a_number_json_has() -> None:
    lost = {5: Logprob(-math.inf, 9, "x")}
    sample = CompletionOutput(index=0, text="x", token_ids=(5,), logprobs=(lost,), cumulative_logprob=-math.inf)
    output = RequestOutput(
        request_id="0", prompt="p", prompt_token_ids=(1, 5), outputs=[sample], finished=True,
        metrics=RequestMetrics(arrival=0.0), prompt_logprobs=(None, lost),
    )  # fmt: skip
    row = json.loads(json.dumps(result_row(0, PromptRow("p"), "h", output), allow_nan=False))
    expected = {"5": {"logprob": -9999.0, "rank": 9, "decoded_token": "x"}}
    assert row["prompt_logprobs"] == [None, expected]
    assert row["outputs"][0]["logprobs"] == [expected]
    assert row["outputs"][0]["cumulative_logprob"] == -9999.0
    assert set(row) == set(KEYS)


# -- other fields of a prompt's row ----------------------------------------------------------------------------------


def test_other_fields_of_the_input_are_in_the_row(fake: Any, nanoengine: Run, rows: Rows, tmp_path: Path) -> None:
    given = [
        {"prompt": "a", "id": "x-1", "tags": [1, {"é": None}]},
        {"prompt": "refuse me", "id": "x-2", "": "\U0001f600"},
    ]
    (tmp_path / "p.JSONL").write_text("".join(json.dumps(each) + "\n" for each in given))
    assert nanoengine("run", "run.yaml", "prompts=p.JSONL").exit_code == 1
    by_index = {row["index"]: row for row in rows()}
    assert [{key: by_index[n][key] for key in each} for n, each in enumerate(given)] == given
    assert by_index[1]["error"]["code"] == "invalid_prompt"
    (tmp_path / "p.csv").write_text("id,prompt\n007,a\n")
    assert nanoengine("run", "run.yaml", "prompts=p.csv").exit_code == 0
    assert (rows()[0]["id"], rows()[0]["prompt"]) == ("007", "a")
    assert nanoengine("run", "run.yaml", "prompts={file: p.csv, carry: []}").exit_code == 0
    assert "id" not in rows()[0]


@pytest.mark.parametrize("key", [key for key in KEYS if key != "prompt"])
def test_a_field_of_the_results_own_name_is_refused_before_the_run(
    fake: Any, nanoengine: Run, tmp_path: Path, key: str
) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", key: 1}) + "\n")
    result = nanoengine("run", "run.yaml", "prompts=p.jsonl")
    assert result.exit_code == 2
    assert f"p.jsonl:1: '{key}' is a key of the results" in result.stderr
    assert not fake.made
    assert nanoengine("run", "run.yaml", "prompts={file: p.jsonl, carry: []}").exit_code == 0


def test_a_row_whose_fields_have_changed_runs_again(fake: Any, nanoengine: Run, rows: Rows, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 2}\n')
    assert nanoengine("run", "run.yaml", "prompts=p.jsonl").exit_code == 0
    path.write_text('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 3}\n')
    result = nanoengine("run", "run.yaml", "prompts=p.jsonl", "--resume")
    assert "1 of 2 prompts are answered and kept" in result.stderr
    assert {row["index"]: row["id"] for row in rows()} == {0: 1, 1: 3}


@pytest.mark.parametrize(
    ("before", "after"), [("1", "true"), ("1", "1.0"), ("[0]", "[false]"), ('{"a": 0}', '{"a": ""}')]
)
def test_a_row_whose_field_has_another_type_runs_again(
    fake: Any, nanoengine: Run, rows: Rows, tmp_path: Path, before: str, after: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a", "id": {before}}}\n')
    assert nanoengine("run", "run.yaml", "prompts=p.jsonl").exit_code == 0
    assert "nothing is left to do" in nanoengine("run", "run.yaml", "prompts=p.jsonl", "--resume").stderr
    path.write_text(f'{{"prompt": "a", "id": {after}}}\n')
    result = nanoengine("run", "run.yaml", "prompts=p.jsonl", "--resume")
    assert "0 of 1 prompts are answered and kept" in result.stderr
    assert json.dumps(rows()[0]["id"]) == after


# -- pipes and devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["/proc/self/fd", "/dev/fd", "link"])
def test_rows_go_into_a_pipe_that_only_proc_names(fake: Any, nanoengine: Run, tmp_path: Path, folder: str) -> None:
    """As `output=/dev/stdout | head` and the shell's `output=>(…)` do."""
    if folder == "link":
        (tmp_path / "link").symlink_to("/proc/self/fd")
    readable, writable = os.pipe()
    try:
        result = nanoengine("run", "run.yaml", f"output={folder}/{writable}")
        assert result.exit_code == 0, result.stderr
        written = os.read(readable, 1 << 16)
    finally:
        os.close(readable)
        os.close(writable)
    assert sorted(json.loads(line)["index"] for line in written.splitlines()) == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link"] * (folder == "link") + ["run.yaml"]


def test_rows_go_to_a_device(fake: Any, nanoengine: Run, tmp_path: Path) -> None:
    assert nanoengine("run", "run.yaml", "output=/dev/null").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


# -- rows of an earlier run ------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path) -> Callable[[], None]:
    """Results and a record of an earlier run; what it returns checks that they are there."""
    files = {"results.jsonl": OLD, "results.jsonl.run.json": "a record\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def check() -> None:
        assert {name: (tmp_path / name).read_text() for name in files} == files
        assert not list(tmp_path.glob(".*.part"))

    return check


def before_the_first_row(fake: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def step(self: FakeEngine) -> Any:
        raise error

    monkeypatch.setattr(FakeEngine, "step", step)


OPENED = [("running", 130), ("bug", 1), ("every prompt fails", 1)]


@pytest.mark.parametrize(
    ("cause", "status", "mutant"),
    [
        *((*each, False) for each in [("config", 2), ("model", 2), ("loading", 130), *OPENED]),
        *((*each, True) for each in OPENED),
    ],
)
def test_a_rerun_that_answers_nothing_keeps_the_rows_that_were_there(
    fake: Any, nanoengine: Run, earlier: Any, monkeypatch: pytest.MonkeyPatch, cause: str, status: int, mutant: bool
) -> None:
    if mutant:  # what was there is emptied when the file is opened
        monkeypatch.setattr(GrowingFile, "_open", lambda self, begin: (os.truncate(self._file.fileno(), 0), False)[1])
    arguments = {"config": ["engine.sed=1"], "every prompt fails": ["prompts=[refuse me, refuse me]"]}.get(cause, [])
    if cause == "model":
        fake.failure = ModelSourceError("no such model")
    if cause == "loading":
        fake.failure = KeyboardInterrupt()
    if cause in ("running", "bug"):
        before_the_first_row(fake, monkeypatch, KeyboardInterrupt() if cause == "running" else ZeroDivisionError("x"))
    assert nanoengine("run", "run.yaml", *arguments).exit_code == status
    if mutant:
        with pytest.raises(AssertionError):
            earlier()
    else:
        earlier()


def test_failures_alone_replace_nothing_and_it_is_said(fake: Any, nanoengine: Run, earlier: Any) -> None:
    result = nanoengine("run", "run.yaml", "prompts=[refuse me]")
    assert "results.jsonl exists already, and is overwritten when the first prompt is answered" in result.stderr
    assert result.stderr.splitlines()[-1] == "no prompt was answered: results.jsonl keeps its old rows"
    earlier()


def test_the_first_row_replaces_rows_and_record(
    fake: Any, nanoengine: Run, rows: Rows, earlier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.interrupt_after = 1
    assert nanoengine("run", "run.yaml").exit_code == 130
    assert [row["index"] for row in rows()] == [2]
    assert json.loads((tmp_path / "results.jsonl.run.json").read_text())["summary"]["finished"] == 1
    assert not list(tmp_path.glob(".*.part"))


def test_a_resume_that_keeps_no_row_keeps_the_file_till_one_is_there(
    fake: Any, nanoengine: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nanoengine("run", "run.yaml").exit_code == 0
    before = (tmp_path / "results.jsonl").read_text()
    before_the_first_row(fake, monkeypatch, KeyboardInterrupt())
    assert nanoengine("run", "run.yaml", "--resume", "prompts=[other, prompts]").exit_code == 130
    assert (tmp_path / "results.jsonl").read_text() == before


def test_a_link_stays_a_link(fake: Any, nanoengine: Run, rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/real.jsonl").write_text(OLD)
    (tmp_path / "results.jsonl").symlink_to("far/real.jsonl")
    assert nanoengine("run", "run.yaml").exit_code == 0
    assert (tmp_path / "results.jsonl").is_symlink()
    assert len((tmp_path / "far/real.jsonl").read_text().splitlines()) == len(rows()) == 3


def test_a_process_killed_before_its_first_row_leaves_the_rows(tmp_path: Path, earlier: Any) -> None:
    part = tmp_path / ".results.jsonl.part"
    for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            [*FAKE, "run", "run.yaml"], cwd=tmp_path, stderr=subprocess.PIPE, env={**os.environ, "FAKE_SECONDS": "60"}
        )
        while not part.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == status
        assert part.exists() == (number == signal.SIGKILL)
        part.unlink(missing_ok=True)
        earlier()


def test_a_file_that_another_run_writes_is_refused_before_loading(
    fake: Any, nanoengine: Run, tmp_path: Path, earlier: Any
) -> None:
    with (tmp_path / "results.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        result = nanoengine("run", "run.yaml")
    assert result.exit_code == 2
    assert "cannot write output results.jsonl: another process is writing it" in result.stderr
    assert not fake.made
    earlier()


def test_a_folder_without_room_for_a_new_file_is_reported_before_loading(
    fake: Any, nanoengine: Run, tmp_path: Path, earlier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name == "results.jsonl")
    result = nanoengine("run", "run.yaml")
    assert (result.exit_code, fake.made) == (2, [])
    assert f"cannot write output results.jsonl: no permission to write in {tmp_path}" in result.stderr
    earlier()


def test_a_full_disk_before_the_first_row_keeps_the_rows(
    fake: Any, nanoengine: Run, tmp_path: Path, earlier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, data: bytes) -> None:
        if data:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanoengine.observe.files.write_all", full)
    result = nanoengine("run", "run.yaml")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "error: cannot write output results.jsonl: No space left on device; "
        "results.jsonl has the rows of the earlier run"
    )
    earlier()


# -- a file that vanishes --------------------------------------------------------------------------------------------


def replaced(path: Path) -> None:
    path.with_suffix(".new").write_text("mine\n")
    path.with_suffix(".new").rename(path)


VANISHED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted": (Path.unlink, "it is no longer there; what was in it is in"),
    "moved": (lambda path: path.rename(path.with_name("moved.jsonl")), "it is no longer there; it was moved to"),
    "replaced": (replaced, "another file has taken its place; what was in it is in"),
    "emptied": (lambda path: os.truncate(path, 0), "another program has changed it"),
    "grown": (lambda path: path.write_text(path.read_text() + "more\n"), "another program has changed it"),
    "folder deleted": (lambda path: shutil.rmtree(path.parent), "it is no longer there; what was in it is in"),
}


@pytest.mark.parametrize("how", VANISHED)
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("there", [False, True])
def test_results_that_vanish_are_an_error_and_the_rows_are_kept(
    fake: Any, nanoengine: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, at: int, there: bool
) -> None:
    """Between two rows, or behind the last one (`at` 2); of a new file, or one that took another's place."""
    folder, act = tmp_path / "out", VANISHED[how][0]
    folder.mkdir()
    if there:
        (folder / "results.jsonl").write_text(OLD)
    step, stats = FakeEngine.step, fake.stats

    def stepping(self: FakeEngine) -> Any:
        if at == self.steps == 1:
            act(folder / "results.jsonl")
        return step(self)

    def ending(self: Any) -> Any:
        if at == self.text_engine.steps == 2 and (folder / "results.jsonl").exists():
            act(folder / "results.jsonl")
        return stats(self)

    monkeypatch.setattr(FakeEngine, "step", stepping)
    monkeypatch.setattr(fake, "stats", ending)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = nanoengine("run", "run.yaml", "output=out/results.jsonl", "prompts=[one, two]")
    assert result.exit_code == 1, result.stderr
    said = result.stderr.splitlines()[-1]
    assert said.startswith("error: cannot write output out/results.jsonl: ") or "results.jsonl.run.json" in said
    assert VANISHED[how][1] in said or "results.jsonl.run.json" in said
    assert "rows kept" in said
    assert "2" in said.rpartition(": ")[2]
    kept = [*folder.glob("*.kept-*"), *folder.glob("moved.jsonl"), *tmp_path.glob("*.kept-*")]
    if how in ("deleted", "moved", "replaced"):
        [path] = kept
        assert str(path) in said
        assert sorted(json.loads(line)["index"] for line in path.read_text().splitlines()) == [0, 1]


def test_a_file_that_takes_the_old_one_s_place_before_the_first_row_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(OLD)
    file = GrowingFile(path)
    file.write(b"new\n")
    replaced(path)
    with pytest.raises(OSError, match="another file has taken its place; what was in it is in"):
        file.settle()
    file.close()
    [kept] = tmp_path.glob("out.jsonl.kept-*")
    assert (path.read_text(), kept.read_text()) == ("mine\n", "new\n")
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_run_left_beside_is_cleared_away(tmp_path: Path) -> None:
    path, part = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.part"
    part.write_text("torn")
    GrowingFile(path).close()
    assert not part.exists()
    path.write_text(OLD)
    part.write_text("torn")
    file = GrowingFile(path)
    file.write(b"new\n")
    file.settle()
    file.close()
    assert (path.read_text(), part.exists()) == ("new\n", False)


def test_an_old_file_that_is_deleted_before_the_first_row_is_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(OLD)
    file = GrowingFile(path)
    path.unlink()
    file.write(b"new\n")
    file.settle()
    file.close()
    assert path.read_text() == "new\n"


@pytest.fixture
def llm_trace(tmp_path: Path) -> tuple[Path, Callable[..., None]]:
    """A path, and what writes a trace of some steps there, with something done in between."""
    path, span = tmp_path / "out.json", Span(0.0, 0.0)
    step = StepRecord(
        step=0, schedule=span, launch=span, wait=span, commit=span, execution=span, rows=(), num_decode_rows=0,
        admitted=(), preempted=(), ended=(), graphs=0, blocks=BlockUse(8, 0, 0, 0), running=0, waiting=0,
    )  # fmt: skip

    def run(between: Callable[[], Any], steps: int = 2) -> None:
        with TraceFile(path) as trace:
            for number in range(steps):
                trace(step)
                if number == 0:
                    between()

    return path, run


def test_a_trace_that_vanishes_is_an_error_at_the_end(tmp_path: Path, llm_trace: Any) -> None:
    path, run = llm_trace
    with pytest.raises(OSError, match="it is no longer there; what was in it is in"):
        run(path.unlink)
    [kept] = tmp_path.glob("out.json.kept-*")
    assert kept.read_text().startswith('[\n{"ph":"i","name":"trace"')


def test_a_trace_takes_another_one_s_place_at_the_first_step(tmp_path: Path, llm_trace: Any) -> None:
    path, run = llm_trace
    path.write_text("of before")
    run(lambda: None, steps=0)
    assert path.read_text() == "of before"
    run(lambda: None)
    assert path.read_text().endswith("\n]\n")
    assert not list(tmp_path.glob(".*"))
