"""The results of a run: JSONL rows, written as prompts finish."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from nanoengine.api.errors import ConfigError
from nanoengine.cli.common import ResultsLost
from nanoengine.cli.record import Record, record_path
from nanoengine.core.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanoengine.observe.files import GrowingFile, lock, part_of, place_of
from nanoengine.setup.config.prompts import PromptRow

KEYS = (
    "index", "hash", "request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "num_cached_tokens",
    "metrics", "error",
)  # fmt: skip
"""Of a row; what else is in one came with its prompt."""

_LOWEST = -9999.0  # JSON has no infinity; vLLM's server writes this number too


def result_row(index: int, row: PromptRow, hashed: str, output: RequestOutput) -> dict[str, Any]:
    """One finished prompt as JSON can hold it, and what came with it. The ids are what was run.

    `hashed`: of prompt and parameters, see `prompt_hash`. Log-probs are there where the parameters ask for them.
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
        found["logprobs"] = [_logprobs(each) for each in sample.logprobs]
    return found


def _logprobs(position: Mapping[int, Logprob]) -> dict[str, Any]:
    """vLLM's shape: token id (a text, as JSON's keys are) -> logprob, rank, decoded_token."""
    return {
        str(token): {"logprob": _number(each.logprob), "rank": each.rank, "decoded_token": each.decoded_token}
        for token, each in position.items()
    }


def _number(value: float | None) -> float | None:
    return None if value is None else max(value, _LOWEST)


def _metrics(metrics: RequestMetrics) -> dict[str, Any]:
    """Seconds since the request was added; the clock's own zero means nothing outside the process."""

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
    """A JSONL file of result rows, each row on disk before the next prompt finishes. No path: no file.

    Made afresh, or with the rows to `keep` from a file that is there. What else is there stays, and its record with it,
    until a prompt is answered. Nobody else may write it meanwhile.

    Attributes:
        rows: whole ones in it.

    Raises `ConfigError` where it cannot be opened; `ResultsLost` where a row cannot be written, the file not be closed,
    or it is not there any more. Whole rows are kept.
    """

    def __init__(self, path: str | None, keep: Sequence[bytes] = (), record: Record | None = None) -> None:
        """`record`: saved beside the rows, from the first one on."""
        self._path, self._record = path, record
        self.rows = len(keep)
        self._file = None if path is None else _opened(path, b"".join(keep))
        if self.settled:
            self.keep_record(record)

    @property
    def settled(self) -> bool:
        """False while what an earlier run wrote is still there."""
        return self._file is None or self._file.settled

    def keep_record(self, record: Record | None) -> None:
        """Saves the record beside a file that has settled; a device or pipe has none. Raises `ResultsLost`."""
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
        # Half a surrogate pair, which UTF-8 has no bytes for, becomes the very escape that JSON has for it.
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
        """Replaces what an earlier run wrote, rows and record. Raises `ResultsLost`."""
        if self._path is None or self._file is None or self._file.settled:
            return
        try:
            # Never rows beside a record that is not theirs, whenever the process dies: `--resume` would keep them.
            if self._record is not None:
                record_path(self._path).unlink(missing_ok=True)
            self._file.settle()
        except OSError as error:
            raise self.lost(error) from error
        self.keep_record(self._record)

    def lost(self, error: OSError, what: str | None = None) -> ResultsLost:
        """What to raise where results have nowhere to go any more. `what` could not be written; default: this file."""
        place = "there" if what is None else f"in {self._path}"
        kept = "" if self._path is None else f"; rows kept {place}: {self.rows}"
        if not self.settled:
            kept = f"; {self._path} has the rows of the run before"
        return ResultsLost(f"cannot write {what or f'output {self._path}'}: {error.strerror or error}{kept}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except ResultsLost:
            if error is None:  # else what ended the run says more
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
    """Whether a file is there already. `inputs`: files that the run reads, by what to call them.

    Raises `ConfigError` where none can be written, or one of the inputs would be, before anything is loaded.
    """
    if path is None:
        return False
    if path == "-":
        raise ConfigError("output '-' is no file: answers are printed anyway; give a file, or leave output out")
    try:
        there = check_writable(Path(path).expanduser())
        check_names(Path(path).expanduser(), record_path(path))
        check_unlocked(Path(path).expanduser())
    except (OSError, ValueError, RuntimeError) as error:  # a bad name; a home folder that nobody has
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"cannot write output {path}: {why}") from error
    for what, source in inputs.items():
        file = Path(source).expanduser()
        if there and file.exists() and file.samefile(Path(path).expanduser()):
            raise ConfigError(f"output {path} is {what}, which it would overwrite; give another output=")
    return there


def check_replaceable(path: str) -> None:
    """Raises `ConfigError` where more than rows would be lost. Pipes and devices hold nothing."""
    target = Path(path).expanduser()
    if not target.is_file():
        return
    try:
        with target.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
    except OSError as error:
        raise ConfigError(f"cannot read output {path}, which is there already: {error.strerror or error}") from error
    if first and not first.startswith(b'{"index":'):
        raise ConfigError(f"output {path} is there and holds no results of a run; give another output=, or delete it")


def check_writable(target: Path) -> bool:
    """Whether `target` is there. Raises `OSError` saying why it cannot be written, or replaced."""
    there, above = target.exists(), next(each for each in target.absolute().parents if each.exists())
    if target.is_dir():
        raise IsADirectoryError(f"{target} is no file")
    if target.is_socket():
        raise OSError(f"{target} is a socket, which cannot be opened; give a file or a pipe")
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is no folder")
    if there and not os.access(target, os.W_OK):
        raise PermissionError("no permission to write it")
    folder = Path(os.path.realpath(target)).parent if there else above
    if (not there or target.is_file()) and not os.access(folder, os.W_OK):  # a new file takes the old one's place
        raise PermissionError(f"no permission to write in {folder}")
    return there


def check_names(target: Path, *beside: Path) -> None:
    """Raises `OSError` or `ValueError` where no file can be called `target`, or as what stands `beside` it, or as the
    parts of these that grow until they are whole. Nothing stands beside a pipe or a device."""
    place = place_of(target)
    if place.exists() and not place.is_file():
        return
    above = next(folder for folder in place.parents if folder.exists())  # the others are made
    names = [each for path in (place, *beside) for each in (path, part_of(path))]
    for each in (target, *names, *(above / name.name for name in names)):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(each)


def check_unlocked(target: Path) -> None:
    """Raises `OSError` where another process is writing it, which a run that loads first would hear of late."""
    if target.is_file():
        with FileIO(target, "a") as file:
            lock(file)
