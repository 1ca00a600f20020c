"""docs/embeddings.md: its code runs and prints what it shows, its tables are fields of requests, its files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanoengine.params.pooling import PoolingChoice
from nanoengine.server.protocol.pooling import PAIRS, EmbeddingRequest, PoolingRequest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "embeddings.md").read_text("utf-8")
NUMBER = re.compile(r"-?\d+\.\d+")


def run() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/embeddings.md", "exec"), {"__name__": "page"})


def test_code_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("nanoengine.llm.find_model", lambda *arguments: tiny)
    run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in lines] == ["length"] * 3 + ["score"] * 2


@pytest.mark.slow
def test_output_is_what_the_page_shows(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanoengine.llm.find_model", lambda *arguments: smollm2_path)
    run()
    (shown,) = re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    printed = capsys.readouterr().out
    assert NUMBER.sub("", printed) == NUMBER.sub("", shown)
    found, want = ([float(n) for n in NUMBER.findall(text)] for text in (printed, shown))
    assert found == pytest.approx(want, abs=0.02)


def test_the_fields_are_those_of_the_requests() -> None:
    own = {"prompt_token_ids", "max_model_len"}
    named = set(re.findall(r"`(\w+)`", PAGE.split("## The endpoints")[1])) - own
    pairs = {name for pair in PAIRS for name in pair}
    answer = {"usage", "prompt_tokens", "total_tokens", "cached_tokens"}
    assert named == {*EmbeddingRequest.model_fields} | pairs | answer
    assert {*PoolingRequest.model_fields} <= {*EmbeddingRequest.model_fields}
    assert set(PoolingChoice.__slots__) <= {*EmbeddingRequest.model_fields}


def test_files_and_links() -> None:
    files = re.findall(r"`(nanoengine/[\w/.]+\.\w+)`", PAGE)
    assert files
    assert [file for file in files if not (ROOT / file).is_file()] == []
