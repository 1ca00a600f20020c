"""The results of a sweep: a table on the terminal and as CSV, and a plot."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from nanoengine.cli.record import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDE = 250  # width of a table that is not printed to a terminal


@dataclass(frozen=True, slots=True)
class Outcome:
    """One combination. `status`: "ok", or what went wrong. `summary`: that of the run's record, if there is one."""

    number: int
    varied: Mapping[str, str]
    status: str
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return "\n".join(f"{key}={value}" for key, value in self.varied.items()) or str(self.number)

    @property
    def tokens_per_second(self) -> float | None:
        found: float | None = self.summary.get("tokens_per_second")
        return found

    def milliseconds(self, name: str, which: str = "median") -> float | None:
        """Milliseconds of "ttft" or "itl"; None if nothing was generated."""
        spread = self.summary.get(name)
        return None if spread is None else 1000 * float(spread[which])

    @property
    def drafts(self) -> str:
        """Accepted drafts of all; "" if there were none."""
        drafted, accepted = (sum(self.summary.get(f"{what}_per_position", ())) for what in ("drafted", "accepted"))
        return f"{accepted}/{drafted}" if drafted else ""

    @property
    def prompts(self) -> str:
        if not self.summary:
            return "-"
        kept = self.summary["kept"]
        done = self.summary["finished"] + kept - self.summary["failed"]
        return f"{done}/{self.summary['prompts']}" + (f" ({kept} kept)" if kept else "")


def print_table(outcomes: Sequence[Outcome], out: TextIO | None = None) -> None:
    """Prints a table of all combinations to `out`; default: standard output."""
    from rich.console import Console
    from rich.table import Table

    file = sys.stdout if out is None else out
    table = Table()
    header, rows = table_of(outcomes)
    for name in header:
        table.add_column(name, justify="left" if name in ("status", *_keys(outcomes)) else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(file=file, width=None if file.isatty() else _WIDE, markup=False, highlight=False).print(table)


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """Writes the table as CSV, replacing the file atomically. Raises `OSError`."""
    header, rows = table_of(outcomes)
    text = StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_whole(path, text.getvalue())


def answers_of(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> tuple[list[str], list[list[str]]]:
    """The headings, and a row for each prompt with the answers of all runs side by side. `runs`: (label, rows) of each.

    Several samples of a prompt are on lines of their own; a failed prompt has its error.
    """
    answers = [(label, {row["index"]: row for row in rows}) for label, rows in runs]
    prompts = {index: row["prompt"] for _, rows in reversed(answers) for index, row in rows.items()}
    table = [
        [
            str(index),
            prompt if isinstance(prompt, str) else str(prompt[-1]["content"]),
            *(_answer(rows[index]) if index in rows else "" for _, rows in answers),
        ]
        for index, prompt in sorted(prompts.items())
    ]
    return ["#", "prompt", *(label for label, _ in answers)], table


def _answer(row: Mapping[str, Any]) -> str:
    if row["error"] is not None:
        return f"({row['error']['code']})"
    return "\n".join(sample["text"].strip() for sample in row["outputs"])


def write_answers(runs: Sequence[tuple[str, Path]], path: Path) -> None:
    """Writes the answers side by side as CSV. `runs`: label and results file of each. Raises `OSError`."""
    header, rows = answers_of([(label, _rows(file)) for label, file in runs])
    text = StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))


def _rows(file: Path) -> list[Mapping[str, Any]]:
    """The whole rows of a results file; a killed run may have left a part of one."""
    found = []
    if file.is_file():
        for line in file.read_text("utf-8", "replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def _keys(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(key for each in outcomes for key in each.varied))


def table_of(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """The headings, and a row for each combination; with a column of drafts if one had any."""
    keys = _keys(outcomes)
    drafted = any(each.drafts for each in outcomes)
    header = ["#", *keys, "status", "prompts", "tokens/s", "TTFT ms", "TTFT p99 ms", "ITL ms", "ITL p99 ms"]
    header += ["drafts"] if drafted else []
    rows = [
        [
            str(each.number),
            *(each.varied.get(key, "") for key in keys),
            each.status,
            each.prompts,
            _number(each.tokens_per_second),
            *(_number(each.milliseconds(name, which)) for name in ("ttft", "itl") for which in ("median", "p99")),
            *([each.drafts or "-"] if drafted else []),
        ]
        for each in outcomes
    ]
    return header, rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Saves the figure of `draw` as a PNG. Raises the errors of `draw`, and `OSError`."""
    image = BytesIO()
    draw(outcomes).savefig(image, dpi=120, format="png")
    write_whole(path, image.getvalue())


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Bars of throughput, TTFT and ITL, for each combination that generated tokens.

    Raises `ImportError` without matplotlib; `ValueError` if no combination generated tokens.
    """
    from matplotlib.figure import Figure

    drawn = [each for each in outcomes if each.tokens_per_second is not None]
    if not drawn:
        raise ValueError("no combination generated anything")
    lines = max(each.label.count("\n") + 1 for each in drawn)
    figure = Figure(figsize=(12, 1.4 + len(drawn) * (0.3 + 0.18 * lines)), layout="constrained")
    panels: Any = figure.subplots(1, 3, sharey=True)
    rates = [each.tokens_per_second for each in drawn]
    for axes, title, values, high in (
        (panels[0], "throughput, tokens/s", rates, rates),
        (panels[1], "TTFT, ms (median; line to p99)", *_spreads(drawn, "ttft")),
        (panels[2], "ITL, ms (median; line to p99)", *_spreads(drawn, "itl")),
    ):
        axes.barh(range(len(drawn)), [value or 0 for value in values], color="#9fc5e8")
        for place, (value, end) in enumerate(zip(values, high, strict=True)):
            axes.annotate(_number(value), (value or 0, place), (5, 0), textcoords="offset points", va="center")
            axes.hlines(place + 0.3, value or 0, end or 0, color="#555555")
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.2)  # room for the numbers
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(drawn)), [each.label for each in drawn], fontsize=8)
    panels[0].invert_yaxis()
    return figure


def _spreads(drawn: Sequence[Outcome], name: str) -> tuple[list[float | None], list[float | None]]:
    """The medians and the 99th percentiles, in milliseconds."""
    medians, highs = ([each.milliseconds(name, which) for each in drawn] for which in ("median", "p99"))
    return medians, highs
