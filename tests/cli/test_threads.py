"""The command line takes as many threads as cores are free, and lets none spin for long; the user's word goes first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from nanoengine.cli import threads
from nanoengine.cli.threads import CHOSEN, SPIN_COUNT, Chooser, Machine, Threads, Usage, choose, forget, machine, usage

SPIN = {"GOMP_SPINCOUNT": str(SPIN_COUNT)}
Run = Callable[..., Result]


@pytest.fixture
def chosen() -> Iterator[Threads]:
    found = Threads(3, "3 cores", SPIN)
    token = CHOSEN.set(found)
    yield found
    CHOSEN.reset(token)


@pytest.mark.parametrize(
    ("cpus", "cores", "quota", "others", "number", "why"),
    [
        (2, 2, None, 0.0, 2, "2 cores"),
        (2, 2, None, 0.3, 2, "2 cores"),  # what a machine does that does nothing
        (2, 2, None, 0.9, 1, "other processes use 0.9 of 2 CPUs"),
        (2, 2, None, 2.0, 1, "other processes use 2.0 of 2 CPUs"),
        (64, 32, None, 30.0, 32, "32 cores"),  # they have the other half
        (64, 32, None, 40.0, 24, "other processes use 40.0 of 64 CPUs"),
        (64, 32, 4.0, 30.0, 4, "the container's quota is 4 CPUs"),
        (64, 32, 0.5, 0.0, 1, "the container's quota is 0.5 CPUs"),
        (8, 8, 7.9, 0.0, 7, "the container's quota is 7.9 CPUs"),
        (8, 8, 16.0, 0.0, 8, "8 cores"),
        (1, 1, None, 1.0, 1, "1 core"),
    ],
)
def test_threads_are_the_cores_that_no_other_process_keeps_busy(
    cpus: int, cores: int, quota: float | None, others: float, number: int, why: str
) -> None:
    found = choose(Machine(frozenset(range(cpus)), cores, quota), others, {})
    assert (found.number, found.why) == (number, why)
    assert found.environment == {"OMP_NUM_THREADS": str(number), **SPIN}


@pytest.mark.parametrize(
    ("environ", "number", "added"),
    [
        ({"OMP_NUM_THREADS": "5"}, 5, SPIN),
        ({"OMP_NUM_THREADS": "4,2"}, 4, SPIN),
        ({"MKL_NUM_THREADS": "5"}, 5, SPIN),
        ({"OMP_NUM_THREADS": " +04 "}, 4, SPIN),
        ({"OMP_NUM_THREADS": "", "MKL_NUM_THREADS": "5"}, 5, SPIN),
        ({"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "ACTIVE"}, 5, {}),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, 1, {"OMP_NUM_THREADS": "1"}),
        ({"GOMP_SPINCOUNT": "7"}, 1, {"OMP_NUM_THREADS": "1"}),
        ({"KMP_BLOCKTIME": "0"}, 1, {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_what_the_user_set_wins(environ: dict[str, str], number: int, added: dict[str, str]) -> None:
    found = choose(Machine(frozenset({0, 1}), 2), 1.0, environ)
    assert (found.number, found.environment) == (number, added)


def test_lines_name_the_threads_and_where_the_choice_comes_from() -> None:
    assert choose(Machine(frozenset({0, 1}), 2), 0.0, {}).line() == "2 CPU threads (2 cores)"
    assert choose(Machine(frozenset({0, 1}), 2), 1.0, {}).line() == ("1 CPU thread (other processes use 1.0 of 2 CPUs)")
    assert choose(Machine(frozenset({0, 1}), 2), 0.0, {"OMP_NUM_THREADS": "1"}).line() == (
        "1 CPU thread (OMP_NUM_THREADS=1 is set)"
    )


@pytest.mark.parametrize("value", ["", "0", "abc", "-1", "4.5", "4x", ",4", "\u0664", " "])
def test_what_is_no_number_of_threads_is_no_choice(
    value: str, nanoengine: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = choose(Machine(frozenset({0, 1}), 2), 1.0, {"OMP_NUM_THREADS": value})
    assert (found.number, found.environment) == (1, {"OMP_NUM_THREADS": "1", **SPIN})
    monkeypatch.setattr("nanoengine.lab.doctor.environment.environment", list)
    monkeypatch.setattr("nanoengine.lab.doctor.environment.gpu", list)
    token = CHOSEN.set(found)
    try:
        lines = nanoengine("plugins", "doctor").stdout.splitlines()
    finally:
        CHOSEN.reset(token)
    said = f"OMP_NUM_THREADS={value} is not a number of threads, and is ignored"
    assert any(line.strip().startswith("warning  threads: 1 CPU thread") and said in line for line in lines), lines


def test_the_closing_line_names_the_threads(fake: Any, nanoengine: Run, chosen: Threads, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: a/b\nprompts: [one]\n")
    assert nanoengine("run", "run.yaml").stderr.splitlines()[-1].endswith(f"%, {chosen.line()}")


def test_doctor_names_the_threads(nanoengine: Run, chosen: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoengine.lab.doctor.environment.environment", list)
    monkeypatch.setattr("nanoengine.lab.doctor.environment.gpu", list)
    lines = nanoengine("plugins", "doctor").stdout.splitlines()
    expected = f"threads: 3 CPU threads (3 cores); waiting, they spin {SPIN_COUNT} times, then sleep"
    assert any(line.endswith(expected) for line in lines)


def test_a_command_that_main_did_not_call_changes_no_environment(fake: Any, nanoengine: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: a/b\nprompts: [one]\n")
    before = dict(os.environ)
    result = nanoengine("run", "run.yaml")
    assert result.exit_code == 0
    assert "CPU thread" not in result.stderr
    assert dict(os.environ) == before


def test_main_sets_the_environment_and_the_library_does_not() -> None:
    code = (
        "import os, sys\n"
        "before = dict(os.environ)\n"
        "import nanoengine, nanoengine.cli, nanoengine.cli.app\n"
        "assert dict(os.environ) == before\n"
        "sys.argv = ['nanoengine', '--version']\n"
        "try:\n    nanoengine.cli.main()\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ['NANOENGINE_THREADS'], os.environ['GOMP_SPINCOUNT'], os.environ['OMP_NUM_THREADS'])\n"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True, timeout=120
    )
    *names, spins, number = done.stdout.splitlines()[-1].split()
    assert (names, spins) == (["OMP_NUM_THREADS", "GOMP_SPINCOUNT"], str(SPIN_COUNT))
    assert 1 <= int(number) <= (os.cpu_count() or 1)


def test_a_child_chooses_again() -> None:
    """A sweep's runs start hours after it."""
    environ = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "NANOENGINE_THREADS": "OMP_NUM_THREADS", "A": "1"}
    forget(environ)
    assert environ == {"OMP_WAIT_POLICY": "PASSIVE", "A": "1"}
    forget(environ)
    assert environ == {"OMP_WAIT_POLICY": "PASSIVE", "A": "1"}


