"""Runs mutants of one kind in a child process, whose time and memory this process bounds.

A *kind* is a module of this folder that has

- `mutants(rng: random.Random) -> Iterator[Case]`: cases, of which `repr` shows all that is in them. They may depend on
  `rng` only, so that a seed and a number say which case it was.
- `run(case: Case) -> None`: ends by returning or by a `NanoEngineError`. All else is a crash: another exception, the
  end of the process, more than `CPU_SECONDS` of processor time (or `WALL_SECONDS` in all, for what waits), more than
  `MEMORY` bytes of address space beyond what the child had before its first case.
- maybe `warm() -> None`: loads what is not to count, before memory is bounded.

A child runs many cases, one after another, in a folder of its own; after a crash a new child takes the next case.
Time is the processor's, because the machine may have much else to do.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
CPU_SECONDS, WALL_SECONDS, START_SECONDS = 2.0, 60.0, 180.0
MEMORY = 1 << 30
_CASES_A_CHILD = 1000  # more would let what each leaves behind add up
_NOT_KINDS = ("__init__", "__main__", "harness", "child")


@dataclass(frozen=True, slots=True)
class Crash:
    """`case`: its `repr`. `cause`: a traceback, or which bound it broke."""

    kind: str
    seed: int
    number: int
    case: str
    cause: str

    def __str__(self) -> str:
        again = f"python tests/fuzz {self.kind} --seed {self.seed} --only {self.number}"
        return f"{self.kind} {self.number} of seed {self.seed}\nagain: {again}\ncase: {self.case}\n{self.cause}"


def kinds() -> list[str]:
    """Names of the modules in this folder that hold mutants."""
    names = (path.stem for path in FOLDER.glob("*.py"))
    return sorted(name for name in names if name not in _NOT_KINDS and not name.startswith("test_"))


def fuzz(kind: str, seed: int, start: int, stop: int) -> tuple[list[Crash], int]:
    """Runs the cases from `start` to `stop` of a seed; gives the crashes, and the number of the last case that began.

    Raises `ValueError` where these are no cases, `RuntimeError` where a child cannot even begin.
    """
    if not 0 <= start < stop:
        raise ValueError(f"no cases: {start} to {stop}")
    crashes: list[Crash] = []
    last = start - 1
    while start < stop:
        with tempfile.TemporaryDirectory() as folder:
            child = _Child(kind, seed, start, min(stop, start + _CASES_A_CHILD), folder)
            try:
                crash = child.crash()
            finally:
                child.end()
        if crash is not None:
            crashes.append(crash)
        last, start = child.number, child.number + 1
    return crashes, last


class _Child:
    """A process at work. `number`: of the case it is at."""

    def __init__(self, kind: str, seed: int, start: int, stop: int, folder: str) -> None:
        self.kind, self.seed, self.number, self._case = kind, seed, start - 1, ""
        ours, theirs = os.pipe()
        path = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.child", kind, *map(str, (seed, start, stop, theirs))],
            cwd=folder, stdin=subprocess.PIPE, stdout=self._errors, stderr=self._errors, pass_fds=(theirs,),
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, process_group=0,
        )  # fmt: skip
        os.close(theirs)
        self._pipe, self._buffer = ours, b""

    def crash(self) -> Crash | None:
        """What ended it before its last case; None where nothing did."""
        for word, rest in self._messages():
            match word:
                case "ready":
                    self._bound_memory()
                case "case":
                    number, _, self._case = rest.partition(" ")
                    self.number = int(number)
                case "crash":
                    return self._crashed(rest)
                case "end":
                    self.number = int(rest) - 1
                    return None
                case bound:
                    return self._crashed(bound)
        status = self._process.wait()
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return self._crashed(f"the process ended: {name}")

    def end(self) -> None:
        """Idempotent."""
        self._process.kill()
        self._process.wait()
        os.close(self._pipe)
        self._errors.close()

    def _crashed(self, cause: str) -> Crash:
        self._errors.seek(0)
        said = self._errors.read()[-4000:].decode(errors="replace")
        if not self._case:
            raise RuntimeError(f"fuzz {self.kind}: no case was run: {cause}\n{said}")
        return Crash(self.kind, self.seed, self.number, self._case, f"{cause}\n{said}".rstrip())

    def _bound_memory(self) -> None:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.prlimit(self._process.pid, resource.RLIMIT_AS, (limit, limit))
        assert self._process.stdin is not None
        self._process.stdin.close()  # which it waits for

    def _messages(self) -> Iterator[tuple[str, str]]:
        """(word, rest) of each message, or the bound that was broken as a word of its own; ends with the process."""
        began, spent = time.monotonic(), 0.0
        while True:
            if not select.select([self._pipe], [], [], 0.2)[0]:
                cpu, wall = self._cpu() - spent, time.monotonic() - began
                if self._case and cpu > CPU_SECONDS:
                    yield f"more than {CPU_SECONDS:g} s of processor time", ""
                if wall > (WALL_SECONDS if self._case else START_SECONDS):
                    yield f"no end after {wall:.0f} s", ""
                continue
            data = os.read(self._pipe, 1 << 20)
            if not data:
                return
            *messages, self._buffer = (self._buffer + data).split(b"\0")
            for message in messages:
                word, _, rest = message.decode(errors="replace").partition(" ")
                yield word, rest
            began, spent = time.monotonic(), self._cpu()

    def _cpu(self) -> float:
        """Seconds of processor time that it has taken, all threads."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):  # it has just ended
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
