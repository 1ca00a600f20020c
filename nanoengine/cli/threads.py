"""How many threads torch takes on a CPU, and how they wait: chosen by the command line, before torch is loaded.

OpenMP's threads meet a few hundred times in each step. By default each spins for milliseconds at a meeting, and where
another process holds a core, all spin until the scheduler gives that core back: a step takes 50 times as long. So as
many threads are taken as there are cores that no other process keeps busy, and they spin briefly, then sleep: that
bounds the loss where others come later. A library must not change its caller's environment: only `main` does.
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
"""Of GNU's OpenMP, which torch's Linux builds ship: a look a spin, under 0.1 ms in all; then the thread sleeps.

Measured with a small model on two cores, as shares of the speed alone with the default of 300,000: 0.98 alone, and 0.3
next to a process that came later and holds a core (default: 0.01). With 2000: 0.94 and 0.45; with 0: 0.6 and 0.65.
"""
_OURS = "NANOENGINE_THREADS"  # which variables were chosen here, for a child that chooses again
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_NUMBER = re.compile(r"\s*\+?0*([1-9][0-9]{0,8})\s*(?:,|$)")  # the first of "4,2", for each level of nesting
_WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_WINDOW = 0.1  # seconds: the shortest look at who uses the CPUs, which the system counts in ticks of 10 ms
_ROUNDING = 0.4  # of a CPU that others may use before a thread is left out for them


@dataclass(frozen=True, slots=True)
class Threads:
    """What was chosen. `why`: in words. `environment`: variables to set.

    `ignored`: the user's variable that is no number of threads, "NAME=VALUE", or "".
    """

    number: int
    why: str
    environment: Mapping[str, str] = field(default_factory=dict)
    ignored: str = ""

    def line(self) -> str:
        """For people: "2 CPU threads (2 cores)"."""
        return f"{self.number} CPU thread{'' if self.number == 1 else 's'} ({self.why})"

    def described(self) -> str:
        """The same, with how they wait."""
        spins = self.environment.get("GOMP_SPINCOUNT")
        wait = "they wait as the environment says" if spins is None else f"waiting, they spin {spins} times, then sleep"
        return f"{self.line()}; {wait}"


@dataclass(frozen=True, slots=True)
class Machine:
    """The CPUs of this process. `cores`: physical ones. `quota`: in CPUs, of its cgroups; None: no limit."""

    cpus: frozenset[int]
    cores: int
    quota: float | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds so far: on the clock, of busy CPUs, of this process; each of them an ever growing count."""

    clock: float
    busy: float
    own: float

    def others_since(self, start: Usage) -> float:
        """How many CPUs other processes kept busy since `start`, on average."""
        seconds = self.clock - start.clock
        return max(0.0, (self.busy - start.busy) - (self.own - start.own)) / seconds if seconds > 0 else 0.0


def choose(machine: Machine, others: float, environ: Mapping[str, str]) -> Threads:
    """`others`: CPUs that other processes keep busy. What the user set in `environ` is left as it is, except what is
    no number of threads: empty, 0 or a word, with which OpenMP takes all cores."""
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
        number, why = free, f"other processes keep {others:.1f} of {len(machine.cpus)} CPUs busy"
    return Threads(number, why, {"OMP_NUM_THREADS": str(number), **wait}, ignored)


CHOSEN: ContextVar[Threads | None] = ContextVar("CHOSEN", default=None)
"""What `main` chose; None where a command was called otherwise, and nothing was chosen."""


class Chooser:
    """Looks at the CPUs' use from when it is made until `settle`: the command line is imported meanwhile."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root, self._machine = root, machine(root)
        self._start = usage(self._machine.cpus, root)

    def settle(self, environ: MutableMapping[str, str]) -> Threads:
        """Chooses, and writes it into `environ`."""
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
    """Takes out what a parent process chose here: it is no wish of the user's, and others may be busy by now."""
    for name in environ.pop(_OURS, "").split():
        environ.pop(name, None)


def usage(cpus: frozenset[int], root: Path = Path("/")) -> Usage | None:
    """None where the system does not report it. Time that a hypervisor took away counts as busy."""
    busy = 0
    try:
        for line in (root / "proc/stat").read_text().splitlines():
            name, *ticks = line.split()
            if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
                user, nice, system, _idle, _iowait, *rest = map(int, ticks[:8])  # beyond: guests, counted in user
                busy += user + nice + system + sum(rest)
        return Usage(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), time.process_time())
    except (OSError, ValueError, AttributeError):
        return None


def machine(root: Path = Path("/")) -> Machine:
    """This process's, by its affinity and cgroups."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cpus = frozenset(affinity(0)) if affinity is not None else frozenset(range(os.cpu_count() or 1))
    quotas = list(_quotas(root))
    return Machine(cpus, _cores(cpus, root), min(quotas) if quotas else None)


def _cores(cpus: frozenset[int], root: Path) -> int:
    """Two threads of one core gain nothing in matrix products: torch takes one a core as well."""
    found = set()
    for cpu in cpus:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            found.add(siblings.read_text().strip())
        except OSError:
            return len(cpus)
    return len(found)


def _quotas(root: Path) -> Iterator[float]:
    """Each cgroup's from this process's up to the root, of version 1 and 2, in CPUs."""
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
