"""docs/speculation.md: its code and commands run, its tables are the options, its drafter is one."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanoengine.api import HostDrafter
from nanoengine.build_engine import DEFAULT_STEP_TOKENS
from nanoengine.cli.app import app
from nanoengine.params.speculation import MAX_DRAFTS, Acceptance, SpeculationOptions
from nanoengine.plugins.drafters.params import NgramParams, SuffixParams
from nanoengine.setup.config.composer.yaml_file import read_yaml
from nanoengine.setup.plugins.discover import discover, load_checked
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.testing.conformance import check_drafter

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "speculation.md").read_text("utf-8")
FILES = dict(re.findall(r"^```python\n# file: (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the page's files, where every model is the tiny one."""
    monkeypatch.setattr("nanoengine.llm.find_model", lambda *arguments: tiny)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_code_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(from nanoengine import .*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/speculation.md", "exec"), {"__name__": "page"})
    assert re.search(r"^\d+ of \d+ drafts accepted; by position \[", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("line", re.findall(r"^nanoengine (.*)$", PAGE, re.MULTILINE))
def test_commands_run(folder: Path, line: str) -> None:
    result = CliRunner().invoke(app, [*shlex.split(line), "sampler.max_tokens=6"])
    assert result.exit_code == 0, result.stderr


def test_yaml_is_an_option(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "x.yaml").write_text(text)
    assert read_yaml(tmp_path / "x.yaml", "x").data == {"speculation": {"method": "ngram", "tokens": 4}}


@pytest.mark.parametrize(
    ("heading", "options"),
    [("The keys of", SpeculationOptions), ("`ngram`:", NgramParams), ("`suffix`:", SuffixParams)],
)
def test_tables_have_every_key_and_default(heading: str, options: Any) -> None:
    table = PAGE[PAGE.index(f"\n{heading}") :].split("\n\n")[1]
    rows = {key: default.strip(" `") for key, default in re.findall(r"^\| `(\w+)` \|(.*?)\|", table, re.MULTILINE)}
    fields = {f.name: "" if f.default is dataclasses.MISSING else repr(f.default) for f in dataclasses.fields(options)}
    assert rows == fields


def test_numbers_in_the_text() -> None:
    assert "Default: {cpu} on a CPU, {cuda} on a GPU.".format(**DEFAULT_STEP_TOKENS) in PAGE
    assert f"at most {MAX_DRAFTS}." in PAGE
    assert f"after {Acceptance.FIRST_WAIT} tokens" in PAGE
    assert f"{2 * Acceptance.FIRST_WAIT}, and so on to {Acceptance.LONGEST_WAIT}" in PAGE


def test_its_drafter_conforms(tmp_path: Path) -> None:
    ((name, text),) = FILES.items()
    (tmp_path / name).write_text(text)
    registry = discover([tmp_path / name])
    spec = registry.drafters[name.removesuffix(".py")].spec
    load_checked(TargetLoader(registry.plugin_files), spec.target, HostDrafter)
    check_drafter(spec)


def test_links_and_files() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE)
    files = re.findall(r"`(nanoengine/[\w/.]+\.\w+)`", PAGE)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    assert files
    assert [file for file in files if not (ROOT / file).is_file()] == []
