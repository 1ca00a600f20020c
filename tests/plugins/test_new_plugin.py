"""`nanoengine plugins new` and examples/nanoengine-plugin-demo: what is written installs, passes its tests and runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from plugin_environment import build_wheels, install, make_environment, run
from typer.testing import CliRunner, Result

from nanoengine.cli.app import app

ROOT = Path(__file__).parents[2]
DEMO = "nanoengine-plugin-demo"
KINDS = {"model": "my-gpt", "sampler": "less_again", "attention": "rows"}


def new(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["plugins", "new", *map(str, arguments)])


@dataclass(frozen=True)
class Site:
    """An environment with all four packages installed from wheels, and their sources."""

    python: Path
    sources: Path

    def nanoengine(self, *arguments: str, cwd: str = ".") -> subprocess.CompletedProcess[str]:
        return run(self.python, "-m", "nanoengine", *arguments, cwd=self.sources / cwd)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("new")
    for kind, name in KINDS.items():
        assert new(kind, name, "--into", root).exit_code == 0
    shutil.copytree(
        ROOT / "examples" / DEMO, root / DEMO, ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    )
    copies = shutil.copytree(root, tmp_path_factory.mktemp("build") / "new")
    wheels = build_wheels(sorted(copies.iterdir()), copies / "dist")
    python = make_environment(tmp_path_factory.mktemp("environment"))
    install(python, *wheels)
    return Site(python, root)


@pytest.mark.slow
def test_what_is_written_is_listed_with_every_part(site: Site) -> None:
    found = json.loads(site.nanoengine("plugins", "list", "--json").stdout)
    assert found["failures"] == []
    assert found["conflicts"] == []
    ours = [row for row in found["plugins"] if row["distribution"] != "nanoengine"]
    assert sorted((row["distribution"], row["kind"], row["name"]) for row in ours) == [
        ("nanoengine-less-again", "configs", "pkg://nanoengine_less_again.configs"),
        ("nanoengine-less-again", "sampler", "less_again"),
        ("nanoengine-my-gpt", "configs", "pkg://nanoengine_my_gpt.configs"),
        ("nanoengine-my-gpt", "model", "my-gpt"),
        (DEMO, "attention_backend", "row_by_row"),
        (DEMO, "configs", "pkg://nanoengine_plugin_demo.configs"),
        (DEMO, "model", "opt"),
        (DEMO, "model_source", "opt-tiny"),
        (DEMO, "sampler", "top_n_sigma"),
        ("nanoengine-rows", "attention_backend", "rows"),
        ("nanoengine-rows", "configs", "pkg://nanoengine_rows.configs"),
    ]


@pytest.mark.slow
def test_the_tests_that_come_with_it_pass(site: Site) -> None:
    folders = [site.sources / folder for folder in ("nanoengine-my-gpt", "nanoengine-less-again", "nanoengine-rows")]
    done = run(site.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *folders, cwd=site.sources)
    assert re.search(r"\b6 passed", done.stdout), done.stdout  # two each, none skipped


@pytest.mark.slow
def test_the_demo_package_passes_its_tests(site: Site) -> None:
    done = run(site.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=site.sources / DEMO)
    assert re.search(r"\b8 passed", done.stdout), done.stdout


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_the_demo_runs(site: Site, tmp_path: Path) -> None:
    cache = {"NANOENGINE_CACHE": str(tmp_path / "cache")}
    command = (site.python, "-m", "nanoengine", "run", "plugin-demo")
    done = run(*command, "sampler.max_tokens=4", cwd=tmp_path, env=cache)
    assert "writing opt-tiny to" in done.stderr
    assert [(row["prompt"], row["error"]) for row in rows(tmp_path)] == [("The sea", None), ("A boat", None)]
    record = json.loads((tmp_path / "results.jsonl.run.json").read_text())
    assert record["config"]["attention"]["backend"] == "row_by_row"
    assert record["config"]["sampler"] == {"temperature": 1.5, "top_n_sigma": 1.0, "max_tokens": 4}


# One process for the three: most of what it takes is importing torch.
RUN_ALL = """
import os, sys
from nanoengine.cli.app import app
for folder, *arguments in [
    ["nanoengine-my-gpt", "run", "run.yaml"],
    ["nanoengine-less-again", "run", "run.yaml", "model=../nanoengine-my-gpt/tiny"],
    ["nanoengine-rows", "run", "run.yaml", "model=../nanoengine-my-gpt/tiny", "engine.device=cpu"],
]:
    os.chdir(os.path.join(sys.argv[1], folder))
    if app(arguments, standalone_mode=False):
        sys.exit(f"{folder}: {arguments} failed")
