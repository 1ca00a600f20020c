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
from empty_cache import empty_cache
from plugin_environment import build_wheels, install, make_environment, run
from typer.testing import CliRunner, Result

from nanoengine.cli.app import app

ROOT = Path(__file__).parents[2]
DEMO = "nanoengine-plugin-demo"
KINDS = {
    "model": "my-gpt",
    "sampler": "less_again",
    "attention": "rows",
    "command": "probable",
    "tool-parser": "my-calls",
    "policy": "short-first",
    "drafter": "as_before",
    "grammar": "choices",
}


def new(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["plugins", "new", *map(str, arguments)])


@dataclass(frozen=True)
class Site:
    """An environment with a package of each kind and the demo installed from wheels, and their sources."""

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
        ("nanoengine-as-before", "drafter", "as_before"),
        ("nanoengine-choices", "grammar", "choices"),
        ("nanoengine-less-again", "configs", "pkg://nanoengine_less_again.configs"),
        ("nanoengine-less-again", "sampler", "less_again"),
        ("nanoengine-my-calls", "tool_parser", "my-calls"),
        ("nanoengine-my-gpt", "configs", "pkg://nanoengine_my_gpt.configs"),
        ("nanoengine-my-gpt", "model", "my-gpt"),
        (DEMO, "attention_backend", "row_by_row"),
        (DEMO, "command", "write-opt"),
        (DEMO, "configs", "pkg://nanoengine_plugin_demo.configs"),
        (DEMO, "model", "opt"),
        (DEMO, "model_source", "opt-tiny"),
        (DEMO, "sampler", "top_n_sigma"),
        ("nanoengine-probable", "command", "probable"),
        ("nanoengine-rows", "attention_backend", "rows"),
        ("nanoengine-rows", "configs", "pkg://nanoengine_rows.configs"),
        ("nanoengine-short-first", "policy", "short-first"),
    ]


@pytest.mark.slow
def test_the_tests_that_come_with_them_pass(site: Site) -> None:
    """In one process: most of what it takes is importing torch."""
    folders = sorted(each for each in site.sources.iterdir() if (each / "tests").is_dir())
    assert len(folders) == len(KINDS) + 1
    done = run(site.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *folders, cwd=site.sources)
    assert re.search(r"\b25 passed", done.stdout), done.stdout  # two of each kind, nine of the demo; none skipped


# In one process, likewise; as a user would, one folder after the other.
RUN_ALL = """
import os, runpy, sys
from nanoengine.cli.app import app
os.chdir("nanoengine-my-gpt")
sys.argv[1:] = ["tiny"]
runpy.run_module("nanoengine_my_gpt.tiny", run_name="__main__")
for folder, *arguments in [
    ["nanoengine-my-gpt", "run.yaml"],
    ["nanoengine-less-again", "run.yaml", "model=../nanoengine-my-gpt/tiny"],
    ["nanoengine-rows", "run.yaml", "model=../nanoengine-my-gpt/tiny", "engine.device=cpu"],
    ["nanoengine-short-first", "run.yaml", "model=../nanoengine-my-gpt/tiny"],
    ["nanoengine-as-before", "run.yaml", "model=../nanoengine-my-gpt/tiny"],
    ["nanoengine-choices", "run.yaml", "model=../nanoengine-my-gpt/tiny"],
    ["nanoengine-plugin-demo", "plugin-demo", "sampler.max_tokens=4", "engine.device=cpu"],
]:
    os.chdir(os.path.join("..", folder))
    if app(["run", *arguments], standalone_mode=False):
        sys.exit(f"{folder}: {arguments} failed")
"""


@pytest.mark.slow
def test_their_configurations_run(site: Site, tmp_path: Path) -> None:
    cache = {"NANOENGINE_CACHE": empty_cache(tmp_path / "cache")}
    done = run(site.python, "-c", RUN_ALL, cwd=site.sources, env=cache)
    assert "writing opt-tiny to" in done.stderr
    config = {}
    ones = ("my-gpt", "less-again", "rows", "short-first", "as-before", "choices")
    for name, count in (*((one, 1) for one in ones), ("plugin-demo", 2)):
        folder = site.sources / f"nanoengine-{name}"
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]
        assert [(row["error"], bool(row["outputs"][0]["token_ids"])) for row in rows] == [(None, True)] * count
        config[name] = json.loads((folder / "results.jsonl.run.json").read_text())["config"]
    assert config["less-again"]["sampler"]["less_again"] == 1.0
    assert config["rows"]["attention"]["backend"] == "rows"
    assert config["short-first"]["engine"]["scheduling_policy"] == "short-first"
    assert config["as-before"]["engine"]["speculation"]["method"] == "as_before"
    assert config["choices"]["engine"]["structured_outputs"]["backend"] == "choices"
    assert config["plugin-demo"]["attention"]["backend"] == "row_by_row"
    assert config["plugin-demo"]["sampler"] == {"temperature": 1.5, "top_n_sigma": 1.0, "max_tokens": 4}


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
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("sampler", "SoftCap", "for example 'soft-cap'"),
        ("sampler", "9lives", "beginning with a letter; for example 'lives'"),
        ("sampler", "soft--cap", "for example 'soft-cap'"),
        ("sampler", "../escape", "for example 'escape'"),
        ("sampler", "…", "for example 'soft-cap'"),
        ("sampler", "class", "'class' is a keyword of Python"),
        ("sampler", "on", "YAML reads 'on' as True"),
        ("attention", "null", "YAML reads 'null' as None"),
        ("model", "x" * 65, "it has 65 characters, but at most 64 are allowed"),
        ("sampler", "start", "'start' is a member of ProcessorParams already"),
        ("sampler", "float", "'float' is a word in the generated code already"),
        ("sampler", "seed", "a field of SamplingParams already"),
        ("sampler", "presence-penalty", "a parameter of nanoengine"),
        ("sampler", "penalties", "a logits processor of nanoengine"),
        ("sampler", "processor", "a class ProcessorParams, which nanoengine.api has too"),
        ("model", "llama", "registered by nanoengine"),
        ("model", "model", "a class ModelConfig"),
        ("attention", "triton", "registered by nanoengine"),
        ("attention", "auto", "already"),
        ("policy", "fair", "registered by nanoengine"),
        ("drafter", "none", "a reserved word"),
        ("grammar", "grammar", "a class GrammarBackend"),
        ("tool-parser", "tool", "a class ToolParser"),
        ("tool_parser", "mine", "did you mean 'tool-parser'?"),
        (
            "tokenizer",
            "mine",
            "error: there is no kind 'tokenizer' of packages; Valid: attention, command, drafter, grammar, model, "
            "policy, sampler, tool-parser",
        ),
        ("sampling", "mine", "did you mean 'sampler'?"),
        ("soft-cap", "sampler", "error: the kind comes first: nanoengine plugins new sampler soft-cap"),
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
    templates = {file for file in (package / "lab/cli/plugin_templates").rglob("*") if file.is_file()}
    assert len(templates) > 15
    assert templates <= packaged
