"""`nanoengine run --trace`: the real command on a tiny model, in a pool too small for all, and killed."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from nanoengine.cli.trace_option import with_trace_file
from nanoengine.observe.trace import TraceFile
from nanoengine.testing.checkpoints import tiny_llama
from tests.engine.timeline import check, read

pytestmark = pytest.mark.usefixtures("forked")

Run = Callable[..., Result]

SHARED = "a long beginning that several prompts have in common, "
CONFIG = f"""\
model: ./tiny
sampler: {{temperature: 0, max_tokens: 24, ignore_eos: true}}
engine: {{block_size: 16, num_gpu_blocks_override: 20, max_num_seqs: 4, max_num_batched_tokens: 64}}
chat: false
prompts: [{", ".join(f"'{SHARED}{word}'" for word in ("one", "two", "three", "four", "five", "six"))}]
output: results.jsonl
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", with_tokenizer=True)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> str:
    (tmp_path / "tiny").symlink_to(model)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return "run.yaml"


def test_chunks_sharing_and_preemption_are_on_the_timeline(nanoengine: Run, config: str, tmp_path: Path) -> None:
    arguments = ("run", config, "engine.num_gpu_blocks_override=9", "engine.max_num_batched_tokens=40")
    result = nanoengine(*arguments, "--trace", "out.json")
    assert result.exit_code == 0, result.stderr
    found = read(tmp_path / "out.json")
    assert found.about["model"] == "./tiny"
    assert {"nanoengine", "torch", "python"} <= found.about["versions"].keys()
    stays = found.requests()
    assert stays.keys() == {f"{i}/0" for i in range(6)}
    assert all(each[-1].args["ended"] == "length" for each in stays.values())
    assert any(stay.args["ended"] == "preempted" and "KV blocks" in stay.args["why"]
               for each in stays.values() for stay in each)  # fmt: skip
    assert sum(len(each) > 1 for each in stays.values()) >= 1
    assert stays["1/0"][0].args["cached"] == 48  # the whole blocks of the common beginning
    assert max(values["shared"] for values in found.counters["KV blocks"]) >= 3
    assert found.steps[0].args["chunked"] == ["0/0"]
    assert found.steps[0].args["blocks"]["total"] == 9
    record = json.loads((tmp_path / "results.jsonl.run.json").read_text())
    assert record["summary"]["trace"] == str(tmp_path / "out.json")
    assert sum(step.args["new_tokens"] for step in found.steps) == record["summary"]["generated_tokens"] == 144


def test_the_answers_are_those_of_a_run_without(
    nanoengine: Run, config: str, rows: Callable[[], list[Any]], tmp_path: Path
) -> None:
    """`--trace` alone takes no override for its file."""
    assert nanoengine("run", config, "--trace", "engine.max_num_seqs=2").exit_code == 0
    found = read(tmp_path / "trace.json").counters["rows"]
    assert max(each["decode"] + each["prefill"] for each in found) == 2
    with_trace = {row["index"]: row["outputs"] for row in rows()}
    assert nanoengine("run", config).exit_code == 0
    assert {row["index"]: row["outputs"] for row in rows()} == with_trace


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("cfg.yaml --trace", True),
        ("cfg.yaml --trace engine.seed=1", True),
        ("cfg.yaml --trace +engine.seed=1", True),
        ("cfg.yaml --trace ~output", True),
        ("--trace -m cfg.yaml", True),
        ("--trace -- cfg.yaml", True),
        ("cfg.yaml --trace out.json", False),
        ("cfg.yaml --trace ~/out.json engine.seed=1", False),
        ("cfg.yaml --trace -", False),
        ("cfg.yaml --trace=out.json a=b", False),
        ("-- cfg.yaml --trace", False),
    ],
)
def test_only_a_word_that_is_nothing_else_is_the_file(words: str, file: bool) -> None:
    given = words.split()
    want = ["--trace=trace.json" if file and word == "--trace" else word for word in given]
    assert with_trace_file(given) == want


def test_a_configuration_that_was_taken_for_the_file_is_reported(nanoengine: Run, config: str) -> None:
    result = nanoengine("run", "--trace", config)
    assert result.exit_code == 2
    assert "The word behind --trace is its file" in result.stderr


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("run.yaml", "--trace run.yaml is the configuration file, which it would overwrite"),
        ("results.jsonl", "--trace results.jsonl is the output, which it would overwrite"),
        ("run.yaml/out.json", "cannot write trace run.yaml/out.json: {root}/run.yaml is not a folder"),
        (".", "cannot write trace .: . is not a file"),
        ("mine.json", "--trace mine.json exists and is not a trace; give another file, or delete it"),
    ],
)
def test_a_trace_that_cannot_be_written_is_refused_first(
    nanoengine: Run, config: str, tmp_path: Path, path: str, message: str
) -> None:
    (tmp_path / "mine.json").write_text("[1, 2]\n")
    result = nanoengine("run", config, "--trace", path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message.format(root=tmp_path)}")
    assert "loading" not in result.stderr


def test_a_trace_in_a_new_folder(nanoengine: Run, config: str, tmp_path: Path) -> None:
    """As `output` may be in one."""
    for _ in range(2):  # the second takes the first one's place
        assert nanoengine("run", config, "--trace", "new/er/out.json").exit_code == 0
        assert read(tmp_path / "new/er/out.json").steps


def test_a_trace_without_room_costs_no_results(
    nanoengine: Run, config: str, rows: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = TraceFile._write

    def full(self: TraceFile, *arguments: Any) -> None:
        self.failure = self.failure or OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        TraceFile, "_write", lambda self, before, *rest: (write if before else full)(self, before, *rest)
    )
    result = nanoengine("run", config, "--trace", "out.json")
    assert result.exit_code == 1
    assert len(rows()) == 6
    message = (
        "error: cannot write trace out.json: No space left on device; it is incomplete, but the results are complete"
    )
    assert result.stderr.splitlines()[-1] == message


def test_a_killed_run_leaves_a_timeline(config: str, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("a prompt\n" * 1000)  # it does not end before it is killed
    process = subprocess.Popen(
        [sys.executable, "-m", "nanoengine", "run", config, "prompts=many.txt", "sampler.max_tokens=180",
         "engine.max_num_seqs=1", "--trace", "out.json"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    trace = tmp_path / "out.json"
    until = time.monotonic() + 150
    while process.poll() is None and time.monotonic() < until and not (trace.exists() and trace.stat().st_size > 9000):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1].decode()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = trace.read_text("utf-8").split("\n")
    whole = [line.rstrip(",") for line in lines[1:] if line.endswith(",")]  # the format's closing bracket is optional
    found = check([json.loads(line) for line in whole], cut=True)
    assert found.steps


def test_a_sweep_takes_a_name_for_each_folder(nanoengine: Run, config: str) -> None:
    result = nanoengine("run", config, "--multirun", "engine.max_num_seqs=1,4", "--trace", "a/out.json")
    assert result.exit_code == 2
    assert "for a sweep, give a file name such as out.json" in result.stderr
