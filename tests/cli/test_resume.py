"""`nanoengine run --resume`, and what a run leaves behind that is killed, runs out of disk or loses its reader."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from nanoengine.cli.run import Batch
from nanoengine.params.seeds import request_seed
from nanoengine.testing.checkpoints import tiny_llama

pytestmark = pytest.mark.usefixtures("forked")

Run = Callable[..., Result]
Rows = Callable[[], list[dict[str, Any]]]
CONFIG = "model: a/b\nengine: {seed: 5}\nprompts: [one, two words, and three words]\noutput: results.jsonl\n"
FAKE = [sys.executable, str(Path(__file__).with_name("fake_process.py"))]


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return "run.yaml"


@pytest.fixture
def interrupted(fake: Any, nanoengine: Run, config: str) -> Iterator[None]:
    """One of three prompts is answered: the last."""
    fake.interrupt_after = 1
    assert nanoengine("run", config).exit_code == 130
    fake.interrupt_after = None
    yield
    fake.made.clear()


def record(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "results.jsonl.run.json").read_text())


@pytest.mark.usefixtures("interrupted")
def test_finished_rows_are_kept_and_the_rest_run(
    fake: Any, nanoengine: Run, config: str, rows: Rows, tmp_path: Path
) -> None:
    [first] = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    result = nanoengine("run", config, "--resume")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "results.jsonl").read_bytes().startswith(first)
    assert [row["index"] for row in rows()] == [2, 1, 0]
    # as the engine would have given them had all three run at once
    assert fake.made[-1].text_engine.seeds == {"0": request_seed(5, 0), "1": request_seed(5, 1)}
    assert "results.jsonl: 1 of 3 prompts are answered and kept" in result.stderr
    assert "overwritten" not in result.stderr
    assert "3 prompts, 1 kept from an earlier run, 7 prompt + 4 generated tokens" in result.stderr
    assert (record(tmp_path)["summary"]["kept"], record(tmp_path)["summary"]["finished"]) == (1, 2)


@pytest.mark.usefixtures("interrupted")
def test_rows_that_are_torn_failed_or_answer_another_prompt_run_again(
    fake: Any, nanoengine: Run, config: str, rows: Rows, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    [whole] = path.read_text().splitlines(keepends=True)
    row = json.loads(whole)
    failed = json.dumps({**row, "index": 1, "error": {"code": "step_failed", "message": "x"}}) + "\n"
    moved = json.dumps({**row, "index": 0}) + "\n"  # the hash is another prompt's
    beyond = json.dumps({**row, "index": 3}) + "\n"
    path.write_text(failed + moved + "[]\n" + whole + beyond + whole + whole[:40])
    result = nanoengine("run", config, "--resume")
    assert result.exit_code == 0, result.stderr
    assert sorted(fake.made[-1].text_engine.seeds) == ["0", "1"]
    assert path.read_text().startswith(whole)
    assert [(found["index"], found["error"]) for found in rows()] == [(2, None), (1, None), (0, None)]
    assert list(tmp_path.glob(".*.part")) == []


@pytest.mark.usefixtures("interrupted")
def test_rows_behind_a_link_stay_behind_it(nanoengine: Run, config: str, tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "results.jsonl", tmp_path / "elsewhere"
    elsewhere.mkdir()
    path.rename(elsewhere / "rows.jsonl")
    path.symlink_to(elsewhere / "rows.jsonl")
    with path.open("a") as file:
        file.write("torn")
    assert nanoengine("run", config, "--resume").exit_code == 0
    assert path.is_symlink()
    assert [json.loads(line)["index"] for line in (elsewhere / "rows.jsonl").read_text().splitlines()] == [2, 1, 0]


@pytest.mark.usefixtures("interrupted")
def test_a_last_row_without_its_line_break_runs_again(nanoengine: Run, config: str, rows: Rows, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert nanoengine("run", config, "--resume").exit_code == 0
    assert [row["index"] for row in rows()] == [2, 1, 0]


def test_nothing_left_to_do_loads_no_model(fake: Any, nanoengine: Run, config: str, tmp_path: Path) -> None:
    assert nanoengine("run", config).exit_code == 0
    path, made = tmp_path / "results.jsonl", len(fake.made)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"index": 0, "ha')
    result = nanoengine("run", config, "--resume")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (0, "nothing is left to do")
    assert path.read_bytes() == whole
    assert len(fake.made) == made


def test_more_prompts_than_before(fake: Any, nanoengine: Run, config: str, rows: Rows) -> None:
    assert nanoengine("run", config).exit_code == 0
    result = nanoengine("run", config, "--resume", "prompts=[one, 'another', and three words, four]")
    assert result.exit_code == 0, result.stderr
    assert sorted(row["index"] for row in rows()) == [0, 1, 2, 3]
    assert {row["index"]: row["prompt"] for row in rows()}[1] == "another"


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.seed=6", "engine.seed (5 there, 6 here)"),
        ("model=c/d", 'model.source ("a/b" there, "c/d" here)'),
        ("+sampler.top_p=0.5", "sampler (null there, not given here); sampler.top_p (not given there, 0.5 here)"),
        ("chat=false", "chat (true there, false here)"),
    ],
)
def test_another_configuration_is_refused(
    fake: Any, nanoengine: Run, config: str, tmp_path: Path, override: str, words: str
) -> None:
    before, made = (tmp_path / "results.jsonl").read_bytes(), len(fake.made)
    result = nanoengine("run", config, "--resume", override)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "leave out --resume to start again" in result.stderr
    assert ((tmp_path / "results.jsonl").read_bytes(), len(fake.made)) == (before, made)


@pytest.mark.usefixtures("interrupted")
def test_the_model_s_own_parameters_count(fake: Any, nanoengine: Run, config: str, tmp_path: Path) -> None:
    before = (tmp_path / "results.jsonl").read_bytes()
    fake.defaults = {"top_p": 0.5}
    result = nanoengine("run", config, "--resume")
    assert result.exit_code == 2
    assert "sampler.top_p (not given there, 0.5 here)" in result.stderr
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("prepare", "arguments", "words"),
    [
        ({}, ["output=null"], "--resume needs the results"),
        ({}, ["output=/dev/null"], "/dev/null is not a regular file"),
        ({"results.jsonl": "{}\n"}, [], "there is no results.jsonl.run.json next to results.jsonl"),
        ({"results.jsonl": "{}\n", "results.jsonl.run.json": "{"}, [], "results.jsonl.run.json cannot be read"),
        ({"results.jsonl": "{}\n", "results.jsonl.run.json": '{"format": 9}'}, [], "another version of nanoengine"),
        ({}, ["--multirun"], "--resume of a sweep needs the folder of the sweep"),
    ],
)
def test_what_cannot_be_resumed(
    fake: Any, nanoengine: Run, config: str, tmp_path: Path, prepare: dict[str, str], arguments: list[str], words: str
) -> None:
    for name, text in prepare.items():
        (tmp_path / name).write_text(text)
    result = nanoengine("run", config, "--resume", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not fake.made


@pytest.mark.parametrize("there", [True, False])
def test_resume_of_nothing_begins(
    fake: Any, nanoengine: Run, config: str, rows: Rows, tmp_path: Path, there: bool
) -> None:
    if there:
        (tmp_path / "results.jsonl").touch()
    assert nanoengine("run", config, "--resume").exit_code == 0
    assert len(rows()) == 3


def test_the_record_tells_how_the_rows_were_made(fake: Any, nanoengine: Run, config: str, tmp_path: Path) -> None:
    fake.defaults = {"top_p": 0.5, "seed": 3}
    assert nanoengine("run", config, "prompts=[one, refuse me]").exit_code == 1
    found = record(tmp_path)
    assert found["config"]["model"]["source"] == "a/b"
    assert (found["params"]["top_p"], found["params"]["seed"]) == (0.5, 3)
    assert fake.made[-1].text_engine.seeds == {"0": 3}  # given: it holds for all
    assert {"nanoengine", "python", "torch", "transformers", "numpy"} <= set(found["versions"])
    summary = found["summary"]
    counts = {key: summary[key] for key in ("status", "prompts", "kept", "finished", "failed", "generated_tokens")}
    assert counts == {"status": 1, "prompts": 2, "kept": 0, "finished": 2, "failed": 1, "generated_tokens": 2}
    assert summary["ttft"]["median"] == pytest.approx(1.0)
    assert summary["tokens_per_second"] == pytest.approx(2 / summary["seconds"])


def test_a_file_that_another_process_writes_is_left_alone(
    fake: Any, nanoengine: Run, config: str, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"index": 7}\n')
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        result = nanoengine("run", config)
    assert result.exit_code == 2
    assert "cannot write output results.jsonl: another process is writing it" in result.stderr
    assert path.read_text() == '{"index": 7}\n'


def test_a_file_that_may_grow_no_more_keeps_whole_rows(
    fake: Any, nanoengine: Run, config: str, rows: Rows, tmp_path: Path
) -> None:
    """The limit stands for a full disk: the system writes what fits, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    many = f"prompts=[{', '.join('word ' * n for n in range(1, 19))}]"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # the record fits
        result = nanoengine("run", config, many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1
    kept = rows()
    assert 0 < len(kept) < 18
    last = result.stderr.splitlines()[-1]
    assert last == f"error: cannot write output results.jsonl: File too large; rows kept there: {len(kept)}"
    result = nanoengine("run", config, many, "--resume")
    assert result.exit_code == 0, result.stderr
    assert sorted(row["index"] for row in rows()) == list(range(18))
    assert sum(len(made.text_engine.seeds) for made in fake.made[-1:]) == 18 - len(kept)


# -- as a process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path, config: str) -> Callable[..., subprocess.Popen[str]]:
    """A run of 40 prompts, one a step."""

    def start(*arguments: str, seconds: float) -> subprocess.Popen[str]:
        (tmp_path / "p.txt").write_text("".join(f"prompt {n}\n" for n in range(40)))
        return subprocess.Popen(
            [*FAKE, "run", config, "prompts=p.txt", *arguments],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "FAKE_SECONDS": str(seconds)},
        )  # fmt: skip

    return start


