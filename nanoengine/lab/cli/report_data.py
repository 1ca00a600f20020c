"""The data of a report: result rows, their record, and the trace of the run, if there is one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanoengine.api.errors import ConfigError
from nanoengine.cli.record import Record, read_record
from nanoengine.lab.cli.multirun import SWEEP, read_sweep
from nanoengine.lab.cli.sweep_report import Outcome
from nanoengine.observe.trace import FORMAT

Floats = npt.NDArray[np.float64]
_RECORD = ".run.json"
_ROW_KEYS = {"index", "prompt", "prompt_token_ids", "outputs", "num_cached_tokens", "metrics", "error"}


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a trace, in order. `steps[name]` is float64 [steps]:

        start, end: of the device's work, seconds since the trace began. schedule, launch, wait, commit: seconds.
        decode_rows, prefill_rows, prefill_tokens, new_tokens, running, waiting: counts per step.
        total, used, shared, cached: KV blocks.

    Attributes:
        about: the metadata of the trace. whole: False if its process was killed or the disk was full.
        preempted: (seconds, request, reason) of each preemption.
    """

    about: Mapping[str, Any]
    whole: bool
    arrays: Mapping[str, Floats]
    preempted: Sequence[tuple[float, str, str]]

    def __getitem__(self, name: str) -> Floats:
        return self.arrays[name]

    def __len__(self) -> int:
        return len(self.arrays["start"])


@dataclass(frozen=True, slots=True)
class RunData:
    """The data of one run.

    Attributes:
        rows: in the order of their indices. torn: number of incomplete lines, as after a crash of the machine.
        error: why the configuration could not be composed; "" if it could. sweep_command: the sweep's command line.
    """

    outcome: Outcome
    path: Path
    rows: Sequence[Mapping[str, Any]]
    torn: int
    record: Record | None
    steps: Steps | None
    error: str = ""
    sweep_command: str = ""

    @property
    def failed(self) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if row["error"] is not None]

    def metric(self, name: str) -> Floats:
        """Milliseconds of "queued", "ttft", "itl" or "latency", for the rows that have it."""
        found = [row["metrics"][name] for row in self.rows if row["error"] is None]
        return 1000 * np.array([value for value in found if value is not None], dtype=float)


def read_all(path: Path, trace: Path | None) -> list[RunData]:
    """Reads a results file, a folder of results, or the folder of a sweep.

    `trace`: that of a single run; default: the one in its record. Raises `ConfigError` if there are no results, or if
    they cannot be read.
    """
    if path.is_dir() and (path / SWEEP).exists():
        return _of_sweep(path, trace)
    if path.is_dir():
        records = sorted(path.glob(f"*{_RECORD}"))
        found = [each.with_name(each.name.removesuffix(_RECORD)) for each in records]
        if not found:
            sweeps = sorted((str(each.parent) for each in path.glob(f"*/{SWEEP}")), reverse=True)
            if sweeps:
                raise ConfigError(f"{path} has sweeps; give one of them, the newest first: {', '.join(sweeps[:8])}")
            what = f"{path} has no results: no results.jsonl with its results.jsonl{_RECORD}, and no {SWEEP}"
            raise ConfigError(f"{what}; give the results file")
    elif path.is_file():
        found = [path]
    else:
        raise ConfigError(f"there is no {path}: give a results file, or a folder with one")
    if trace is not None and len(found) > 1:
        raise ConfigError(f"--trace belongs to one run, and {path} has {len(found)}: give its results file")
    return [_run(number, file, {"results": file.name}, trace) for number, file in enumerate(found)]


def _of_sweep(folder: Path, trace: Path | None) -> list[RunData]:
    if trace is not None:
        raise ConfigError(f"--trace belongs to one run, and {folder} is a sweep; leave it out: the traces are found")
    sweep = read_sweep(folder)
    return [
        _run(number, job.output, job.combination.varied, None, job.error, sweep.command)
        for number, job in enumerate(sweep.jobs)
    ]


def _run(
    number: int, path: Path, varied: Mapping[str, str], trace: Path | None, error: str = "", command: str = ""
) -> RunData:
    record = read_record(path)
    rows, torn = _rows(path) if path.exists() else ([], 0)
    summary = (record.summary if record else None) or {}
    status = "not composed" if error else _status(record, bool(rows))
    found = trace or _recorded_trace(path, summary)
    steps = None if found is None else read_steps(found)
    return RunData(Outcome(number, varied, status, summary), path, rows, torn, record, steps, error, command)


def _status(record: Record | None, any_rows: bool) -> str:
    if record is None:
        return "no record" if any_rows else "not run"
    if record.summary is None:
        return "did not end"
    status = record.summary["status"]
    return "ok" if status == 0 else f"exit {status}"


def _recorded_trace(path: Path, summary: Mapping[str, Any]) -> Path | None:
    """The trace that the run wrote, also if it was moved together with the results.

    None if it does not exist any more, or if it is empty because the disk was full.
    """
    if "trace" not in summary:
        return None
    written = Path(summary["trace"])
    places = (written, path.parent / written.name)
    return next((each for each in places if each.is_file() and each.stat().st_size), None)


def _rows(path: Path) -> tuple[list[Mapping[str, Any]], int]:
    """The rows in the order of their indices, and the number of incomplete lines."""
    rows: dict[int, Mapping[str, Any]] = {}
    torn = 0
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
        except ValueError:
            torn += 1
            continue
        if not isinstance(row, dict) or not row.keys() >= _ROW_KEYS:
            raise ConfigError(f"{path}, line {number}: this is not a row of `nanoengine run`")
        rows[row["index"]] = row
    if torn and not rows:
        raise ConfigError(f"{path} has no row of `nanoengine run`; give a trace by --trace, in addition to its results")
    return [rows[index] for index in sorted(rows)], torn


def read_steps(path: Path) -> Steps:
    """Reads the steps of a trace, which may be incomplete. Raises `ConfigError` if the file is not a trace."""
    about, steps, whole = None, [], False
    for line in _lines(path):
        text = line.rstrip(",")
        whole = text == "]"
        if '"cat":"step"' not in text and '"name":"trace"' not in text:
            continue
        try:
            event = json.loads(text)
        except ValueError:
            break  # the last line is incomplete
        if event["name"] == "trace":
            about = event["args"]
        else:
            steps.append(event)
    if about is None:
        raise ConfigError(f"{path} is not a trace of `nanoengine run --trace`")
    if about["format"] != FORMAT:
        raise ConfigError(f"{path} is a trace of another version of nanoengine")
    return Steps(about, whole, _arrays(steps), list(_preempted(steps)))


def _arrays(steps: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    args = [step["args"] for step in steps]
    columns: dict[str, list[float]] = {
        "start": [step["ts"] / 1e6 for step in steps],
        "end": [(step["ts"] + step["dur"]) / 1e6 for step in steps],
    }
    for name in ("decode_rows", "prefill_rows", "prefill_tokens", "new_tokens", "running", "waiting"):
        columns[name] = [each[name] for each in args]
    for name in ("total", "used", "shared", "cached"):
        columns[name] = [each["blocks"][name] for each in args]
    for name in ("schedule", "launch", "wait", "commit"):
        columns[name] = [each["seconds"][name] for each in args]
    return {name: np.array(values, dtype=float) for name, values in columns.items()}


def _preempted(steps: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, str, str]]:
    for step in steps:
        for lost in step["args"]["preempted"]:
            yield step["ts"] / 1e6, lost["request"], lost["why"]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
