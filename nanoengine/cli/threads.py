"""Chooses the number of torch's CPU threads and how they wait. The command line does this before torch is loaded.

OpenMP's threads synchronise a few hundred times in each step. By default a waiting thread spins for milliseconds. If
another process uses a core, all threads spin until the scheduler frees that core, and a step takes 50 times as long. So
there is one thread for each core that no other process uses, and threads spin briefly and then sleep, which limits the
effect of processes that start later. A library must not change the environment of its caller: only `main` does this.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

SPIN_COUNT = 5000
"""Number of spins before a thread sleeps, less than 0.1 ms. For GNU's OpenMP, which is part of torch's Linux builds.

Measured with a small model on two cores, relative to the speed with the default of 300,000 and no other process: 0.98
without another process, and 0.3 with one that started later and uses a core (default: 0.01). With 2000 spins: 0.94 and
0.45; with 0: 0.6 and 0.65.
"""
_OURS = "NANOENGINE_THREADS"  # lists the variables that were chosen here, so that a child process can choose again
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_NUMBER = re.compile(r"\s*\+?0*([1-9][0-9]{0,8})\s*(?:,|$)")  # the first of "4,2", for each level of nesting
_WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_WINDOW = 0.1  # seconds: the shortest measurement of the CPUs' use, which the system counts in ticks of 10 ms
_ROUNDING = 0.4  # so much of a CPU may be used by other processes before there is one thread less


@dataclass(frozen=True, slots=True)
class Threads:
    """The chosen number of threads. `why`: the reason, as text. `environment`: variables to set.

    `ignored`: a variable of the user that is not a number of threads, as "NAME=VALUE", or "".
    """

    number: int
    why: str
    environment: Mapping[str, str] = field(default_factory=dict)
    ignored: str = ""

    def line(self) -> str:
        """A summary: "2 CPU threads (2 cores)"."""
        return f"{self.number} CPU thread{'' if self.number == 1 else 's'} ({self.why})"

    def described(self) -> str:
        """The summary, and how the threads wait."""
        spins = self.environment.get("GOMP_SPINCOUNT")
        wait = "they wait as the environment says" if spins is None else f"waiting, they spin {spins} times, then sleep"
        return f"{self.line()}; {wait}"


@dataclass(frozen=True, slots=True)
class Machine:
    """The CPUs of this process. `cores`: number of physical cores. `quota`: of its cgroups, in CPUs; None: no limit."""

    cpus: frozenset[int]
    cores: int
    quota: float | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Counters in seconds: the clock, busy time of the CPUs, CPU time of this process."""

    clock: float
    busy: float
    own: float

    def others_since(self, start: Usage) -> float:
        """The average number of CPUs that other processes have used since `start`."""
        seconds = self.clock - start.clock
        return max(0.0, (self.busy - start.busy) - (self.own - start.own)) / seconds if seconds > 0 else 0.0


def choose(machine: Machine, others: float, environ: Mapping[str, str]) -> Threads:
    """Chooses the threads. `others`: number of CPUs that other processes use.

    Variables that the user set in `environ` are not changed, except if they are not a number of threads (empty, 0 or a
    word), with which OpenMP would use all cores.
    """
    wait = {} if any(name in environ for name in _WAITS) else {"GOMP_SPINCOUNT": str(SPIN_COUNT)}
    given = {name: environ[name] for name in _COUNTS if name in environ}
    for name, value in given.items():
        if found := _NUMBER.match(value):
            return Threads(int(found[1]), f"{name}={value} is set", wait)
    ignored = next((f"{name}={value}" for name, value in given.items()), "")
    number, why = machine.cores, f"{machine.cores} core{'' if machine.cores == 1 else 's'}"
    if machine.quota is not None and machine.quota < number:
        number, why = max(1, int(machine.quota)), f"the container's quota is {machine.quota:g} CPUs"
    free = max(1, int(len(machine.cpus) - others + _ROUNDING))
    if free < number:
        number, why = free, f"other processes use {others:.1f} of {len(machine.cpus)} CPUs"
    return Threads(number, why, {"OMP_NUM_THREADS": str(number), **wait}, ignored)


CHOSEN: ContextVar[Threads | None] = ContextVar("CHOSEN", default=None)
"""What `main` chose; None if a command was called in another way, so that nothing was chosen."""


class Chooser:
    """Measures the use of the CPUs from its creation until `settle`, while the command line is imported."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root, self._machine = root, machine(root)
        self._start = usage(self._machine.cpus, root)

    def settle(self, environ: MutableMapping[str, str]) -> Threads:
        """Chooses the threads, and sets the variables in `environ`."""
        forget(environ)
        found = choose(self._machine, self._others(), environ)
        environ.update(found.environment)
        environ[_OURS] = " ".join(found.environment)
        CHOSEN.set(found)
        return found

    def _others(self) -> float:
        if self._start is None:
            return 0.0
        time.sleep(max(0.0, self._start.clock + _WINDOW - time.monotonic()))
        now = usage(self._machine.cpus, self._root)
        return now.others_since(self._start) if now is not None else 0.0


def forget(environ: MutableMapping[str, str]) -> None:
    """Removes variables that a parent process chose: the user did not set them, and the CPUs' use has changed."""
    for name in environ.pop(_OURS, "").split():
        environ.pop(name, None)


def usage(cpus: frozenset[int], root: Path = Path("/")) -> Usage | None:
    """The counters now; None if the system does not report them. Time that a hypervisor took counts as busy."""
    busy = 0
    try:
        for line in (root / "proc/stat").read_text().splitlines():
            name, *ticks = line.split()
            if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
                user, nice, system, _idle, _iowait, *rest = map(
                    int, ticks[:8]
                )  # the following ones are included in user
                busy += user + nice + system + sum(rest)
        return Usage(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), time.process_time())
    except (OSError, ValueError, AttributeError):
        return None


def machine(root: Path = Path("/")) -> Machine:
    """The CPUs of this process, from its affinity and cgroups."""
    affinity = getattr(os, "sched_getaffinity", None)  # only Linux has it
    cpus = frozenset(affinity(0)) if affinity is not None else frozenset(range(os.cpu_count() or 1))
    quotas = list(_quotas(root))
    return Machine(cpus, _cores(cpus, root), min(quotas) if quotas else None)


def _cores(cpus: frozenset[int], root: Path) -> int:
    """The number of physical cores. Two threads on one core are not faster in matrix products; torch uses one too."""
    found = set()
    for cpu in cpus:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            found.add(siblings.read_text().strip())
        except OSError:
            return len(cpus)
    return len(found)


def _quotas(root: Path) -> Iterator[float]:
    """The quotas in CPUs of the cgroup of this process and of all its parents, for cgroups of version 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in (mount, mount / "unified") if not controllers else (mount / controllers, mount / "cpu"):
            leaf = top / path.lstrip("/")
            for folder in (leaf, *leaf.parents):
                if folder == top.parent:
                    break
                with suppress(OSError, ValueError):
                    yield from _quota(folder, version=1 if controllers else 2)


def _quota(folder: Path, version: int) -> Iterator[float]:
    if version == 2:
        quota, period = (folder / "cpu.max").read_text().split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    if quota != "max" and int(quota) > 0:
        yield int(quota) / int(period)
