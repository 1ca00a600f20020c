"""Plugins as `importlib.metadata` sees them: a folder of modules beside their dist-info, on sys.path."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

HEAD = """
from dataclasses import dataclass
from nanoengine.api import *
from nanoengine.api import hookimpl
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_modules: None) -> Install:
    """install("nanoengine-x", code, version="1.0"): a distribution whose one module registers itself by entry point."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def do(name: str, code: str, version: str = "1.0", entry: str = "plug") -> None:
        module = name.replace("-", "_")
        (site / f"{module}.py").write_text(HEAD + textwrap.dedent(code))
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[nanoengine]\n{entry} = {module}\n")
        importlib.invalidate_caches()

    return do


@pytest.fixture
def plugin_py(tmp_path: Path) -> Callable[..., Path]:
    """plugin_py(code, "name.py"): a file to be given with --plugin."""

    def write(code: str, name: str = "my-plugin.py") -> Path:
        path = tmp_path / name
        path.write_text(HEAD + textwrap.dedent(code))
        return path

    return write
