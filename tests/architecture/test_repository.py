"""Pins, packaging, licence and sizes: what a fresh clone depends on."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from source import ROOT, sources

LIMIT = 2 * 1024 * 1024
PIN = re.compile(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    # No local label (+cpu), URL, path or option: other machines could not find it.
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def requirements(project: dict[str, Any], *extras: str) -> list[Requirement]:
    """Those of the project and of its extras; an extra may name others, as "nanoengine[server]" does."""
    named = project["project"]["optional-dependencies"]
    found = [Requirement(r) for r in (*project["project"]["dependencies"], *(r for e in extras for r in named[e]))]
    inner = {extra for r in found if r.name == "nanoengine" for extra in r.extras}
    others = requirements(project, *inner) if inner else []
    return [r for r in (*found, *others) if r.name != "nanoengine"]


def test_torch_is_pinned_without_a_label(pins: dict[str, str]) -> None:
    assert pins["torch"] == "2.13.0"


def test_every_dependency_is_pinned_within_its_bounds(project: dict[str, Any], pins: dict[str, str]) -> None:
    for requirement in requirements(project, "test"):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_what_is_installed_lies_within_the_bounds(project: dict[str, Any]) -> None:
    for requirement in requirements(project, "test"):
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement


@pytest.mark.parametrize(
    ("name", "versions"), [("torch", ["2.11.0", "2.12.1", "2.13.0"]), ("transformers", ["5.17.0", "5.23.0"])]
)
def test_the_bounds_admit_what_gpu_machines_carry(project: dict[str, Any], name: str, versions: list[str]) -> None:
    (requirement,) = (r for r in requirements(project) if r.name == name)
    assert [v for v in versions if v not in requirement.specifier] == []


def test_the_built_ins_that_are_installed_are_those_declared(project: dict[str, Any]) -> None:
    installed = {e.name: e.value for e in entry_points(group="nanoengine") if e.dist and e.dist.name == "nanoengine"}
    assert installed == project["project"]["entry-points"]["nanoengine"]


def test_every_package_of_the_source_is_packaged(project: dict[str, Any]) -> None:
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["nanoengine*"]
    folders = {source.path.parent for source in sources()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_large_file() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "pyproject.toml" in listed
    files = [ROOT / name for name in listed if (ROOT / name).is_file()]
    assert [file for file in files if file.stat().st_size > LIMIT] == []


def test_the_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_what_python_it_needs(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
