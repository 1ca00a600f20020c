"""The results of a run: JSONL rows, written when prompts finish."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from nanoengine.api.errors import ConfigError
from nanoengine.api.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanoengine.cli.common import ResultsLost
from nanoengine.cli.record import Record, record_path
from nanoengine.observe.files import GrowingFile, lock, part_of, place_of
from nanoengine.setup.config.prompts import PromptRow

KEYS = (
    "index", "hash", "request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "num_cached_tokens",
    "metrics", "error",
)  # fmt: skip
"""The keys of a row. Other keys in a row were copied from its prompt."""

_LOWEST = -9999.0  # instead of -infinity, which JSON does not have; vLLM's server does the same


def result_row(index: int, row: PromptRow, hashed: str, output: RequestOutput) -> dict[str, Any]:
    """The row of a finished prompt as JSON values, with the other fields of the prompt. The ids are those that ran.

    `hashed`: the `prompt_hash` of prompt and parameters. There are log-probs if the parameters request them.
    """
    found: dict[str, Any] = {
        "index": index,
        "hash": hashed,
        "request_id": output.request_id,
        "prompt": row.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "outputs": [_sample(sample) for sample in output.outputs],
        "num_cached_tokens": output.num_cached_tokens,
        "metrics": _metrics(output.metrics),
        "error": None if output.error is None else {"code": output.error.code, "message": str(output.error)},
    }
    if output.prompt_logprobs is not None:
        found["prompt_logprobs"] = [None if each is None else _logprobs(each) for each in output.prompt_logprobs]
    return {**found, **row.fields}


def _sample(sample: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
    }
    if sample.logprobs is not None:
        found["cumulative_logprob"] = _number(sample.cumulative_logprob)
        found["logprobs"] = [None if each is None else _logprobs(each) for each in sample.logprobs]
    return found


def _logprobs(position: Mapping[int, Logprob]) -> dict[str, Any]:
    """Log-probs in vLLM's shape: token id (a string, as all keys in JSON) -> logprob, rank, decoded_token."""
    return {
        str(token): {"logprob": _number(each.logprob), "rank": each.rank, "decoded_token": each.decoded_token}
        for token, each in position.items()
    }


def _number(value: float | None) -> float | None:
    return None if value is None else max(value, _LOWEST)


def _metrics(metrics: RequestMetrics) -> dict[str, Any]:
    """The metrics in seconds since the request was added, because times of the clock have no meaning elsewhere."""

    def since(moment: float | None) -> float | None:
        return None if moment is None else moment - metrics.arrival

    return {
        "queued": since(metrics.first_scheduled),
        "ttft": metrics.ttft,
        "itl": metrics.itl,
        "latency": since(metrics.finished),
        "num_generated": metrics.num_generated,
    }