def wait_for_rows(path: Path, process: subprocess.Popen[str]) -> None:
    while not (path.exists() and path.stat().st_size) and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_killed_process_leaves_whole_rows_and_can_go_on(
    started: Any, rows: Rows, tmp_path: Path, number: int, status: int
) -> None:
    process = started(seconds=0.3)  # long enough for a signal to come before the last
    wait_for_rows(tmp_path / "results.jsonl", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    kept = len(rows())
    assert 0 < kept < 40
    if number == signal.SIGTERM:
        assert "terminated; finished results are kept" in errors
        assert f"{kept} of 40 prompts, " in errors
    process = started("--resume", seconds=0)
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, f"40 prompts, {kept} kept from an earlier run" in errors) == (0, True), errors
    assert sorted(row["index"] for row in rows()) == list(range(40))


def test_a_reader_that_goes_away_costs_no_results(started: Any, rows: Rows, tmp_path: Path) -> None:
    process = started(seconds=0.05)
    assert process.stdout.readline().startswith("[39]")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(200) == 0
    assert len(rows()) == 40
    assert "cannot write answers to standard output: Broken pipe; results.jsonl still gets them" in errors
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


# -- the real engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", with_tokenizer=True)


@pytest.mark.parametrize("mutant", [False, True])
def test_a_resumed_run_draws_what_a_whole_one_draws(
    nanoengine: Run, model: Path, tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch, mutant: bool
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\nsampler: {{temperature: 1.0, max_tokens: 12}}\nprompts: [a, b, c, d]\noutput: results.jsonl\n"
    )
    assert nanoengine("run", "run.yaml").exit_code == 0
    whole = {row["index"]: row["outputs"][0]["token_ids"] for row in rows()}
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(line for line in path.read_bytes().splitlines(True) if json.loads(line)["index"] < 2))
    if mutant:  # seeds by the order of arrival, as the engine gives them
        monkeypatch.setattr(Batch, "_params", lambda self, index: self.llm.default_params)
    assert nanoengine("run", "run.yaml", "--resume").exit_code == 0
    assert len(rows()) == 4
    again = {row["index"]: row["outputs"][0]["token_ids"] for row in rows()}
    assert (again == whole) is not mutant


@pytest.mark.usefixtures("fake")
def test_rows_of_prompts_that_are_asked_no_more_go_and_it_is_said(nanoengine: Run, config: str) -> None:
    assert nanoengine("run", config).exit_code == 0
    result = nanoengine("run", config, "--resume", "prompts=[one]")
    assert "1 of 1 prompts are answered and kept" in result.stderr
    assert "2 finished rows are dropped, because their prompts have changed" in result.stderr
