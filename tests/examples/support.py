"""Runs an example as `python examples/NAME.py ARGUMENTS` would, in this process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What stands in the module at the end."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def load(name: str) -> Any:
    """The example's functions, without its `main`."""
    return type("Example", (), {k: staticmethod(v) if callable(v) and not isinstance(v, type) else v
                                for k, v in runpy.run_path(str(EXAMPLES / name)).items()})  # fmt: skip
