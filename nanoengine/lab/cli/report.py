"""`nanoengine report`: results as one HTML page that needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanoengine.api.errors import ConfigError
from nanoengine.cli.common import DebugOption, say, user_errors
from nanoengine.observe.files import user_path

if TYPE_CHECKING:
    from nanoengine.lab.cli.report_data import RunData

_MARK = '<meta name="generator" content="nanoengine report">'


def report(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="A results file, a folder with one, or the folder of a sweep.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The page; default: next to the results.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="The trace of the run; default: the one that the run wrote."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Make an HTML page of the results of a run or a sweep."""
    with user_errors(debug):
        from nanoengine.lab.cli.report_data import read_all

        path = user_path(results, "results")
        runs = read_all(path, None if trace is None else user_path(trace, "trace"))
        target = user_path(output, "--output") if output is not None else _beside(path)
        if target.absolute() in {each.path.absolute() for each in runs}:
            raise ConfigError(f"--output {target} is the results file, which it would overwrite; give another file")
        if output is None and target.is_file() and _MARK not in target.read_text(errors="replace")[:2000]:
            raise ConfigError(f"{target} exists and is not a report; give another file by --output")
        text = _page(path, runs)
        try:
            from nanoengine.cli.record import write_whole

            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, text)
        except OSError as error:
            raise ConfigError(f"cannot write {target}: {error.strerror or error}") from error
        say(f"wrote {target}")


def _beside(path: Path) -> Path:
    return path / "report.html" if path.is_dir() else path.with_suffix(".html")


def _page(path: Path, runs: Sequence[RunData]) -> str:
    from dataclasses import fields

    from jinja2 import Environment, PackageLoader, StrictUndefined

    from nanoengine.lab.cli.report_charts import styled
    from nanoengine.lab.cli.report_view import page_of

    try:
        with styled():
            page = page_of(path.absolute(), runs)
    except ImportError as error:
        raise ConfigError(f"the report draws with matplotlib: {error}; pip install 'nanoengine[plot]'") from error
    environment = Environment(
        loader=PackageLoader("nanoengine.lab.cli", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    values = {each.name: getattr(page, each.name) for each in fields(page)}
    return environment.get_template("report.html.j2").render(values)