def _written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_what_others_use_leaves_out_this_process_and_cpus_it_may_not_run_on(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    #        user nice system idle iowait irq softirq steal guest guest_nice
    row = "cpu{} {} {} 10 500 70 1 2 3 99 99\n"
    text = "cpu  1 1 1 1 1 1 1 1 1 1\n" + row.format(0, 100, 50) + row.format(1, 9999, 0) + row.format(10, 30, 0)
    found = usage(frozenset({0, 10}), _written(tmp_path, {"proc/stat": text + "intr 5\n"}))
    assert found is not None
    assert found.busy == pytest.approx((100 + 50 + 30 + 2 * (10 + 1 + 2 + 3)) / tick)
    assert Usage(2.0, 1.5, 0.5).others_since(Usage(1.0, 0.0, 0.25)) == pytest.approx(1.25)
    assert Usage(2.0, 0.1, 0.5).others_since(Usage(1.0, 0.0, 0.25)) == 0.0


@pytest.mark.parametrize("text", [None, "", "cpu0 a b\n", "cpu0 1 2\n"])
def test_a_system_that_reports_nothing_counts_as_free(tmp_path: Path, text: str | None) -> None:
    chooser = Chooser(_written(tmp_path, {} if text is None else {"proc/stat": text}))
    environ: dict[str, str] = {}
    found = chooser.settle(environ)
    assert found.number == len(chooser._machine.cpus) == int(environ["OMP_NUM_THREADS"])
    CHOSEN.set(None)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (  # the smallest of its own and those above it
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/c/cpu.max": "100000 100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",  # a container sees its own as the root
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
    ],
)
def test_quotas_of_both_versions_of_cgroups(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert machine(_written(tmp_path, files)).quota == quota


def test_two_cpus_of_one_core_count_once(tmp_path: Path) -> None:
    name = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    root = _written(tmp_path, {name.format(cpu): f"{cpu % 2},{cpu % 2 + 2}\n" for cpu in range(4)})
    assert threads._cores(frozenset(range(4)), root) == 2
    assert threads._cores(frozenset({0, 1, 7}), root) == 3  # of the last nothing is known
