"""Log lines of the server's processes: as text, or as one JSON object per line. Never a prompt or an output."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_FIELDS = "fields"  # attribute of a log record


def configure_logs(form: str, level: str, process: str, name: str = "nanoengine") -> None:
    """Makes the logger `name` write to standard error. `form`: "text" or "json". `process`: says who writes."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if form == "json" else TextLines(process))
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level.upper())


def fields(**values: Any) -> Mapping[str, Any]:
    """The argument `extra` of a logging call: values beside the message, each a key of the JSON object."""
    return {_FIELDS: values}


class JsonLines(logging.Formatter):
    """{"time", "level", "process", "message", the fields of the call, "exception"}."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """ "2026-11-29 10:30:00.123 INFO supervisor: message key=value"."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = _time(record).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        values = "".join(f" {key}={value}" for key, value in getattr(record, _FIELDS, {}).items())
        line = f"{time} {record.levelname} {self._process}: {record.getMessage()}{values}"
        if record.exc_info and record.exc_info[1] is not None:
            line += "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()
        return line


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)
