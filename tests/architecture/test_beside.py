"""How the suite runs in several processes: what is marked alone has no test beside it, and every worker goes on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import beside
import pytest


class Loose(beside.Turns):
    """A mutant: no test waits for another."""

    def pytest_runtest_protocol(self, item: Any) -> Any:
        return (yield)


def worst_company(kind: Callable[[Path], beside.Turns], folder: Path) -> tuple[int, int]:
    """Three workers of 20 tests each. The most tests that ran at once: where none is marked alone, and where one is."""
    running: list[bool] = []
    seen: list[tuple[bool, ...]] = []

    def worker(number: int) -> None:
        turns = kind(folder)
        for test in range(20):
            alone = test % 5 == number
            wrapper = turns.pytest_runtest_protocol(
                SimpleNamespace(get_closest_marker=lambda name, alone=alone: name == "alone" and alone)  # type: ignore[arg-type]
            )
            next(wrapper)
            running.append(alone)
            time.sleep(0.001)
            seen.append(tuple(running))
            running.remove(alone)
            with pytest.raises(StopIteration):
                next(wrapper)

    workers = [threading.Thread(target=worker, args=(n,)) for n in range(3)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert len(seen) == 60
    return max(len(at) for at in seen if True not in at), max(len(at) for at in seen if True in at)


def test_a_test_marked_alone_has_none_beside_it(tmp_path: Path) -> None:
    others, alone = worst_company(beside.Turns, tmp_path)
    assert alone == 1
    assert others > 1, "others run beside each other"
    assert worst_company(Loose, tmp_path)[1] > 1


def test_no_two_modules_of_tests_have_the_same_name() -> None:
    """In folders without `__init__.py` a module's name is its file's: of two pytest collects none."""
    loose = [path for path in beside.TESTS.rglob("*.py") if not (path.parent / "__init__.py").exists()]
    names = Counter(path.name for path in loose if path.name != "conftest.py" and "packages" not in path.parts)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 2), (3, 3), (64, 4)])
def test_a_worker_for_each_core(cores: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert beside.number_of_workers() == workers


def test_long_files_come_first_and_their_tests_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "LONGEST", ("cli/test_run.py", "cli/test_chat.py"))
    names = ["cli/test_bench.py", "cli/test_chat.py", "cli/test_chat.py", "cli/test_run.py", "cli/test_show.py"]
    items: Any = [SimpleNamespace(path=beside.TESTS / name, place=n) for n, name in enumerate(names)]
    beside.longest_first(items)
    assert [item.place for item in items] == [3, 1, 2, 0, 4]
    monkeypatch.setattr(beside, "LONGEST", ("cli/test_gone.py",))
    with pytest.raises(pytest.UsageError, match=r"LONGEST names files that are not there: cli/test_gone\.py"):
        beside.longest_first(items)


def test_half_of_the_combinations_hold_any_two_values() -> None:
    axes = [["a", "b", "c"], ["x", "y"], ["1", "2", "3", "4"]]
    items: Any = [
        SimpleNamespace(
            nodeid=f"test[{each}]",
            callspec=SimpleNamespace(_idlist=each),
            get_closest_marker=lambda name: name == "half",
        )
        for each in product(*axes)
    ]
    beside.halve(items)
    kept = [item.callspec._idlist for item in items]
    assert len(kept) == 12
    for one, other in combinations(range(3), 2):
        assert {(each[one], each[other]) for each in kept} == set(product(axes[one], axes[other]))
