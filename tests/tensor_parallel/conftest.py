"""Every test here leaves nothing behind: no process, no descriptor."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest


def children() -> set[int]:
    """Process ids of this process's children, including ended ones that are not reaped."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def held() -> Counter[str]:
    """What this process holds open, by kind: sockets, pipes, memory."""
    kinds: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own
            continue
        if target.startswith(("socket:", "pipe:", "/memfd:", "/dev/shm")):
            kinds[target.partition(":")[0] + target.partition(":")[2] * target.startswith("/memfd")] += 1
    return kinds


@pytest.fixture(scope="module", autouse=True)
def forked_ranks(forked: None) -> None:
    """Ranks are forked; one that is started imports for four seconds."""


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    gc.collect()
    processes, files = children(), held()
    yield
    gc.collect()
    assert (children() - processes, held() - files) == (set(), Counter())  # what tests before left may end meanwhile
