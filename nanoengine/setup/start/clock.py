"""How long a start took, phase by phase. Imports no torch: importing that is a phase."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PHASES = ("process", "import", "plugins", "model source", "choice", "tokenizer", "device", "weights", "buffers",
          "profile", "kv cache", "capture", "workers", "engine")  # fmt: skip
"""Every phase there may be, in order."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a start. `name`: of `PHASES`. `seconds`: of wall clock."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StartReport:
    """The phases of an engine's start, in order; together they are all of the time that was measured.

    process: from the operating system's start of the process to the first line that asks for the engine (interpreter,
    configuration). import: torch and the engine's own modules. plugins: discovery. model source: finding the model, or
    fetching and converting it. choice: reading its config and choosing the parts. tokenizer: loading it. device: the
    GPU's context. weights: model and weights. buffers: attention backends, slot tables, logits processors. profile: the
    largest step, for its memory; compiles kernels. kv cache: allocating it. capture: CUDA graphs; compiles the rest.
    workers: starting processes, where ranks have their own. engine: scheduler, outputs, defaults.

    `process` and `import` are there where the caller measured them, as `nanoengine run` does.
    """

    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def of(self, name: str) -> float:
        """Seconds of a phase; 0 where it did not happen."""
        return sum(phase.seconds for phase in self.phases if phase.name == name)

    def as_dict(self) -> dict[str, float]:
        return {phase.name: phase.seconds for phase in self.phases}

    def line(self) -> str:
        """For people: "ready in 4.1 s (import 1.8, weights 0.9, capture 1.1)"; phases under 50 ms are left out."""
        shown = [f"{phase.name} {phase.seconds:.1f}" for phase in self.phases if phase.seconds >= 0.05]
        return f"ready in {self.seconds:.1f} s" + (f" ({', '.join(shown)})" if shown else "")

    def table(self) -> str:
        """Each phase on a line of its own."""
        rows = [*((phase.name, phase.seconds) for phase in self.phases), ("in all", self.seconds)]
        return "\n".join(f"{name:<13}{seconds:8.3f} s" for name, seconds in rows)


class StartClock:
    """Measures phases: `lap(name)` gives a phase all the time since the lap before."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @classmethod
    def of_process(cls) -> StartClock:
        """One whose first lap is "process": from the start of this process to this call."""
        clock = cls()
        clock.add(Phase("process", process_seconds()))
        return clock

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.add(Phase(name, now - self._since))
        self._since = now

    def add(self, *phases: Phase) -> None:
        """What was measured elsewhere."""
        for phase in phases:
            assert phase.name in PHASES, phase.name
            self._seconds[phase.name] = self._seconds.get(phase.name, 0.0) + phase.seconds

    def lap_around(self, name: str, within: Sequence[Phase]) -> None:
        """A lap that phases measured elsewhere were a part of: they are added, and `name` gets what they leave."""
        now = time.perf_counter()
        rest = now - self._since - sum(phase.seconds for phase in within)
        self.add(*within, Phase(name, max(0.0, rest)))
        self._since = now

    def report(self) -> StartReport:
        return StartReport(tuple(Phase(name, self._seconds[name]) for name in PHASES if name in self._seconds))


@contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection inside, and what is alive at the end is never looked at again.

    Importing torch and building an engine makes half a million objects that stay: each full collection meanwhile takes
    50 ms or more, and each one later that much again, between two steps. For programs of ours; a library's caller
    decides by itself.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def process_seconds() -> float:
    """Since the operating system started this process, to 10 ms; where that is not told, since its first CPU second
    (which leaves out what it waited)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, in ticks since boot; see proc(5)
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()
