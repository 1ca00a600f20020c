"""`nanoengine run … speculation=ngram`: the answers of the plain run; drafts in its last line, trace and report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from nanoengine.testing.checkpoints import tiny_llama
from tests.engine.timeline import read

Run = Callable[..., Result]

CONFIG = """\
model: ./tiny
sampler: {temperature: 0, max_tokens: 60, ignore_eos: true, allowed_token_ids: [70, 71, 72]}
engine: {dtype: float32}
chat: false
prompts: [one, two, three]
output: results.jsonl
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", with_tokenizer=True)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "tiny").symlink_to(model)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def answers(folder: Path) -> list[list[int]]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [row["outputs"][0]["token_ids"] for row in sorted(rows, key=lambda row: row["index"])]


def test_a_run_with_drafts_is_reported(nanoengine: Run, folder: Path) -> None:
    plain = nanoengine("run", "run.yaml")
    assert plain.exit_code == 0, plain.stderr
    assert "drafts" not in plain.stderr
    want = answers(folder)
    (folder / "results.jsonl").unlink()
    (folder / "results.jsonl.run.json").unlink()
    result = nanoengine("run", "run.yaml", "speculation=ngram", "speculation.tokens=3", "--trace", "trace.json")
    assert result.exit_code == 0, result.stderr
    assert answers(folder) == want
    summary = json.loads((folder / "results.jsonl.run.json").read_text())["summary"]
    drafted, accepted = summary["drafted_per_position"], summary["accepted_per_position"]
    assert len(drafted) == len(accepted) == 3
    assert 0 < sum(accepted) < sum(drafted)
    assert f"{sum(accepted)} of {sum(drafted)} drafts accepted" in result.stderr
    steps = [step.args["drafts"] for step in read(folder / "trace.json").steps]
    for name, counts in (("drafted", drafted), ("accepted", accepted)):
        assert [sum(step[name][i] for step in steps if i < len(step[name])) for i in range(3)] == counts
    assert '"name":"drafts"' in (folder / "trace.json").read_text()  # a counter's track
    report = nanoengine("report", "results.jsonl")
    assert report.exit_code == 0, report.stderr
    (written,) = folder.glob("*.html")
    page = written.read_text("utf-8")
    assert "accepted drafts" in page
    assert f"{sum(accepted)} of {sum(drafted)}" in page
    assert f"{accepted[2] / drafted[2]:.1%}" in page
