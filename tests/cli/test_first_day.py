"""What a new user types and gets wrong: messages that say what to write, before a model is loaded."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from nanoengine.api import ModelSourceError, SourceContext
from nanoengine.api.outputs import RequestOutput
from nanoengine.cli import plugins
from nanoengine.cli.tally import Tally
from nanoengine.plugins.model_sources import hub
from nanoengine.plugins.model_sources.hub_repository import HubRepository

Run = Callable[..., Result]
ROOT = Path(__file__).parents[2]
CONFIG = "model: a/b\nprompts: [hi]\noutput: results.jsonl\n"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("output=/proc/x.jsonl", "cannot write output /proc/x.jsonl: No such file or directory"),
        ("output=o.csv", "output o.csv: results are JSON lines; give a name such as o.jsonl"),
        (
            "prompts=bad.jsonl",
            "no key 'prompt', nor 'messages'; Valid: text; to take another one: 'prompts={file: bad",
        ),
        ("prompts=bad.csv", "no column 'prompt'; separate the columns by commas, not by ';'"),
        ("prompts=other.csv", "Valid: question; to take another one: 'prompts={file: other.csv, field: question}'"),
        ("prompts=p.json", "prompts: p.json: a list in JSON is not read, but one object a line is: name it .jsonl"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_fix(
    fake: Any, nanoengine: Run, tmp_path: Path, override: str, words: str
) -> None:
    for name, text in {
        "run.yaml": CONFIG, "bad.jsonl": '{"text": "hi"}\n', "bad.csv": "prompt;b\nhi;2\n",
        "other.csv": "question\nhi\n", "p.json": "[]",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    result = nanoengine("run", "run.yaml", override)
    assert (result.exit_code, fake.made) == (2, [])
    assert words in result.stderr
    assert "PosixPath" not in result.stderr


def test_a_mistyped_gguf_file_is_first_said_not_to_be_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(self: HubRepository, file: str) -> Path:
        raise ModelSourceError("the hub could not be reached")

    monkeypatch.setattr(HubRepository, "file", unreachable)
    context = SourceContext(tmp_path)
    with pytest.raises(ModelSourceError, match=r"^there is no file path/to/x\.gguf here, and as a file of"):
        hub.HubSource().resolve("path/to/x.gguf", context)


def test_doctor_of_a_mistyped_name_is_status_2_at_once(nanoengine: Run) -> None:
    result = nanoengine("plugins", "doctor", "nothing")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no file, recipe or model is called 'nothing'" in result.stderr


def test_a_bench_on_a_cpu_asks_before_hours(nanoengine: Run) -> None:
    for command in ("throughput", "startup"):
        result = nanoengine("bench", command, "device=cpu")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "try the command with --shape tiny, or begin with --yes" in result.stderr


def test_a_narrow_terminal_gets_a_table_of_plugins_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.setup.plugins.discover import discover

    registry = discover()
    assert "architectures" in plugins.as_text(registry)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((100, 30)))
    narrow = plugins.as_text(registry)
    assert "builtin" not in narrow
    assert "smollm2" in narrow
    assert max(map(len, narrow.splitlines())) <= 100


def test_the_first_token_is_reported_only_if_asked(fake: Any, nanoengine: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert "first token" not in nanoengine("run", "run.yaml").stderr
    verbose = nanoengine("run", "run.yaml", "--verbose").stderr
    assert re.search(
        r"^first token \d+\.\d s after the process started, 0\.50 s after its prompt began$", verbose, re.M
    )


@pytest.mark.parametrize(("given", "is_said"), [([], True), (["sampler.max_tokens=2"], False)])
def test_an_answer_that_the_default_of_max_tokens_cut_is_reported(
    fake: Any, nanoengine: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[str], is_said: bool
) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    add = Tally.add

    def cut(self: Tally, output: RequestOutput) -> None:  # the fake engine answers with two tokens and "stop"
        add(self, replace(output, outputs=[replace(each, finish_reason="length") for each in output.outputs]))

    monkeypatch.setattr(Tally, "add", cut)
    monkeypatch.setattr(fake, "defaults", {"max_tokens": 2})
    words = "1 answer was cut at the default of 2 tokens: sampler.max_tokens=N allows more\n"
    assert (words in nanoengine("run", "run.yaml", *given).stderr) is is_said
    monkeypatch.setattr(Tally, "add", add)
    assert words not in nanoengine("run", "run.yaml", "output=other.jsonl").stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_shows_pip_s_progress_in_a_terminal_only(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "pip gets: $*"\n')
    python.chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"]
    command += [str(tmp_path / "venv" / ".demo-ready")]
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert "pip gets: -m pip --disable-pip-version-check install --quiet -c" in piped.stdout
    (tmp_path / "venv" / ".demo-ready").unlink()
    terminal, other = pty.openpty()
    try:
        seen = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=other, text=True, check=True, timeout=60
        )
    finally:
        os.close(terminal)
        os.close(other)
    assert "pip gets: -m pip --disable-pip-version-check install -c" in seen.stdout
