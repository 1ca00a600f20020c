"""What `nanoengine bench` writes may go into a folder that is not there yet, as with `run` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanoengine.lab.cli.bench_options import Common


class _Report:
    def table(self) -> str:
        return "figures"

    def write(self, path: Path) -> None:
        path.write_text("{}")


def test_figures_that_took_long_are_not_lost_to_a_missing_folder(tmp_path: Path) -> None:
    report: Any = _Report()
    Common(output=tmp_path / "new/er/figures.json").finish(report)
    assert (tmp_path / "new/er/figures.json").read_text() == "{}"
