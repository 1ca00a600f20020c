"""Python's collections of garbage in a process that makes steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from nanoengine.setup.start.garbage import without_collections


@pytest.fixture
def usual() -> Iterator[None]:
    threshold = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # Python's own: a run in this process may have set another
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()
    gc.freeze()  # the suite's own again


def collections(settled: bool) -> int:
    """While a step of some thousand requests makes its deltas and drops them, ten times."""
    if settled:
        with without_collections():
            pass
    before = sum(each["collections"] for each in gc.get_stats())
    for _ in range(10):
        deltas = [[number] for number in range(12_000)]
        del deltas
    return sum(each["collections"] for each in gc.get_stats()) - before


def test_a_step_starts_no_collection(usual: None) -> None:
    assert collections(settled=False) > 10  # or it would show nothing
    assert collections(settled=True) == 0
