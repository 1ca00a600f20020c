"""docs/async.md: its code runs, the files of its table exist, its names are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanoengine.service.client import EngineClient

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "async.md").read_text("utf-8")


def test_code_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("nanoengine.llm.find_model", lambda *arguments: tiny)
    coroutines, threads = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(coroutines, "docs/async.md", "exec"), {"__name__": "page"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(("'", '"'))
    assert any(line.startswith("Red, green, (") for line in lines)
    assert lines[-1].startswith("ServiceStats(")
    exec(compile(threads, "docs/async.md", "exec"), {"__name__": "page"})
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_the_files_of_the_table_are_there() -> None:
    listed = re.findall(r"^\| `(nanoengine/\S+\.py)` \|", PAGE, re.MULTILINE)
    assert len(listed) > 10
    assert [name for name in listed if not (ROOT / name).is_file()] == []


def test_the_methods_are_those_of_the_protocol() -> None:
    (named,) = re.findall(r"iterate over its deltas, (.*?)\. Text", PAGE, re.DOTALL)
    methods = {name for name in vars(EngineClient) if not name.startswith("_")} - {"info", "health", "add", "close"}
    assert set(re.findall(r"`(\w+)`", named)) == methods
