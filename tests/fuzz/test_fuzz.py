"""Mutants of every kind end well: `NANOENGINE_FUZZ_COUNT` of each (300), of one seed or `NANOENGINE_FUZZ_SEED`."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from fuzz import harness
from fuzz.__main__ import main

pytestmark = pytest.mark.usefixtures("forked")

SEED = int(os.environ.get("NANOENGINE_FUZZ_SEED") or 20_260_101)
COUNT = int(os.environ.get("NANOENGINE_FUZZ_COUNT") or 300)

BAD_KIND = '''\
"""Case 1 raises, 3 takes memory, 5 ends the process, 7 computes and 9 waits for ever; the others end well."""
import itertools, os, sys, time
from nanoengine.api.errors import ConfigError

def mutants(rng):
    first = rng.randrange(1000)
    return ((number, first) for number in itertools.count())

def run(case):
    number, _ = case
    if number == 1:
        raise KeyError("a bug")
    if number == 3:
        bytearray(1 << 31)
    if number == 5:
        os.abort()
    while number == 7:
        pass
    if number == 9:
        time.sleep(100)
    raise ConfigError("as it should be")
'''


@pytest.mark.parametrize("kind", harness.kinds())
def test_mutants_end_well(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f" fuzz {kind}: {COUNT} mutants of seed {SEED}", flush=True)
    crashes, last = harness.fuzz(kind, SEED, 0, COUNT)
    assert last == COUNT - 1
    assert not crashes, f"seed {SEED}:\n\n" + "\n\n".join(map(str, crashes[:5]))


def test_each_way_to_crash_is_found_and_the_cases_behind_it_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fuzz"
    package.mkdir()
    for name in ("__init__", "child"):
        (package / f"{name}.py").write_text((harness.FOLDER / f"{name}.py").read_text())
    (package / "bad.py").write_text(BAD_KIND)
    monkeypatch.setattr(harness, "FOLDER", package)
    monkeypatch.setattr(harness, "WALL_SECONDS", 3.0)
    monkeypatch.setattr(harness, "CPU_SECONDS", 0.2)  # little of the time above: others use the cores, too
    assert harness.kinds() == ["bad"]
    found, last = harness.fuzz("bad", 7, 0, 12)
    assert last == 11
    assert [crash.number for crash in found] == [1, 3, 5, 7, 9]
    causes = ["KeyError: 'a bug'", "MemoryError", "SIGABRT", "more than 0.2 s of processor time", "no end after"]
    assert all(cause in crash.cause for cause, crash in zip(causes, found, strict=True)), found
    first = random.Random(7).randrange(1000)
    assert [crash.case for crash in found] == [str((number, first)) for number in (1, 3, 5, 7, 9)]
    [again], _ = harness.fuzz("bad", 7, 3, 4)
    assert (again.number, again.case) == (3, found[1].case)
    if sys.platform == "linux":
        assert "python tests/fuzz bad --seed 7 --only 3" in str(again)


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--count", "-3"], ["--only", "-1"], ["--count", "x"]])
def test_a_run_of_no_cases_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", "yaml_config", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_script_reports_the_number_of_the_last_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", "prompts_file", "--count", "3", "--seed", "1"])
    assert main() == 0
    assert "prompts_file: 3 mutants (the last was number 2), 0 crashes" in capsys.readouterr().out
