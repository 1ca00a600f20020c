"""The phases of a start: all of the time is somebody's, in order, and they are said."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoengine.setup.start import clock
from nanoengine.setup.start.clock import PHASES, Phase, StartClock, StartReport, process_seconds

from .support import mock_llm


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the clocks that a test makes, in its only element."""
    seconds = [100.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    return seconds


def test_laps_are_all_of_the_time_in_the_order_of_phases(now: list[float]) -> None:
    made = StartClock()
    for name, seconds in (("weights", 1.0), ("plugins", 0.25), ("weights", 0.5)):
        now[0] += seconds
        made.lap(name)
    report = made.report()
    assert report.as_dict() == {"plugins": 0.25, "weights": 1.5}
    assert list(report.as_dict()) == ["plugins", "weights"]
    assert report.seconds == 1.75
    assert report.of("capture") == 0.0
    with pytest.raises(AssertionError, match="wieghts"):
        made.lap("wieghts")


def test_what_was_measured_elsewhere_is_not_counted_twice(now: list[float]) -> None:
    made = StartClock()
    now[0] += 2.0
    made.lap_around("workers", [Phase("weights", 1.0), Phase("capture", 0.5)])
    now[0] += 1.0
    made.lap("engine")
    assert made.report().as_dict() == {"weights": 1.0, "capture": 0.5, "workers": 0.5, "engine": 1.0}


def test_line_and_table() -> None:
    report = StartReport((Phase("import", 1.84), Phase("plugins", 0.01), Phase("weights", 0.45)))
    assert report.line() == "ready in 2.3 s (import 1.8, weights 0.5)"
    assert report.table().splitlines() == [
        "import          1.840 s", "plugins         0.010 s", "weights         0.450 s", "total           2.300 s"
    ]  # fmt: skip
    assert StartReport(()).line() == "ready in 0.0 s"


def test_an_engine_reports_and_logs_its_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    began = time.perf_counter()
    with caplog.at_level(logging.INFO, logger="nanoengine"), mock_llm(tmp_path) as llm:
        took = time.perf_counter() - began
        found = llm.start_report
    assert 0 < found.seconds <= took
    names = [phase.name for phase in found.phases]
    assert names == [n for n in PHASES if n in names]
    assert {"plugins", "model source", "choice", "tokenizer", "weights", "buffers", "kv cache", "engine"} <= {*names}
    assert f"{found.line()}; attention mock" in caplog.text


def test_no_collection_while_starting_and_none_of_what_stays() -> None:
    """In a process of its own: what is frozen stays so."""
    code = (
        "import gc\n"
        "from nanoengine.setup.start.garbage import without_collections\n"
        "seen = []\n"
        "gc.callbacks.append(lambda phase, info: seen.append(phase))\n"
        "with without_collections():\n"
        "    kept = [[] for _ in range(100_000)]\n"
        "    assert not seen and not gc.isenabled()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "try:\n"
        "    with without_collections():\n"
        "        raise KeyError\n"
        "except KeyError:\n"
        "    assert gc.isenabled()\n"
        "more = [[] for _ in range(100_000)]\n"
        "assert seen\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_age_of_a_process_counts_from_its_start() -> None:
    code = "import time; time.sleep(0.3); from nanoengine.setup.start.clock import process_seconds as p; print(p())"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.3 <= float(done.stdout) <= time.perf_counter() - began + 0.02
    assert process_seconds() > 0.3
