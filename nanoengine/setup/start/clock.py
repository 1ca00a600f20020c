"""Measures the phases of a start. Imports no torch, because importing torch is one of the phases."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PHASES = ("process", "import", "plugins", "model source", "choice", "tokenizer", "device", "weights", "buffers",
          "profile", "kv cache", "capture", "workers", "engine")  # fmt: skip
"""All phases, in order."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a start. `name`: one of `PHASES`. `seconds`: wall-clock time."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Quantised:
    """Layers that store their weights in fewer bits.

    Attributes:
        label: how, as their method says; "": plainly.
        layers: how many. num_bytes: of their parameters, on one rank.
    """

    label: str
    layers: int
    num_bytes: int

    def line(self) -> str:
        """A summary: "fp8, blocks of 128: 112 layers, 381 MB"."""
        layers = f"{self.layers:,} layer{'' if self.layers == 1 else 's'}"
        return f"{self.label or 'plain weights'}: {layers}, {shown_bytes(self.num_bytes)}"


@dataclass(frozen=True, slots=True)
class Dequantised:
    """Quantised tensors of a checkpoint that became plain ones while they were loaded.

    Attributes:
        method: `quant_method` of config.json. tensors: how many.
        stored, made: their bytes in the files, and in the model's dtype; of all ranks together.
    """

    method: str
    tensors: int
    stored: int
    made: int

    @classmethod
    def of(cls, method: str, each: Sequence[tuple[int, int]]) -> Dequantised:
        """`each`: (stored, made) of a tensor."""
        return cls(method, len(each), sum(stored for stored, _ in each), sum(made for _, made in each))

    def line(self) -> str:
        """A summary: "48 mxfp4 tensors dequantised, 11,860 MB in the files, 38,221 MB in the model"."""
        before, after = shown_bytes(self.stored), shown_bytes(self.made)
        return f"{self.tensors} {self.method} tensors dequantised, {before} in the files, {after} in the model"


@dataclass(frozen=True, slots=True)
class StartReport:
    """The phases of an engine's start, in order. Together they are the whole time of the start.

    process: from the start of the process by the operating system to the first line that needs the engine (interpreter,
    configuration). import: torch and the engine's own modules. plugins: discovery. model source: finding the model, or
    downloading and converting it. choice: reading its config and choosing the parts. tokenizer: loading it. device:
    making the GPU's context. weights: making the model and loading weights. buffers: attention backends, slot tables,
    logits processors. profile: measuring the memory of the largest step; compiles kernels. kv cache: allocating it.
    capture: CUDA graphs; compiles the other kernels. workers: starting the processes of ranks. engine: scheduler,
    outputs, defaults.

    `process` and `import` are included only if the caller measured them, as `nanoengine run` does.

    dequantised: what was quantised in the checkpoint and became plain; None: nothing. quantised: what layers store in
    fewer bits.
    """

    phases: tuple[Phase, ...]
    dequantised: Dequantised | None = None
    quantised: tuple[Quantised, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def of(self, name: str) -> float:
        """Seconds of a phase; 0 if the start did not have it."""
        return sum(phase.seconds for phase in self.phases if phase.name == name)

    def as_dict(self) -> dict[str, float]:
        return {phase.name: phase.seconds for phase in self.phases}

    def line(self) -> str:
        """A summary: "ready in 4.1 s (import 1.8, weights 0.9, capture 1.1)". Phases under 50 ms are left out."""
        shown = [f"{phase.name} {phase.seconds:.1f}" for phase in self.phases if phase.seconds >= 0.05]
        more = "".join(f"; {line}" for line in self._weights())
        return f"ready in {self.seconds:.1f} s" + (f" ({', '.join(shown)})" if shown else "") + more

    def table(self) -> str:
        """One line for each phase, one for the total, and one for each kind of quantised weights."""
        rows = [*((phase.name, phase.seconds) for phase in self.phases), ("total", self.seconds)]
        return "\n".join([*(f"{name:<13}{seconds:8.3f} s" for name, seconds in rows), *self._weights()])

    def _weights(self) -> list[str]:
        return [
            *([] if self.dequantised is None else [self.dequantised.line()]),
            *(each.line() for each in self.quantised),
        ]


def shown_bytes(size: int) -> str:
    return f"{size / 1e6:,.{1 if size < 1e7 else 0}f} MB"


class StartClock:
    """Measures phases: `lap(name)` ends a phase, which lasted from the previous lap until now."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @classmethod
    def of_process(cls) -> StartClock:
        """A clock whose first phase is "process": from the start of this process until now."""
        clock = cls()
        clock.add(Phase("process", process_seconds()))
        return clock

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.add(Phase(name, now - self._since))
        self._since = now

    def add(self, *phases: Phase) -> None:
        """Adds phases that were measured elsewhere."""
        for phase in phases:
            assert phase.name in PHASES, phase.name
            self._seconds[phase.name] = self._seconds.get(phase.name, 0.0) + phase.seconds

    def lap_around(self, name: str, within: Sequence[Phase]) -> None:
        """A lap that includes phases which were measured elsewhere. `name` gets the rest of the time."""
        now = time.perf_counter()
        rest = now - self._since - sum(phase.seconds for phase in within)
        self.add(*within, Phase(name, max(0.0, rest)))
        self._since = now

    def report(self, dequantised: Dequantised | None = None, quantised: tuple[Quantised, ...] = ()) -> StartReport:
        phases = tuple(Phase(name, self._seconds[name]) for name in PHASES if name in self._seconds)
        return StartReport(phases, dequantised, quantised)


def process_seconds() -> float:
    """Seconds since the operating system started this process, to 10 ms.

    If the system does not report that, the CPU time of the process, which does not include waiting.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, in ticks since boot; see proc(5)
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()
