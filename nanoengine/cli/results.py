"""The results of a run: JSONL rows, written as prompts finish, and the closing line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from statistics import median
from types import MappingProxyType, TracebackType
from typing import Any, Self

from nanoengine.cli.common import ResultsLost
from nanoengine.core.errors import ConfigError
from nanoengine.core.request import RequestMetrics, RequestOutput


def result_row(index: int, prompt: Any, output: RequestOutput) -> dict[str, Any]:
    """One finished prompt as JSON can hold it. `prompt` is what the configuration says; the ids are what was run."""
    return {
        "index": index,
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
    """A JSONL file of result rows, made afresh, each row on disk before the next prompt finishes. No path: no file.

    Raises `ResultsLost` where a row cannot be written, or the file not be closed. Whole rows are kept.
    """

    def __init__(self, path: str | None) -> None:
        self._path, self._file = path, None if path is None else _created(path)
        self.rows = 0
        self._size = 0  # of the whole rows, in bytes

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        # Half a surrogate pair, which UTF-8 has no bytes for, becomes the very escape that JSON has for it.
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):  # what is no plain file cannot be cut, and holds no part of a row
                self._file.truncate(self._size)
            raise self._lost(error) from error
        self.rows += 1
        self._size += len(data)

    def _lost(self, error: OSError) -> ResultsLost:
        return ResultsLost(f"cannot write output {self._path}: {error.strerror}; rows kept there: {self.rows}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as failed:
            raise self._lost(failed) from failed


def _created(path: str) -> FileIO:
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return FileIO(target, "w")
    except OSError as error:
        raise ConfigError(f"cannot write output {path}: {error}") from error


def check_output(path: str | None, inputs: Mapping[str, str | Path] = MappingProxyType({})) -> bool:
    """Whether a file is there already. `inputs`: files that the run reads, by what to call them.

    Raises `ConfigError` where none can be written, or one of the inputs would be, before anything is loaded.
    """
    if path is None:
        return False
    try:
        there = _check_writable(Path(path).expanduser())
    except (OSError, ValueError, RuntimeError) as error:  # a bad name; a home folder that nobody has
        raise ConfigError(f"cannot write output {path}: {error}") from error
    for what, source in inputs.items():
        file = Path(source).expanduser()
        if there and file.exists() and file.samefile(Path(path).expanduser()):
            raise ConfigError(f"output {path} is {what}, which it would overwrite; give another output=")
    return there


def _check_writable(target: Path) -> bool:
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
    """What the closing line counts."""

    total: int
    finished: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    ttfts: list[float] = field(default_factory=list)
    first_token: float | None = None  # when the first token of all came, on the monotonic clock
    first_step: float = 0.0  # seconds from scheduling it

    def add(self, output: RequestOutput) -> None:
        self.finished += 1
        self.failed += output.error is not None
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        self.generated += sum(len(sample.token_ids) for sample in output.outputs)
        metrics = output.metrics
        if metrics.ttft is None or metrics.first_token is None or metrics.first_scheduled is None:
            return
        self.ttfts.append(metrics.ttft)
        if self.first_token is None or metrics.first_token < self.first_token:
            self.first_token, self.first_step = metrics.first_token, metrics.first_token - metrics.first_scheduled

    def line(self, seconds: float) -> str:
        noun = "prompt" if self.total == 1 else "prompts"
        parts: Sequence[str] = [
            f"{self.finished} {noun}" if self.finished == self.total else f"{self.finished} of {self.total} {noun}",
            *([f"{self.failed} failed"] if self.failed else []),
            f"{self.prompt_tokens} prompt + {self.generated} generated tokens in {seconds:.1f} s",
            f"{self.generated / seconds if seconds else 0:.1f} tokens/s",
            f"TTFT median {median(self.ttfts) * 1000:.0f} ms" if self.ttfts else "TTFT median -",
            f"prefix-cache hit rate {100 * self.cached_tokens / (self.prompt_tokens or 1):.1f}%",
        ]
        return ", ".join(parts)
