"""The pages of docs/ for learners: commands and code run, links and files are there, pictures are whole."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import parse

import pytest
from typer.testing import CliRunner

from nanoengine.cli.app import app

ROOT = Path(__file__).parents[2]
ORDER = ("request", "blocks", "scheduler", "step", "attention", "sampling", "graphs", "tensor-parallelism")
TEXTS = {name: (ROOT / f"docs/{name}.md").read_text("utf-8") for name in (*ORDER, "README")}
GPUS = ("nanoengine run examples/tensor-parallel.yaml",)  # as it stands; the line after it says device=cpu
LOOSE = {"sampling": 0.3}  # log-probs of weights in four bits: with inputs in eight bits, or in float32
NUMBER = re.compile(r"-?\d+\.\d+")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL)


def execute(page: str) -> None:
    for code in blocks(page, "python"):
        exec(compile(code, f"docs/{page}.md", "exec"), {"__name__": "page"})


@pytest.fixture
def folder(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with examples/, where every model is the tiny one."""
    for home in ("llm", "build"):  # an engine's, and the doctor's
        monkeypatch.setattr(f"nanoengine.{home}.find_model", lambda *arguments: tiny)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ORDER)
def test_code_runs(page: str, folder: Path) -> None:
    execute(page)


@pytest.mark.parametrize("page", ORDER)
def test_commands_run(page: str, folder: Path) -> None:
    lines = "".join(blocks(page, "sh")).splitlines()
    assert lines or blocks(page, "python"), "nothing to try"
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "python":  # run by test_examples.py
            assert [(ROOT / argument).is_file() for argument in arguments] == [True]
        elif line not in GPUS:
            result = CliRunner().invoke(app, arguments)
            assert program == "nanoengine"
            assert result.exit_code == 0, f"{line}: {result.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in ORDER if blocks(page, "text")])
def test_output_is_what_the_page_shows(
    page: str, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanoengine.llm.find_model", lambda *arguments: smollm2_path)
    execute(page)
    printed = [_split(line) for line in capsys.readouterr().out.splitlines()]
    shown = [_split(line) for line in "".join(blocks(page, "text")).splitlines() if line != "…"]
    for words, numbers in shown:
        assert any(words == w and numbers == pytest.approx(n, abs=LOOSE.get(page, 0.02)) for w, n in printed), (
            words,
            printed,
        )


def _split(line: str) -> tuple[list[str], list[float]]:
    """A line's words, and its decimal fractions, in an order that is the same where two tokens change places: kernels
    may round the inputs of products otherwise."""
    return sorted(NUMBER.sub("#", line).split()), sorted(float(number) for number in NUMBER.findall(line))


def test_table_of_memory_and_communication(capsys: pytest.CaptureFixture[str]) -> None:
    execute("tensor-parallelism")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    assert [row for row in rows if row not in TEXTS["tensor-parallelism"].splitlines()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXTS[page])
    files = re.findall(r"`(nanoengine/[\w/.]+\.\w+)`", TEXTS[page])
    assert links
    assert [link for link in links if not link.startswith("https:") and not (ROOT / "docs" / link).exists()] == []
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_every_page_is_listed() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    listed = re.findall(r"\]\((\w[\w-]*\.md)\)", TEXTS["README"])
    assert sorted(listed) == sorted(pages)


def test_order_of_reading() -> None:
    assert re.findall(r"\| \d \| \[.*?\]\((.*?)\.md\)", TEXTS["README"]) == list(ORDER)
    for page, after in pairwise(ORDER):
        assert f"]({after}.md)" in TEXTS[page].splitlines()[-1]


@pytest.mark.parametrize("page", ORDER)
def test_picture(page: str) -> None:
    """One a page, well-formed, titled, and with a background of its own, for dark pages."""
    assert f"](pictures/{page}.svg)" in TEXTS[page]
    root = parse(ROOT / f"docs/pictures/{page}.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{svg}title")
    first: Any = root.find(f"{svg}rect")
    assert first.get("fill") == "#ffffff"
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    for text in root.iter(f"{svg}text"):
        assert 0 < float(text.get("x") or -1) < width
        assert 0 < float(text.get("y") or -1) < height
