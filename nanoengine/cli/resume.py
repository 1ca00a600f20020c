"""The rows of an earlier run in a results file, and which of them `--resume` keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoengine.api.errors import ConfigError
from nanoengine.cli.record import Record, check_same_config, prompt_hash, read_record, record_path
from nanoengine.cli.results import KEYS
from nanoengine.setup.config.config import RunConfig
from nanoengine.setup.config.prompts import PromptRow


@dataclass(frozen=True, slots=True)
class Earlier:
    """What is kept of an earlier run.

    Attributes:
        record: of that run. rows: rows to keep, as they are in the file. done: indices of their prompts.
        dropped: number of finished rows whose prompts were removed or changed.
    """

    record: Record
    rows: Sequence[bytes]
    done: frozenset[int]
    dropped: int = 0


def earlier_run(config: RunConfig, prompts: Sequence[PromptRow]) -> Earlier | None:
    """What is kept of the earlier run; None if there is none.

    A row is kept if it is complete, has no error, and answers the prompt that is now at its index, with the same
    fields.

    Raises `ConfigError` if there is no output, or if it was made with another configuration.
    """
    if config.output is None:
        raise ConfigError("--resume needs the results of the earlier run: give output=results.jsonl")
    path = Path(config.output).expanduser()
    if not path.exists():
        return None
    if not path.is_file():
        raise ConfigError(f"--resume: {config.output} is not a regular file, so it has no rows to keep")
    record = read_record(path)
    if record is None:
        if path.stat().st_size == 0:
            return None
        raise ConfigError(
            f"--resume: there is no {record_path(path).name} next to {config.output}, so it is not known how it was "
            "made; give another output=, or leave out --resume to start again"
        )
    check_same_config(record, config, config.output)
    kept: dict[int, bytes] = {}
    dropped = 0
    for line in path.read_bytes().splitlines(keepends=True):
        index = _answered(line, prompts, config.chat, record)
        if index is not None:
            kept.setdefault(index, line)
        dropped += index is None and _finished(line)
    return Earlier(record, list(kept.values()), frozenset(kept), dropped)


def _finished(line: bytes) -> bool:
    try:
        return json.loads(line)["error"] is None
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _answered(line: bytes, prompts: Sequence[PromptRow], chat: bool, record: Record) -> int | None:
    """The index of the prompt that a row answers; None if the row is incomplete or failed, or the prompt changed."""
    try:
        row: Any = json.loads(line)
        index, hashed, error = row["index"], row["hash"], row["error"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not line.endswith(b"\n") or error is not None or type(index) is not int or not 0 <= index < len(prompts):
        return None
    others = {key: value for key, value in row.items() if key not in KEYS}
    same = _json(others) == _json(
        prompts[index].fields
    )  # compared as JSON, because 1, 1.0 and true are equal in Python
    return index if same and hashed == prompt_hash(prompts[index].prompt, chat, record.params) else None


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(dict(fields), sort_keys=True)
