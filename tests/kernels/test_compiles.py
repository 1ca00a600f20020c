"""What the wrappers of quantised weights and caches launch is compiled for a Hopper GPU on any machine, as a kernel
that is right in the interpreter need not compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("more", [[], pytest.param(["--all"], marks=pytest.mark.slow)], ids=["one of each", "all"])
def test_every_launch_compiles(more: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_variants.py")), *more],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    *failed, last = found.stdout.splitlines()
    assert failed == [], found.stdout
    assert int(last.split()[0]) > 50