"""


@pytest.mark.slow
def test_their_configurations_run(site: Site) -> None:
    run(site.python, "-m", "nanoengine_my_gpt.tiny", "tiny", cwd=site.sources / "nanoengine-my-gpt")
    run(site.python, "-c", RUN_ALL, site.sources, cwd=site.sources)
    for name in ("my-gpt", "less-again", "rows"):
        folder = site.sources / f"nanoengine-{name}"
        [row] = rows(folder)
        assert row["error"] is None
        assert row["outputs"]
    record = json.loads((site.sources / "nanoengine-less-again/results.jsonl.run.json").read_text())
    assert record["config"]["sampler"]["less_again"] == 1.0


def test_what_is_written_is_clean(tmp_path: Path) -> None:
    for kind, name in KINDS.items():
        result = new(kind, name, "--into", tmp_path)
        assert "pytest" in result.stdout
        assert f"nanoengine-{name.replace('_', '-')}" in result.stdout
    for folder in tmp_path.iterdir():
        options = ["--select", "E,F,W,I,B,UP,SIM,RUF,C4,N", "--ignore", "N812", "--line-length", "120", "--no-cache"]
        run(sys.executable, "-m", "ruff", "check", *options, ".", cwd=folder)
        run(sys.executable, "-m", "ruff", "format", "--check", "--line-length", "120", "--no-cache", ".", cwd=folder)
        assert (folder / ".gitignore").is_file()
        project = tomllib.loads((folder / "pyproject.toml").read_text())
        assert project["project"]["name"] == folder.name
        assert "{{" not in "".join(file.read_text() for file in folder.rglob("*") if file.is_file())
        named = re.findall(r"^\| `([\w./-]+)` \|", (folder / "README.md").read_text(), re.MULTILINE)
        assert len(named) > 2
        assert [name for name in named if not (folder / name).is_file()] == []


def test_the_long_name_is_the_short_one(tmp_path: Path) -> None:
    assert new("sampler", "nanoengine-soft-cap", "--into", tmp_path).exit_code == 0
    assert (tmp_path / "nanoengine-soft-cap/nanoengine_soft_cap/params.py").read_text().count("soft_cap: float") == 1
    again = new("sampler", "soft-cap", "--into", tmp_path)
    assert again.exit_code == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("sampler", "SoftCap", "for example 'soft-cap'"),
        ("sampler", "9lives", "beginning with a letter; for example 'lives'"),
        ("sampler", "soft--cap", "for example 'soft-cap'"),
        ("sampler", "../escape", "for example 'escape'"),
        ("sampler", "…", "for example 'soft-cap'"),
        ("sampler", "class", "'class' is a keyword of Python"),
        ("sampler", "seed", "a field of SamplingParams already"),
        ("sampler", "presence-penalty", "a parameter of nanoengine"),
        ("sampler", "penalties", "a sampler stage of nanoengine"),
        ("sampler", "stage", "a class StageParams, as nanoengine.api has one"),
        ("model", "llama", "registered by nanoengine"),
        ("model", "model", "a class ModelConfig"),
        ("attention", "triton", "registered by nanoengine"),
        ("attention", "auto", "already"),
        ("tokenizer", "mine", "is not one of 'model', 'sampler', 'attention'"),
    ],
)
def test_a_name_that_will_not_do_is_refused_with_one_that_might(
    kind: str, name: str, words: str, tmp_path: Path
) -> None:
    result = new(kind, name, "--into", tmp_path)
    assert result.exit_code == 2
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = new("model", "mine", "--into", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot write" in result.stderr


def test_the_templates_are_packaged() -> None:
    """In the wheel, not only in the source tree."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["nanoengine"]
    package = ROOT / "nanoengine"
    packaged = {file for pattern in patterns for file in package.glob(pattern)}
    templates = {file for file in (package / "cli/plugin_templates").rglob("*") if file.is_file()}
    assert len(templates) > 15
    assert templates <= packaged