class ResultsFile:
    """A JSONL file of result rows. Each row is on disk before the next prompt finishes. Without a path: no file.

    The file begins empty, or with the rows to `keep` of an earlier run. The old file and its record stay until a prompt
    is answered. No other process can write the file in that time.

    Attributes:
        rows: number of complete rows in it.

    Raises `ConfigError` if it cannot be opened; `ResultsLost` if a row cannot be written, or the file cannot be closed
    or does not exist any more. Complete rows are kept.
    """

    def __init__(self, path: str | None, keep: Sequence[bytes] = (), record: Record | None = None) -> None:
        """`record`: saved next to the rows, from the first row on."""
        self._path, self._record = path, record
        self.rows = len(keep)
        self._file = None if path is None else _opened(path, b"".join(keep))
        if self.settled:
            self.keep_record(record)

    @property
    def settled(self) -> bool:
        """Whether the file has the rows of this run; False as long as it has those of an earlier run."""
        return self._file is None or self._file.settled

    def keep_record(self, record: Record | None) -> None:
        """Saves the record if the file has settled. A device or pipe has no record. Raises `ResultsLost`."""
        self._record = record
        if self._path is None or self._file is None or record is None or not (self._file.regular and self.settled):
            return
        try:
            record.save(self._path)
        except OSError as error:
            raise self.lost(error, str(record_path(self._path))) from error

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        # Half a surrogate pair cannot be encoded in UTF-8, so it is written as JSON's escape.
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            self._file.write(data)
            self.rows += 1
            self._file.check()
        except OSError as error:
            raise self.lost(error) from error
        if row["error"] is None:
            self.settle()

    def settle(self) -> None:
        """Replaces the rows and the record of an earlier run. Raises `ResultsLost`."""
        if self._path is None or self._file is None or self._file.settled:
            return
        try:
            # Rows must never be next to another run's record, even if the process dies: `--resume` would keep them.
            if self._record is not None:
                record_path(self._path).unlink(missing_ok=True)
            self._file.settle()
        except OSError as error:
            raise self.lost(error) from error
        self.keep_record(self._record)

    def lost(self, error: OSError, what: str | None = None) -> ResultsLost:
        """The error if results cannot be written any more. `what`: what could not be written; default: this file."""
        place = "there" if what is None else f"in {self._path}"
        kept = "" if self._path is None else f"; rows kept {place}: {self.rows}"
        if not self.settled:
            kept = f"; {self._path} has the rows of the earlier run"
        return ResultsLost(f"cannot write {what or f'output {self._path}'}: {error.strerror or error}{kept}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except ResultsLost:
            if error is None:  # else the error that ended the run is more useful
                raise

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as failed:
            raise self.lost(failed) from failed


def _opened(path: str, keep: bytes) -> GrowingFile:
    try:
        Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
        return GrowingFile(path, keep)
    except OSError as error:
        raise ConfigError(f"cannot write output {path}: {error.strerror or error}") from error


def check_output(path: str | None, inputs: Mapping[str, str | Path] = MappingProxyType({})) -> bool:
    """Whether the file exists already. `inputs`: files that the run reads, by their description for messages.

    Called before a model is loaded. Raises `ConfigError` if the file cannot be written, or is one of the inputs.
    """
    if path is None:
        return False
    if path == "-":
        raise ConfigError("output '-' is not a file: answers are always printed; give a file, or leave output out")
    try:
        there = check_writable(Path(path).expanduser())
        check_names(Path(path).expanduser(), record_path(path))
        check_unlocked(Path(path).expanduser())
    except (OSError, ValueError, RuntimeError) as error:  # an invalid name; a user without a home folder
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"cannot write output {path}: {why}") from error
    for what, source in inputs.items():
        file = Path(source).expanduser()
        if there and file.exists() and file.samefile(Path(path).expanduser()):
            raise ConfigError(f"output {path} is {what}, which it would overwrite; give another output=")
    if Path(path).suffix.lower() in (".csv", ".tsv", ".txt", ".yaml", ".yml"):
        raise ConfigError(f"output {path}: results are JSON lines; give a name such as {Path(path).stem}.jsonl")
    return there


def check_replaceable(path: str) -> None:
    """Raises `ConfigError` if the file has something else than results. Pipes and devices have no content."""
    target = Path(path).expanduser()
    if not target.is_file():
        return
    try:
        with target.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
    except OSError as error:
        raise ConfigError(f"cannot read output {path}, which exists already: {error.strerror or error}") from error
    if first and not first.startswith(b'{"index":'):
        raise ConfigError(f"output {path} exists and has no results of a run; give another output=, or delete it")


def check_writable(target: Path) -> bool:
    """Whether `target` exists. Raises `OSError` that says why it cannot be written or replaced."""
    there, above = target.exists(), next(each for each in target.absolute().parents if each.exists())
    if target.is_dir():
        raise IsADirectoryError(f"{target} is not a file")
    if target.is_socket():
        raise OSError(f"{target} is a socket, which cannot be opened; give a file or a pipe")
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is not a folder")
    if there and not os.access(target, os.W_OK):
        raise PermissionError("no permission to write it")
    folder = Path(os.path.realpath(target)).parent if there else above
    if (not there or target.is_file()) and not os.access(folder, os.W_OK):  # a new file replaces the old one
        raise PermissionError(f"no permission to write in {folder}")
    if not there:  # permissions do not say it of /proc, or of a file system that is mounted read-only
        with tempfile.TemporaryFile(dir=folder):
            pass
    return there


def check_names(target: Path, *beside: Path) -> None:
    """Raises `OSError` or `ValueError` if `target`, or a file next to it (`beside`), cannot be the name of a file.

    The names of their temporary files are checked too. There is no file next to a pipe or a device.
    """
    place = place_of(target)
    if place.exists() and not place.is_file():
        return
    above = next(folder for folder in place.parents if folder.exists())  # the other folders will be made
    names = [each for path in (place, *beside) for each in (path, part_of(path))]
    for each in (target, *names, *(above / name.name for name in names)):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(each)


def check_unlocked(target: Path) -> None:
    """Raises `OSError` if another process is writing the file. Called before a model is loaded."""
    if target.is_file():
        with FileIO(target, "a") as file:
            lock(file)
