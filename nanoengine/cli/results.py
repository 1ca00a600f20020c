"""The results of a run: JSONL rows, written as prompts finish, and the closing line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from stat import S_ISREG
from statistics import median, quantiles
from types import MappingProxyType, TracebackType
from typing import Any, Self

from nanoengine.cli.common import ResultsLost
from nanoengine.cli.record import Record, record_path
from nanoengine.core.errors import ConfigError
from nanoengine.core.files import write_all
from nanoengine.core.request import RequestMetrics, RequestOutput


def result_row(index: int, prompt: Any, hashed: str, output: RequestOutput) -> dict[str, Any]:
    """One finished prompt as JSON can hold it. `prompt` is what the configuration says; the ids are what was run.

    `hashed`: of prompt and parameters, see `prompt_hash`.
    """
    return {
        "index": index,
        "hash": hashed,
        "request_id": output.request_id,
        "prompt": prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "outputs": [
            {
                "text": sample.text,
                "token_ids": list(sample.token_ids),
                "finish_reason": sample.finish_reason,
                "stop_reason": sample.stop_reason,
            }
            for sample in output.outputs
        ],
        "num_cached_tokens": output.num_cached_tokens,
        "metrics": _metrics(output.metrics),
        "error": None if output.error is None else {"code": output.error.code, "message": str(output.error)},
    }


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

    Made afresh, or with the rows to `keep` from a file that is there. Nobody else may write it meanwhile.

    Attributes:
        rows: whole ones in it. replaced: what an earlier run wrote was there, and nothing of it is kept.

    Raises `ConfigError` where it cannot be opened; `ResultsLost` where a row cannot be written, or the file not be
    closed. Whole rows are kept.
    """

    def __init__(self, path: str | None, keep: Sequence[bytes] = ()) -> None:
        self._path = path
        self.rows = len(keep)
        self._size = sum(map(len, keep))  # of the whole rows, in bytes
        self.replaced = False
        self._file = None
        if path is not None:
            size = _size(path)
            self._file = _opened(path, b"".join(keep))
            self.replaced = size > 0 and not keep

    def keep_record(self, record: Record) -> None:
        """Saves the record beside a file on a disk; a device or pipe has none. Raises `ResultsLost`."""
        if self._path is None or self._file is None or not S_ISREG(os.fstat(self._file.fileno()).st_mode):
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
            write_all(self._file, data)
        except BaseException as error:
            with suppress(OSError):  # what is no plain file cannot be cut, and holds no part of a row
                self._file.truncate(self._size)
            if isinstance(error, OSError):
                raise self.lost(error) from error
            raise
        self.rows += 1
        self._size += len(data)

    def lost(self, error: OSError, what: str | None = None) -> ResultsLost:
        """What to raise where results have nowhere to go any more. `what` could not be written; default: this file."""
        place = "there" if what is None else f"in {self._path}"
        kept = "" if self._path is None else f"; rows kept {place}: {self.rows}"
        return ResultsLost(f"cannot write {what or f'output {self._path}'}: {error.strerror or error}{kept}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as failed:
            raise self.lost(failed) from failed


def _size(path: str) -> int:
    """In bytes; 0 where no file is there, and of pipes and devices, which hold nothing."""
    target = Path(path).expanduser()
    return target.stat().st_size if target.is_file() else 0


def _opened(path: str, keep: bytes) -> FileIO:
    """The file, locked, ready to be appended to, and with nothing but `keep` in it."""
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(target, "a")
        try:
            if not S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            _lock(file)
            if not keep:
                file.truncate(0)
            elif target.read_bytes() != keep:  # rows are left out, or the last one is not whole
                file = _replaced(target, keep, file)
        except BaseException:
            file.close()
            raise
        return file
    except OSError as error:
        raise ConfigError(f"cannot write output {path}: {error}") from error


def _replaced(target: Path, keep: bytes, old: FileIO) -> FileIO:
    """A new file in place of `old`, in one go: the rows are never on no disk at all."""
    target = target.resolve()  # a link stays one
    part = target.with_name(f".{target.name}.part")
    file = FileIO(part, "w")
    try:
        write_all(file, keep)
        _lock(file)
        os.replace(part, target)
    except BaseException:
        file.close()
        part.unlink(missing_ok=True)
        raise
    old.close()
    return file


def _lock(file: FileIO) -> None:
    """Raises `OSError` where another process is writing the file."""
    if sys.platform == "win32":
        return  # no advisory locks there
    import fcntl

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError("another process is writing it") from error
    except OSError:
        return  # a file system without locks


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
    except (OSError, ValueError, RuntimeError) as error:  # a bad name; a home folder that nobody has
        raise ConfigError(f"cannot write output {path}: {error}") from error
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
    """Whether `target` is there. Raises `OSError` saying why it cannot be written."""
    there, above = target.exists(), next(each for each in target.absolute().parents if each.exists())
    if target.is_dir():
        raise IsADirectoryError(f"{target} is no file")
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is no folder")
    if not os.access(target if there else above, os.W_OK):
        raise PermissionError(f"no permission to write {'it' if there else f'in {above}'}")
    return there


@dataclass
class Tally:
    """What the closing line counts. `kept`: prompts that an earlier run had finished; the rest counts this one's."""

    total: int
    kept: int = 0
    finished: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    ttfts: list[float] = field(default_factory=list)
    itls: list[float] = field(default_factory=list)
    first_token: float | None = None  # when the first token of all came, on the monotonic clock
    first_step: float = 0.0  # seconds from scheduling it

    def add(self, output: RequestOutput) -> None:
        self.finished += 1
        self.failed += output.error is not None
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        self.generated += sum(len(sample.token_ids) for sample in output.outputs)
        metrics = output.metrics
        if metrics.itl is not None:
            self.itls.append(metrics.itl)
        if metrics.ttft is None or metrics.first_token is None or metrics.first_scheduled is None:
            return
        self.ttfts.append(metrics.ttft)
        if self.first_token is None or metrics.first_token < self.first_token:
            self.first_token, self.first_step = metrics.first_token, metrics.first_token - metrics.first_scheduled

    def line(self, seconds: float) -> str:
        noun = "prompt" if self.total == 1 else "prompts"
        done = self.finished + self.kept
        parts: Sequence[str] = [
            f"{done} {noun}" if done == self.total else f"{done} of {self.total} {noun}",
            *([f"{self.kept} kept from before"] if self.kept else []),
            *([f"{self.failed} failed"] if self.failed else []),
            f"{self.prompt_tokens} prompt + {self.generated} generated tokens in {seconds:.1f} s",
            f"{self.generated / seconds if seconds else 0:.1f} tokens/s",
            f"TTFT median {median(self.ttfts) * 1000:.0f} ms" if self.ttfts else "TTFT median -",
            f"prefix-cache hit rate {100 * self.cached_tokens / (self.prompt_tokens or 1):.1f}%",
        ]
        return ", ".join(parts)

    def summary(self, seconds: float, status: int) -> dict[str, Any]:
        """The same for programs. Seconds throughout; `status`: of the process."""
        return {
            "status": status,
            "prompts": self.total,
            "kept": self.kept,
            "finished": self.finished,
            "failed": self.failed,
            "seconds": seconds,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated,
            "tokens_per_second": self.generated / seconds if seconds and self.generated else None,
            "ttft": _spread(self.ttfts),
            "itl": _spread(self.itls),
        }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return {"median": values[0], "p99": values[0]} if values else None
    return {"median": median(values), "p99": quantiles(values, n=100, method="inclusive")[98]}
