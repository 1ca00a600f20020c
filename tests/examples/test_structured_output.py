"""docs/structured-output.md: its code runs, its configuration is right, and its table of options is complete."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nanoengine import StructuredOutputsParams
from nanoengine.api.structured_outputs import KINDS
from nanoengine.cli.app import app
from nanoengine.params.engine_options import StructuredOutputsOptions
from nanoengine.setup.config.config import load_config

PAGE = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def tiny_everywhere(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in ("llm", "build"):
        monkeypatch.setattr(f"nanoengine.{home}.find_model", lambda *arguments: tiny)
    monkeypatch.chdir(tmp_path)


def test_code_runs(tiny_everywhere: None) -> None:
    page: dict[str, object] = {"__name__": "page"}
    for code in blocks("python"):
        exec(compile(code, "docs/structured-output.md", "exec"), page)


def test_the_configuration_has_every_option_with_its_default(tiny_everywhere: None, tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    path = tmp_path / "structured.yaml"
    path.write_text(text)
    config = load_config(path)
    assert config.engine.structured_outputs == StructuredOutputsOptions()
    assert all(f"{field.name}: " in text for field in dataclasses.fields(StructuredOutputsOptions))


def test_the_tables_name_every_field() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    fields = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    assert [name for name in rows if name in fields] == sorted(fields, key=rows.index)
    assert set(KINDS) < set(rows)


def test_the_recipe_runs(tiny_everywhere: None, tmp_path: Path) -> None:
    """Some prompts of a model with random weights end by length; what ended by stop is valid."""
    result = CliRunner().invoke(app, ["run", "structured", "output=answers.jsonl", "sampler.max_tokens=120"])
    assert result.exit_code == 0, result.stderr
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    for answer in answers:
        for output in answer.get("outputs", [answer]):
            assert output["text"].startswith("{")
            if output["finish_reason"] == "stop":
                assert isinstance(json.loads(output["text"])["sure"], bool)
