"""Sweeps: `nanoengine run CONFIG --multirun model=a,b sampler=greedy,top_p` runs every combination, one by one.

Each combination runs in its own process, `nanoengine run` with its resolved configuration. So a crash, an out-of-memory
kill or a broken GPU state affects only one combination, and all start from the same clean state, which measurements
need. The cost is the start of an engine, which a combination with another model or engine option needs anyway.
"""

from __future__ import annotations

import json
import os
import shlex
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
from nanoengine.cli.trace_option import trace_words
from nanoengine.lab.cli.combinations import Combination, combinations
from nanoengine.lab.cli.sweep_report import Outcome, plot, print_table, write_answers, write_csv
from nanoengine.observe.files import user_path
from nanoengine.setup.config.config import RunConfig, load_config
from nanoengine.setup.config.prompts import STDIN, PromptFile, file_format
from nanoengine.setup.plugins.discover import discover

_FORMAT = 1
_NANOENGINE = (sys.executable, "-m", "nanoengine")
SWEEP, _CONFIG, _RESULTS, _LOG = "sweep.json", "config.yaml", "results.jsonl", "run.log"


@dataclass(frozen=True, slots=True)
class Job:
    """A combination and its folder. `error`: why it cannot be composed; "" if it can."""

    folder: Path
    combination: Combination
    error: str = ""

    @property
    def output(self) -> Path:
        return self.folder / _RESULTS


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep. `cwd`: relative paths in the configurations are relative to it. `plugins`: plugin files.

    `command`: the command line that began it.
    """

    folder: Path
    cwd: Path
    plugins: tuple[str, ...]
    jobs: tuple[Job, ...]
    command: str


def sweep(
    config: str,
    overrides: Sequence[str],
    plugins: Sequence[Path],
    *,
    resume: bool,
    options: Sequence[str] = (),
    trace: Path | None = None,
) -> int:
    """Runs a sweep. Returns the exit status: 0, 1 if a combination failed, 130 or 143 if interrupted or terminated.

    `config`: with `resume`, the folder of a sweep. `options`: other options of `nanoengine run`. `trace`: file name for
    the timeline in each combination's folder.

    Raises `NanoEngineError` for an error before anything runs.
    """
    if trace is not None and trace.name != str(trace):
        raise ConfigError(f"--trace {trace}: for a sweep, give a file name such as {trace.name}; each folder gets one")
    if trace is not None:
        user_path(trace, "--trace")
    folder = user_path(config, "configuration")
    if folder.is_dir() and (resume or (folder / SWEEP).exists()):
        if not resume:
            raise ConfigError(f"{config} is the folder of a sweep; to continue it, give --resume {config}")
        if overrides or plugins:
            raise ConfigError("--resume of a sweep takes no overrides and no --plugin: the sweep has its own")
        todo = read_sweep(folder)
        if not todo.cwd.is_dir():
            where = f"{todo.cwd}, where the sweep was started, does not exist any more"
            raise ConfigError(f"--resume: {where}; its relative paths need it")
    elif resume:
        absent = "" if folder.exists() else f"; there is no {config} (looked for {folder.absolute()})"
        raise ConfigError(
            f"--resume of a sweep needs the folder of the sweep: nanoengine run --resume multirun/DATE{absent}"
        )
    else:
        todo = _prepare(config, combinations(overrides), plugins)
    return _run(todo, options, trace)


# -- before the first combination ----------------------------------------------------------------------------------


def _prepare(config: str, wanted: Sequence[Combination], plugins: Sequence[Path]) -> Sweep:
    """Composes all combinations, and writes them to a new folder."""
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
        files = tuple(str(path.absolute()) for path in plugins)
        todo = Sweep(folder, Path.cwd(), files, jobs, shlex.join(["nanoengine", *sys.argv[1:]]))
        write_whole(folder / SWEEP, json.dumps(_as_dict(todo), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the folder of the sweep {folder}: {error.strerror or error}") from error
    return todo


def _write_jobs(
    folder: Path, wanted: Sequence[Combination], composed: Sequence[RunConfig | NanoEngineError]
) -> tuple[Job, ...]:
    """Makes a folder for each combination, with its configuration. Raises `OSError`."""
    jobs: list[Job] = []
    piped: PromptFile | None = None
    for number, (combination, found) in enumerate(zip(wanted, composed, strict=True)):
        place = folder / combination.folder(number)
        place.mkdir()
        if isinstance(found, NanoEngineError):
            jobs.append(Job(place, combination, str(found)))
            write_whole(place / _LOG, f"not composed: {found}\n")
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
            raise ConfigError(f"cannot make the folder of the sweep {folder}: {error}") from error
    raise ConfigError(f"there are too many folders called multirun/{day}")


def _keep_stdin(prompts: PromptFile, folder: Path) -> PromptFile:
    """Saves standard input to a file: it can be read only once, but all combinations and a later --resume need it."""
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
    about = {"cwd": str(todo.cwd), "command": todo.command, "plugins": todo.plugins}
    return {"format": _FORMAT, **about, "jobs": jobs}


def read_sweep(folder: Path) -> Sweep:
    """Reads the sweep in a folder. Raises `ConfigError` if the folder is not that of a sweep."""
    path = folder / SWEEP
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["format"] != _FORMAT:
            raise ValueError("it is of another version of nanoengine")
        jobs = [
            Job(folder / job["folder"], Combination(tuple(job["overrides"]), job["varied"]), job["error"])
            for job in found["jobs"]
        ]
        todo = Sweep(folder, Path(found["cwd"]), tuple(found["plugins"]), tuple(jobs), found.get("command", ""))
    except FileNotFoundError as error:
        raise ConfigError(f"--resume: {folder} has no {SWEEP}, so it is not the folder of a sweep") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return todo


# -- the combinations ------------------------------------------------------------------------------------------------


def _run(todo: Sweep, options: Sequence[str], trace: Path | None) -> int:
    say(f"{len(todo.jobs)} combination{'' if len(todo.jobs) == 1 else 's'}, into {todo.folder}")
    _say_not_composed(todo.jobs)
    outcomes: list[Outcome] = []
    stopped = 0
    for number, job in enumerate(todo.jobs):
        say(_heading(number, job, todo.jobs))
        try:
            status = _outcome(job, todo, [*options, *trace_words(job.folder.absolute() / trace if trace else None)])
        except KeyboardInterrupt as interrupt:
            word, stopped = ending(interrupt)
            outcomes.append(_entry(number, job, word))
            break
        except OSError as error:  # its folder was removed, or the disk is full
            status = f"failed: {error.strerror or error}"
            say(f"  {status}: {error.filename or job.folder}")
        outcomes.append(_entry(number, job, status))
    outcomes += [_entry(n, todo.jobs[n], "not run") for n in range(len(outcomes), len(todo.jobs))]
    reported = _report(outcomes, todo)
    if stopped:
        say(f"continue with: nanoengine run --resume {todo.folder}")
        return stopped
    return FAILED if not reported or any(each.status != "ok" for each in outcomes) else 0


def _say_not_composed(jobs: Sequence[Job]) -> None:
    """Reports combinations that cannot be composed before the first one runs, and not hours later."""
    wrong = [(number, job) for number, job in enumerate(jobs) if job.error]
    if wrong:
        say(f"{len(wrong)} of them cannot be composed, and will not run:")
    for number, job in wrong:
        say(f"  {_heading(number, job, jobs)}: {job.error}")


def _heading(number: int, job: Job, jobs: Sequence[Job]) -> str:
    """ "#0 of 4: engine.seed=1": the number is that of the folder and of the table."""
    label = job.combination.label
    return f"#{number} of {len(jobs)}{': ' if label else ''}{label}"


def _entry(number: int, job: Job, status: str) -> Outcome:
    record = None if job.error else read_record(job.output)
    return Outcome(number, job.combination.varied, status, (record.summary if record else None) or {})


def _outcome(job: Job, todo: Sweep, options: Sequence[str]) -> str:
    """Runs a combination if it has not finished yet. Returns "ok", or what went wrong."""
    if job.error:
        say("  failed: it cannot be composed, see above")
        return "failed: not composed"
    record = read_record(job.output)
    if record is not None and record.summary is not None and record.summary["status"] == 0:
        say("  finished already")
        return "ok"
    status = _in_a_process(job, todo, options)
    last = _last_line(job.folder / _LOG)
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        last, word = f"killed by {name}; last line of its log: {last}", f"failed: {name}"
    else:
        word = "ok" if status == 0 else f"failed: exit {status}"
    say(f"  {last}" if status == 0 else f"  {word}: {last} (see {job.folder / _LOG})")
    return word


def _in_a_process(job: Job, todo: Sweep, options: Sequence[str]) -> int:
    """Runs `nanoengine run` with the job's configuration. Returns the exit status; negative: the number of a signal."""
    command = [*_NANOENGINE, "run", str((job.folder / _CONFIG).absolute()), "--resume", *options]
    command += [f"output={json.dumps(str(job.output.absolute()))}"]
    command += [word for plugin in todo.plugins for word in ("--plugin", plugin)]
    environment = {"TQDM_MININTERVAL": "5", **os.environ}  # the log is not a terminal
    with (job.folder / _LOG).open("ab") as log:
        return run_child(command, environment, todo.cwd, log)


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").replace("\r", "\n").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "its log is empty")


def _report(outcomes: Sequence[Outcome], todo: Sweep) -> bool:
    """Writes and prints the report of the sweep. Returns whether it could be written."""
    written = True
    try:
        write_csv(outcomes, todo.folder / "table.csv")
        labels = [f"#{each.number} {each.label}".replace("\n", " ") for each in outcomes]
        files = [job.output for job in todo.jobs]
        write_answers(list(zip(labels, files, strict=True)), todo.folder / "answers.csv")
        say(f"wrote {todo.folder / 'answers.csv'}: the answers of all combinations side by side")
        plot(outcomes, todo.folder / "plot.png")
        say(f"wrote {todo.folder / 'table.csv'} and {todo.folder / 'plot.png'}")
        say(f"for a page of all of it, type: nanoengine report {shlex.quote(str(todo.folder))}")
    except ImportError as error:
        say(f"wrote {todo.folder / 'table.csv'}; no plot: {error}. pip install 'nanoengine[plot]' brings matplotlib")
    except ValueError as error:
        say(f"wrote {todo.folder / 'table.csv'}; no plot: {error}")
    except OSError as error:
        say(f"cannot write the report of the sweep: {error}")
        written = False
    print_table(outcomes)  # last, because standard output may have no reader any more
    return written
