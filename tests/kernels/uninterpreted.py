"""Scripts whose Triton compiles, run in a process of their own: in that of the tests it interprets. And what is broken
for them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str, **environment: str) -> str:
    """What a script of this folder prints; it must end well."""
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given["PYTHONPATH"] = os.pathsep.join([str(ROOT), given.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        capture_output=True,
        text=True,
        env=given | environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def mutant(module: Any, changes: Mapping[str, tuple[str, str]], name: str, folder: Path) -> Any:
    """The module with one change of its text."""
    old, new = changes[name]
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1, name
    path = folder / "mutant.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
