"""`nanoengine config list`: groups, options, recipes, and whose they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nanoengine.api.errors import ConfigError
from nanoengine.cli.app import app
from nanoengine.setup.config.config import load_config
from nanoengine.setup.plugins.discover import discover

ROOTS = """
@hookimpl
def register_configs():
    return ["pkg://{}"]
"""


def config_list(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["config", "list", *map(str, arguments)])


def options(*arguments: str | Path) -> dict[tuple[str, str], dict[str, Any]]:
    result = config_list("--json", *arguments)
    assert result.exit_code == 0, result.output
    return {(each["group"], each["name"]): each for each in json.loads(result.stdout)["options"]}


def group_files(folder: Path, files: dict[str, str]) -> Path:
    """A package folder with these files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "__init__.py").touch()
    return folder


def test_everything_that_is_listed_can_be_chosen() -> None:
    found = options()
    assert {group for group, _ in found} >= {"attention", "engine", "model", "sampler", "recipes"}
    registry = discover()
    for (group, name), option in found.items():
        assert option["provider"].startswith("nanoengine "), option
        if group == "recipes":
            load_config(name, ["model=smollm2-135m"] if name == "bare" else [], registry=registry)
        else:
            load_config("quickstart", [f"{group}={name}"], registry=registry)


def test_the_table() -> None:
    lines = config_list().stdout.splitlines()
    assert "sampler=" in lines
    assert any(
        line.split() == ["top_p", "nanoengine", "0.1.0", "temperature:", "0.7,", "top_p:", "0.9"] for line in lines
    )
    assert any(line.strip().startswith("triton") and "the backend of that name" in line for line in lines)
    assert lines.index("recipes: nanoengine run NAME") > lines.index("sampler=")
    assert "attention=" not in config_list("sampler").stdout


def test_a_packages_options_and_a_clash(install: Callable[..., None], tmp_path: Path) -> None:
    site = tmp_path / "site"
    group_files(
        site / "acme_configs",
        {"sampler/careful.yaml": "# Few surprises.\ntop_p: 0.5\n", "sampler/greedy.yaml": "temperature: 0\n",
         "deep/er/one.yaml": "a: 1\n", "sampler/broken.yaml": "a: [\n", "acme.yaml": "model: a/b\n"},
    )  # fmt: skip
    install("nanoengine-acme", ROOTS.format("acme_configs"), "2.1")
    install("nanoengine-gone", ROOTS.format("not_there"))
    result = config_list("--json")
    found = json.loads(result.stdout)
    by_name = {(each["group"], each["name"], each["provider"].split()[0]): each for each in found["options"]}
    careful = by_name["sampler", "careful", "nanoengine-acme"]
    assert careful["says"] == "Few surprises"
    assert careful["provider"].startswith("nanoengine-acme 2.1")
    assert careful["file"].endswith("acme_configs/sampler/careful.yaml")
    assert not any(group.startswith("deep") for group, _, _ in by_name)  # groups are one folder deep
    assert ("recipes", "acme", "nanoengine-acme") in by_name
    assert by_name["sampler", "broken", "nanoengine-acme"]["says"].startswith("cannot be read: broken.yaml")
    assert by_name["sampler", "greedy", "nanoengine-acme"]["clash"]
    assert by_name["sampler", "greedy", "nanoengine"]["clash"]
    assert not careful["clash"]
    [clash, gone] = sorted(found["problems"], key=lambda text: "not_there" in text)
    assert "sampler=greedy is provided by nanoengine 0.1.0" in clash
    assert "nanoengine-acme 2.1" in clash
    assert "config root 'pkg://not_there'" in gone
    text = config_list("sampler").stdout
    assert text.count("CLASH") == 2
    assert "problems:" in text


def test_the_groups_beside_a_file_go_first(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: a/b\n")
    group_files(tmp_path, {"sampler/greedy.yaml": "temperature: 0\ntop_k: 1\n", "sampler/mine.yaml": "top_k: 3\n"})
    found = options("--beside", tmp_path / "run.yaml")
    assert found["sampler", "mine"]["provider"] == "your own folder"
    assert found["sampler", "greedy"]["provider"] == "your own folder"
    assert not found["sampler", "greedy"]["clash"]
    assert found["sampler", "top_p"]["provider"].startswith("nanoengine ")
    assert ("recipes", "run") not in found
    assert load_config(tmp_path / "run.yaml", ["+sampler=greedy"]).sampler == {"temperature": 0.0, "top_k": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("samplr",), "did you mean 'sampler'"), (("--beside", "not-here.yaml"), "no configuration file not-here.yaml")],
)
def test_what_is_not_there(arguments: tuple[str, ...], words: str) -> None:
    result = config_list(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_broken_root_stops_only_who_needs_it(install: Callable[..., None], tmp_path: Path) -> None:
    install("nanoengine-gone", ROOTS.format("not_there"))
    registry = discover()
    assert load_config("quickstart", registry=registry).sampler == {"temperature": 0.0, "max_tokens": 64}
    (tmp_path / "group.yaml").write_text("defaults: [brand: new]\nmodel: a/b\n")
    (tmp_path / "file.yaml").write_text("defaults: [gone]\nmodel: a/b\n")
    files = [(str(tmp_path / name), []) for name in ("group.yaml", "file.yaml")]
    for wanted in (("quickstart", ["sampler=careful"]), ("recipe-of-gone", []), *files):
        with pytest.raises(ConfigError, match=r"It may be missing because nanoengine-gone 1\.0 .* 'pkg://not_there'"):
            load_config(*wanted, registry=registry)
