"""What the wrappers of quantised weights and caches launch, and draws behind masks, is compiled for a Hopper GPU on any
machine, as a kernel that is right in the interpreter need not compile. `python tests/kernels/compile_variants.py --all`
compiles five times as many: every type, number of rows and option."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_one_of_each_launch_compiles(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_variants.py"))],
        env=environment
        | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DISABLE_LINE_INFO": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    *failed, last = found.stdout.splitlines()
    assert failed == [], found.stdout
    assert int(last.split()[0]) > 50
