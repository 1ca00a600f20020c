"""The command line as a process: status, streams, what it imports, and how a signal ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanoengine.testing.checkpoints import tiny_llama

CLI = [sys.executable, "-m", "nanoengine"]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, cwd=cwd, check=False, timeout=120)


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, "nanoengine 0.1.0\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["plugins", "list"],
        ["config", "show", "quickstart"],
        ["run", "quickstart", "x.y=1"],
    ],
)
def test_no_torch_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from nanoengine.cli import main\n"
        f"sys.argv = ['nanoengine', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'triton', 'gguf'}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "[]"


def test_mistake() -> None:
    result = run("run", "quickstart", "engine.max_num_seqs=many")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "error: override 'engine.max_num_seqs=many': engine.max_num_seqs must be an integer, not 'many'\n"
    )


@pytest.mark.parametrize("closed", ["1", "2"])
def test_who_closes_what_it_would_say_gets_the_results(tmp_path: Path, closed: str) -> None:
    """As a shell does with `2>&-`. Else the first file that is opened would get what is said, too."""
    (tmp_path / "run.yaml").write_text("model: tiny\nchat: false\nprompts: [hi]\nsampler: {max_tokens: 2}\n")
    tiny_llama(tmp_path / "tiny", with_tokenizer=True)
    shell = ["sh", "-c", f'exec "$@" {closed}>&-', "sh"]
    done = subprocess.run([*shell, *CLI, "run", "run.yaml", "output=rows.jsonl"], cwd=tmp_path, timeout=120)
    assert done.returncode == 0
    [row] = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(json.loads(row)["outputs"][0]["token_ids"]) == 2


def test_output_into_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*CLI, "config", "show", "quickstart"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=120)


FAKE = [sys.executable, str(Path(__file__).parent / "fake_process.py")]


@pytest.mark.parametrize(
    ("redirect", "output", "status", "words"),
    [
        (
            "| head -1",
            "results.jsonl",
            0,
            "cannot write answers to standard output: Broken pipe; results.jsonl still gets them",
        ),
        (
            ">/dev/full",
            "results.jsonl",
            1,
            "cannot write answers to standard output: No space left on device; results.jsonl",
        ),
        ("| head -1", "null", 1, "error: cannot write answers to standard output: Broken pipe"),
        (">&-", "results.jsonl", 0, "6 prompts, "),
        ("2>/dev/full", "results.jsonl", 0, ""),
        ("2>&- >&- <&-", "results.jsonl", 0, ""),
        ("<&-", "results.jsonl", 0, "6 prompts, "),
    ],
)
def test_answers_or_words_that_cannot_be_written_lose_no_results(
    tmp_path: Path, redirect: str, output: str, status: int, words: str
) -> None:
    """`head` ends after the first line, which is awaited: each fake step takes a while."""
    (tmp_path / "run.yaml").write_text("model: a/b\nprompts: [a, b, c, d, e, f]\n")
    run, _, pipe = redirect.partition("|")
    command = f'"$@" {run}; echo $? >status'
    shell = ["bash", "-c", f"({command}) | {pipe} >first" if pipe else command, "sh"]
    done = subprocess.run(
        [*shell, *FAKE, "run", "run.yaml", f"output={output}"],
        cwd=tmp_path,
        env={**os.environ, "FAKE_SECONDS": "0.1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert int((tmp_path / "status").read_text()) == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if output != "null":
        rows = [json.loads(line) for line in (tmp_path / output).read_text().splitlines()]
        assert sorted(row["index"] for row in rows) == list(range(6))


@pytest.mark.parametrize("arguments", [["run", "quickstart", "x.y=1"], ["config", "show", "none.yaml"]])
def test_a_mistake_that_cannot_be_said_keeps_its_status(tmp_path: Path, arguments: list[str]) -> None:
    done = subprocess.run(["sh", "-c", '"$@" 2>/dev/full', "sh", *CLI, *arguments], cwd=tmp_path, timeout=120)
    assert done.returncode == 2


@pytest.mark.parametrize("arguments", [["config", "show", "quickstart"], ["config", "list"], ["plugins", "list"]])
def test_output_onto_a_full_disk_is_one_line_and_1(arguments: list[str]) -> None:
    done = subprocess.run(["sh", "-c", '"$@" >/dev/full', "sh", *CLI, *arguments], stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 1
    assert done.stderr.decode() == "error: cannot write to standard output: No space left on device\n"
