"""The results of a benchmark: rows of figures, as a table and as JSON with the environment."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nanoengine import __version__

Cell = Callable[[Any], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Results. `rows`: dataclasses of one class. `columns`: heading -> cell of a row. `notes`: what is missing."""

    benchmark: str
    settings: Mapping[str, Any]
    rows: Sequence[Any]
    columns: Mapping[str, Cell]
    notes: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "environment": environment(),
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=2, default=str) + "\n")

    def table(self) -> str:
        """The table as text. The first column is left-aligned, the others are right-aligned; notes follow."""
        lines = [list(self.columns), *([cell(row) for cell in self.columns.values()] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
        return "\n".join([*(line.rstrip() for line in text), *self.notes])


def environment() -> dict[str, Any]:
    """What the figures depend on, in addition to the settings."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "nanoengine": __version__,
        "gpu": gpu,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # it has the CUDA version of the build, which the package's version may not have
        **{name: _version(name) for name in ("triton", "flash-attn", "transformers")},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def share(value: float | None, whole: float | None) -> str:
    """`value` as a share of `whole`, in per cent."""
    return "-" if value is None or not whole else f"{value / whole:.0%}"
