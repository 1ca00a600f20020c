"""The kernels in C on several paths of instructions, whatever this processor has."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoengine.api.sources import cache_root
from nanoengine.kernels.cpu import Built, Library, built
from nanoengine.kernels.cpu.build import PROCESSORS

PATHS = {"native": PROCESSORS, "AVX2": (("-march=haswell",),), "plain C": (("-DNE_PLAIN",),)}


def library_of(path: str) -> Library:
    """The library of one of `PATHS`; skips the test where it cannot be built or run."""
    if path == "AVX2" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    found = built(cache_root(), PATHS[path])
    if not isinstance(found, Built):
        pytest.skip(found.why)
    library = Library(found.path)
    assert path in ("native", library.path)
    return library
