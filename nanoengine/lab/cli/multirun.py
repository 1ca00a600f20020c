"""Sweeps: `nanoengine run CONFIG --multirun model=a,b sampler=greedy,top_p` runs every combination, one by one.

Each combination is a process of its own, `nanoengine run` on its resolved configuration: one that crashes, is killed
for its memory, or leaves a GPU in disorder loses nothing but itself, and each starts from the same clean state, which
measurements need. The price is the start of an engine, which a combination with another model or engine option pays
anyway.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from nanoengine.api.errors import ConfigError, NanoEngineError
from nanoengine.cli.common import FAILED, ending, say
from nanoengine.cli.config import render
from nanoengine.cli.parent import run_child
from nanoengine.cli.record import read_record, write_whole
from nanoengine.lab.cli.combinations import Combination, combinations
from nanoengine.lab.cli.sweep_report import Outcome, plot, print_table, write_csv
from nanoengine.observe.files import user_path
from nanoengine.setup.config.config import RunConfig, load_config
from nanoengine.setup.config.prompts import STDIN, PromptFile, file_format
from nanoengine.setup.plugins.discover import discover

_FORMAT = 1
_NANOENGINE = (sys.executable, "-m", "nanoengine")
SWEEP, _CONFIG, _RESULTS, _LOG = "sweep.json", "config.yaml", "results.jsonl", "run.log"


@dataclass(frozen=True, slots=True)
class Job:
    """A combination and its folder. `error`: why it cannot even be composed; "" if it can."""

    folder: Path
    combination: Combination
    error: str = ""

    @property
    def output(self) -> Path:
        return self.folder / _RESULTS


@dataclass(frozen=True, slots=True)
class Sweep:
    """`cwd`: what relative paths in the configurations start from. `plugins`: plugin files."""

    folder: Path
    cwd: Path
    plugins: tuple[str, ...]
    jobs: tuple[Job, ...]


def sweep(
    config: str,
    overrides: Sequence[str],
    plugins: Sequence[Path],
    *,
    resume: bool,
    options: Sequence[str] = (),
    trace: Path | None = None,
) -> int:
    """The exit status: 0, 1 if a combination failed, 130 or 143 when interrupted or terminated.

    `config`: with `resume`, the folder of a sweep. `options`: further ones of `nanoengine run`. `trace`: name of the
    file in each combination's folder that gets its timeline.

    Raises `NanoEngineError` for what stops it before anything runs.
    """
    if trace is not None and trace.name != str(trace):
        raise ConfigError(f"--trace {trace}: of a sweep it is a name such as {trace.name}, for each folder to get one")
    if trace is not None:
        user_path(trace, "--trace")
    folder = user_path(config, "configuration")
    if folder.is_dir() and (resume or (folder / SWEEP).exists()):
        if not resume:
            raise ConfigError(f"{config} is a sweep's folder; to go on with it, give --resume {config}")
        if overrides or plugins:
            raise ConfigError("--resume of a sweep takes no overrides and no --plugin: the sweep has its own")
        todo = read_sweep(folder)
        if not todo.cwd.is_dir():
            where = f"{todo.cwd}, where the sweep was started, is no more"
            raise ConfigError(f"--resume: {where}; its relative paths need it")
    elif resume:
        absent = "" if folder.exists() else f"; there is no {config} (looked for {folder.absolute()})"
        raise ConfigError(
            f"--resume of a sweep takes the sweep's folder: nanoengine run --resume multirun/DATE{absent}"
        )
    else:
        todo = _prepare(config, combinations(overrides), plugins)
    return _run(todo, options, trace)


# -- before the first combination ----------------------------------------------------------------------------------


def _prepare(config: str, wanted: Sequence[Combination], plugins: Sequence[Path]) -> Sweep:
    """Composes every combination, and writes them into a new folder."""
    registry = discover(plugins)
    composed: list[RunConfig | NanoEngineError] = []
    for combination in wanted:
        try:
            composed.append(load_config(config, combination.overrides, registry=registry))
        except NanoEngineError as error:
            composed.append(error)
    errors = [each for each in composed if isinstance(each, NanoEngineError)]
    if len(errors) == len(composed):
        raise errors[0]
    folder = _new_folder()
    try:
        jobs = _write_jobs(folder, wanted, composed)
        todo = Sweep(folder, Path.cwd(), tuple(str(path.absolute()) for path in plugins), jobs)
        write_whole(folder / SWEEP, json.dumps(_as_dict(todo), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the sweep's folder {folder}: {error.strerror or error}") from error
    return todo


def _write_jobs(
    folder: Path, wanted: Sequence[Combination], composed: Sequence[RunConfig | NanoEngineError]
) -> tuple[Job, ...]:
    """A folder for each combination, with its configuration. Raises `OSError`."""
    jobs: list[Job] = []
    piped: PromptFile | None = None
    for number, (combination, found) in enumerate(zip(wanted, composed, strict=True)):
        place = folder / combination.folder(number)
        place.mkdir()
        if isinstance(found, NanoEngineError):
            jobs.append(Job(place, combination, str(found)))
            continue
        if isinstance(found.prompts, PromptFile) and found.prompts.file == STDIN:
            piped = piped or _keep_stdin(found.prompts, folder)
            found = replace(found, prompts=piped)
        write_whole(place / _CONFIG, render(replace(found, output=str(place / _RESULTS))))
        jobs.append(Job(place, combination))
    return tuple(jobs)


def _new_folder() -> Path:
    day = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"_{n}" for n in range(2, 1000))):
        folder = Path("multirun") / f"{day}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot make the sweep's folder {folder}: {error}") from error
    raise ConfigError(f"there are too many folders called multirun/{day}")


def _keep_stdin(prompts: PromptFile, folder: Path) -> PromptFile:
    """Standard input can be read once, but every combination wants it, and so does a later --resume."""
    path = folder / f"prompts.{file_format(prompts)}"
    path.write_bytes(sys.stdin.buffer.read())
    return replace(prompts, file=str(path), format=file_format(prompts))


def _as_dict(todo: Sweep) -> dict[str, Any]:
    jobs = [
        {
            "folder": job.folder.name,
            "overrides": job.combination.overrides,
            "varied": job.combination.varied,
            "error": job.error,
        }
        for job in todo.jobs
    ]
    return {"format": _FORMAT, "cwd": str(todo.cwd), "plugins": todo.plugins, "jobs": jobs}


def read_sweep(folder: Path) -> Sweep:
    """Raises `ConfigError` where the folder is no sweep's."""
    path = folder / SWEEP
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["format"] != _FORMAT:
            raise ValueError("it is of another version of nanoengine")
        jobs = [
            Job(folder / job["folder"], Combination(tuple(job["overrides"]), job["varied"]), job["error"])
            for job in found["jobs"]
        ]
        todo = Sweep(folder, Path(found["cwd"]), tuple(found["plugins"]), tuple(jobs))
    except FileNotFoundError as error:
        raise ConfigError(f"--resume: {folder} holds no {SWEEP}, so it is no sweep's folder") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return todo


