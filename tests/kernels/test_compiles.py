"""What the wrappers of quantised weights and caches launch, and draws behind masks, is compiled for a Hopper GPU on any
machine, as a kernel that is right in the interpreter need not compile. `python tests/kernels/compile_variants.py --all`
compiles six times as many: every type, number of rows and option."""

from __future__ import annotations

import pytest
import uninterpreted

pytest.importorskip("triton")


def test_one_of_each_launch_compiles(compiled_before: str) -> None:
    found = uninterpreted.run("compile_variants.py", TRITON_CACHE_DIR=compiled_before, TRITON_DISABLE_LINE_INFO="1")
    *failed, last = found.splitlines()
    assert failed == [], found
    assert int(last.split()[0]) > 40
