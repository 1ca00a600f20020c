"""The phases from the start of a process to its first token, with an empty and with a warm cache of Triton.

Each pass is a new process. The weights are random, but are on disk as a checkpoint with a byte tokenizer
(`load_format=dummy` leaves both out). The operating system's cache of files is not cleared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from nanoengine.lab.bench.report import Cell, Report, number
from nanoengine.lab.bench.session import BenchmarkError, Setup

_SLOWEST = 1800  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Passes with one state of Triton's cache.

    Attributes:
        triton_cache: "cold" or "warm". best, median: seconds from the start of the process to its first token.
        each: seconds of all passes. phases: seconds of the best pass, as in `StartReport`, and "first token".
    """

    triton_cache: str
    passes: int
    best: float
    median: float
    each: tuple[float, ...]
    phases: dict[str, float]


def run(setup: Setup, *, cold_passes: int) -> Report:
    """Measures `setup.passes` passes with a warm cache, and `cold_passes` with an empty one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _checkpoint(setup, folder / "model")
        caches = [folder / f"triton-{i}" for i in range(max(1, cold_passes))]
        setup.say("Triton's cache cold: one process at a time")
        cold = [_process(setup, model, cache) for cache in caches]  # the last cache is warm after this
        warm = [_process(setup, model, caches[-1]) for _ in setup.counted("warm")]
    rows = [*([_row("cold", cold)] if cold_passes else []), _row("warm", warm)]
    settings = {**setup.as_dict(), "weights": setup.options.get("load_format", "on disk")}
    return Report(benchmark="startup", settings=settings, rows=rows, columns=_columns(rows))


def _checkpoint(setup: Setup, folder: Path) -> Path:
    config = setup.shape.hf_config(setup.max_model_len)
    if setup.options.get("load_format") == "dummy":
        return setup.shape.write(folder, setup.max_model_len)
    import torch

    from nanoengine.testing.checkpoints import write_checkpoint

    return write_checkpoint(folder, config, std=0.02, dtype=torch.bfloat16, with_tokenizer=True)


def _process(setup: Setup, model: Path, cache: Path) -> tuple[float, dict[str, float]]:
    """Runs one process with this Triton cache. Returns (total seconds, phases)."""
    options = {"max_model_len": setup.max_model_len, **setup.options}
    given = json.dumps({"model": str(model), "attention": setup.attention, "options": options})
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "nanoengine.lab.bench.first_token", given],
        capture_output=True, text=True, env=environment, timeout=_SLOWEST, check=False,
    )  # fmt: skip
    if done.returncode:
        raise BenchmarkError(f"the started process failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    phases: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sum(phases.values()), phases


def _row(state: str, passes: Sequence[tuple[float, dict[str, float]]]) -> Row:
    each = tuple(seconds for seconds, _ in passes)
    best, phases = min(passes, key=lambda one: one[0])
    return Row(
        triton_cache=state,
        passes=len(each),
        best=best,
        median=median(each),
        each=each,
        phases=phases,
    )


def _columns(rows: Sequence[Row]) -> dict[str, Cell]:
    def phase(name: str) -> Cell:
        return lambda row: number(row.phases.get(name), 2)

    names = dict.fromkeys(name for row in rows for name, seconds in row.phases.items() if seconds >= 0.005)
    return {
        "triton cache": lambda row: row.triton_cache,
        "best s": lambda row: number(row.best, 2),
        "median s": lambda row: number(row.median, 2),
        **{name: phase(name) for name in names},
    }
