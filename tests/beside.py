"""How the suite runs in several processes (pytest-xdist): how many, which files first, and what runs alone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST = 4  # each has torch, and up to 3 GB of what its tests made
TESTS = Path(__file__).parent

# Files of over 20 s: a worker takes a file at a time, and none of these should be the last. The others follow by name.
LONGEST = (
    "parity/test_families.py",
    "models/test_fused.py",
    "engine/test_captured_steps.py",
    "server/test_serve.py",
    "tensor_parallel/test_processes.py",
    "kernels/test_compiles.py",
    "plugins/test_writing_a_plugin.py",
    "cli/test_multirun.py",
    "plugins/test_new_plugin.py",
    "tensor_parallel/test_faults.py",
    "server/test_supervisor.py",
    "kernels/test_compiled_for_hopper.py",
    "kernels/test_paged_attention.py",
    "engine/test_degrade.py",
    "kernels/test_experts.py",
    "attention/test_triton_paged.py",
    "server/test_constraints.py",
    "engine/test_host_states.py",
    "scheduling/test_decode_rows.py",
    "quantization/test_gguf_tiles.py",
)


def number_of_workers() -> int:
    """One for each core that this process may use, up to `MOST`. With one core 0: the tests run in this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST) if cores > 1 else 0


def longest_first(items: list[pytest.Item]) -> None:
    """Sorts by file; the tests of a file keep their order. Raises pytest.UsageError if a name of `LONGEST` is stale."""
    stale = [name for name in LONGEST if not (TESTS / name).exists()]
    if stale:
        raise pytest.UsageError(f"tests/beside.py: LONGEST names files that are not there: {', '.join(stale)}")
    place = {TESTS / name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


def halve(items: list[pytest.Item]) -> None:
    """Of each test marked `half` keeps every other combination of its parameters (three or more), as on the white
    fields of a chess board: any two values of two parameters still meet."""
    seen: dict[tuple[str, int], list[str]] = {}  # (test, parameter) -> its values so far

    def is_kept(item: pytest.Item) -> bool:
        if not item.get_closest_marker("half"):
            return True
        total = 0
        for place, value in enumerate(item.callspec._idlist):  # type: ignore[attr-defined]
            values = seen.setdefault((item.nodeid.partition("[")[0], place), [])
            if value not in values:
                values.append(value)
            total += values.index(value)
        return total % 2 == 0

    items[:] = [item for item in items if is_kept(item)]


class Turns:
    """In each worker: a test marked `alone` runs while no other test does.

    A test waits outside its timeout. Each takes the lock of `turn` to start, so one that waits to be alone is the next.
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: the same for all workers of this run."""
        self._turn, self._running = folder / "turn", folder / "running"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        with self._turn.open("a") as turn, self._running.open("a") as running:
            fcntl.flock(turn, fcntl.LOCK_EX)
            if item.get_closest_marker("alone"):
                fcntl.flock(running, fcntl.LOCK_EX)
            else:
                fcntl.flock(running, fcntl.LOCK_SH)
                fcntl.flock(turn, fcntl.LOCK_UN)
            return (yield)  # closing a file gives its lock back
