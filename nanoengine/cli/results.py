"""The results of a run: JSONL rows, written as prompts finish, and the closing line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self, TextIO

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
    """A JSONL file of result rows, made afresh, each row on disk before the next prompt finishes. No path: no file."""

    def __init__(self, path: str | None) -> None:
        self._file: TextIO | None = None
        if path is not None:
            target = Path(path).expanduser()
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                # Half a surrogate pair, which UTF-8 has no bytes for, becomes the very escape that JSON has for it.
                self._file = target.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
            except OSError as error:
                raise ConfigError(f"cannot write output {path}: {error}") from error

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def check_output(path: str | None) -> bool:
    """Whether a file is there already. Raises `ConfigError` where none can be written, before anything is loaded."""
    if path is None:
        return False
    target = Path(path).expanduser()
    above = next(each for each in target.absolute().parents if each.exists())
    if target.is_dir() or not above.is_dir():
        raise ConfigError(
            f"cannot write output {path}: {target if target.is_dir() else above} is no "
            f"{'file' if target.is_dir() else 'folder'}"
        )
    return target.exists()


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

    def add(self, output: RequestOutput) -> None:
        self.finished += 1
        self.failed += output.error is not None
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        self.generated += sum(len(sample.token_ids) for sample in output.outputs)
        if output.metrics.ttft is not None:
            self.ttfts.append(output.metrics.ttft)

    def line(self, seconds: float) -> str:
        parts: Sequence[str] = [
            f"{self.finished} prompts" if self.finished == self.total else f"{self.finished} of {self.total} prompts",
            *([f"{self.failed} failed"] if self.failed else []),
            f"{self.prompt_tokens} prompt + {self.generated} generated tokens in {seconds:.1f} s",
            f"{self.generated / seconds if seconds else 0:.1f} tokens/s",
            f"TTFT median {median(self.ttfts) * 1000:.0f} ms" if self.ttfts else "TTFT median -",
            f"prefix-cache hit rate {100 * self.cached_tokens / (self.prompt_tokens or 1):.1f}%",
        ]
        return ", ".join(parts)