# -- the combinations ------------------------------------------------------------------------------------------------


def _run(todo: Sweep, options: Sequence[str], trace: Path | None) -> int:
    say(f"{len(todo.jobs)} combinations, into {todo.folder}")
    _say_not_composed(todo.jobs)
    outcomes: list[Outcome] = []
    stopped = 0
    for number, job in enumerate(todo.jobs):
        say(f"[{number + 1}/{len(todo.jobs)}] {job.combination.label}")
        try:
            status = _outcome(
                job, todo, [*options, *(["--trace", str(job.folder.absolute() / trace)] if trace else [])]
            )
        except KeyboardInterrupt as interrupt:
            word, stopped = ending(interrupt)
            outcomes.append(_entry(number, job, word))
            break
        except OSError as error:  # its folder has gone, the disk is full
            status = f"failed: {error.strerror or error}"
            say(f"  {status}: {error.filename or job.folder}")
        outcomes.append(_entry(number, job, status))
    outcomes += [_entry(n, todo.jobs[n], "not run") for n in range(len(outcomes), len(todo.jobs))]
    reported = _report(outcomes, todo)
    if stopped:
        say(f"go on with: nanoengine run --resume {todo.folder}")
        return stopped
    return FAILED if not reported or any(each.status != "ok" for each in outcomes) else 0


def _say_not_composed(jobs: Sequence[Job]) -> None:
    """At once: whoever mistyped a value should not learn of it hours later, when its turn comes."""
    wrong = [(number, job) for number, job in enumerate(jobs, 1) if job.error]
    if wrong:
        say(f"{len(wrong)} of them cannot be composed, and will not run:")
    for number, job in wrong:
        say(f"  [{number}/{len(jobs)}] {job.combination.label}: {job.error}")


def _entry(number: int, job: Job, status: str) -> Outcome:
    record = None if job.error else read_record(job.output)
    return Outcome(number, job.combination.varied, status, (record.summary if record else None) or {})


def _outcome(job: Job, todo: Sweep, options: Sequence[str]) -> str:
    """Runs a combination, unless it has run; "ok", or what went wrong."""
    if job.error:
        say("  failed: it cannot be composed, see above")
        return "failed: not composed"
    record = read_record(job.output)
    if record is not None and record.summary is not None and record.summary["status"] == 0:
        say("  finished before")
        return "ok"
    status = _in_a_process(job, todo, options)
    last = _last_line(job.folder / _LOG)
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        last, word = f"killed by {name}; its last words: {last}", f"failed: {name}"
    else:
        word = "ok" if status == 0 else f"failed: exit {status}"
    say(f"  {last}" if status == 0 else f"  {word}: {last} (see {job.folder / _LOG})")
    return word


def _in_a_process(job: Job, todo: Sweep, options: Sequence[str]) -> int:
    """Exit status of `nanoengine run` on the job's configuration; a negative one is a signal's number."""
    command = [*_NANOENGINE, "run", str((job.folder / _CONFIG).absolute()), "--resume", *options]
    command += [f"output={json.dumps(str(job.output.absolute()))}"]
    command += [word for plugin in todo.plugins for word in ("--plugin", plugin)]
    environment = {"TQDM_MININTERVAL": "5", **os.environ}  # the log is no terminal
    with (job.folder / _LOG).open("ab") as log:
        return run_child(command, environment, todo.cwd, log)


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").replace("\r", "\n").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def _report(outcomes: Sequence[Outcome], todo: Sweep) -> bool:
    """Whether it could be written."""
    written = True
    try:
        write_csv(outcomes, todo.folder / "table.csv")
        plot(outcomes, todo.folder / "plot.png")
        say(f"wrote {todo.folder / 'table.csv'} and {todo.folder / 'plot.png'}")
    except ImportError as error:
        say(f"wrote {todo.folder / 'table.csv'}; no plot: {error}. pip install 'nanoengine[plot]' brings matplotlib")
    except ValueError as error:
        say(f"wrote {todo.folder / 'table.csv'}; no plot: {error}")
    except OSError as error:
        say(f"cannot write the report of the sweep: {error}")
        written = False
    print_table(outcomes)  # last: standard output may have no reader any more
    return written
