"""The content of a report's page: texts and numbers, which the template arranges."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanoengine import __version__
from nanoengine.lab.cli.report_charts import Picture, comparison_pictures, milliseconds, page_ids, run_pictures
from nanoengine.lab.cli.report_data import RunData
from nanoengine.lab.cli.sweep_report import answers_of, table_of

_SHOWN = 200  # most rows of a table, so that the page is readable
_ANSWER = 600  # most characters of an answer next to others
_EXCERPT = 160  # most characters of a prompt or an answer


@dataclass(frozen=True, slots=True)
class Tile:
    name: str
    value: str
    more: str = ""
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with a picture, a table, or both. `numbers`: columns of numbers. `folded`: the text to open it."""

    title: str
    text: str = ""
    picture: Picture | None = None
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers: Sequence[int] = ()
    folded: str = ""


@dataclass(frozen=True, slots=True)
class RunView:
    name: str
    notes: Sequence[str]
    hints: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]


@dataclass(frozen=True, slots=True)
class Compared:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int]
    pictures: Sequence[Picture]
    answers: Section


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    under: str
    facts: Sequence[tuple[str, str]]
    runs: Sequence[RunView]
    compared: Compared | None
    made: str = field(default=f"made by nanoengine {__version__}")


def page_of(path: Path, runs: Sequence[RunData]) -> Page:
    """The page of a report. Raises `ImportError` without matplotlib."""
    drawn = [run_pictures(run) for run in runs]
    several = comparison_pictures(runs) if len(runs) > 1 else {}
    every = [*several.values(), *(picture for pictures in drawn for picture in pictures.values())]
    unique = iter([Picture(each.text, svg) for each, svg in zip(every, page_ids(every), strict=True)])
    compared_pictures = [next(unique) for _ in several]
    views = [
        _run_view(run, {name: next(unique) for name in pictures}) for run, pictures in zip(runs, drawn, strict=True)
    ]
    compared = None
    if len(runs) > 1:
        header, rows = table_of([run.outcome for run in runs])
        header = [*header, "answer, tokens", "ended"]
        rows = [[*row, *_lengths(run)] for row, run in zip(rows, runs, strict=True)]
        words = {"status", "ended", *(key for run in runs for key in run.outcome.varied)}
        numbers = [place for place, name in enumerate(header) if name not in words]
        compared = Compared(header, rows, numbers, compared_pictures, _side_by_side(runs))
    what = "sweep" if len(runs) > 1 else "run"
    return Page(f"nanoengine {what}: {path.name or path}", _under(runs), list(_facts(runs)), views, compared)


def _facts(runs: Sequence[RunData]) -> Iterator[tuple[str, str]]:
    """When, how and where the runs were made; what differs between them has all of its values."""
    records = [run.record for run in runs if run.record is not None]
    names = ("nanoengine", "python", "torch", "triton", "transformers")
    versions = [", ".join(f"{name} {r.versions[name]}" for name in names if name in r.versions) for r in records]
    machine = [" · ".join(r.machine[key] for key in ("cpu", "threads") if key in r.machine) for r in records]
    for name, values in (
        ("date", [r.started for r in records[:1]]),
        ("command", [r.command for r in records] if len(records) == 1 else []),
        ("machine", machine),
        ("load at the start", [r.machine.get("load", "") for r in records[:1]]),
        ("versions", versions),
    ):
        if text := "; ".join(dict.fromkeys(value for value in values if value)):
            yield name, text


def _lengths(run: RunData) -> list[str]:
    """The mean number of tokens of an answer, and how answers ended, with counts."""
    samples = [sample for row in run.rows for sample in row["outputs"]]
    if not samples:
        return ["-", "-"]
    ends = Counter(str(sample["finish_reason"]) for sample in samples)
    mean = sum(len(sample["token_ids"]) for sample in samples) / len(samples)
    return [f"{mean:.1f}", ", ".join(f"{count} {reason}" for reason, count in ends.most_common())]


def _side_by_side(runs: Sequence[RunData]) -> Section:
    labels = [", ".join(f"{key}={value}" for key, value in run.outcome.varied.items()) for run in runs]
    named = [(f"#{run.outcome.number} {label}", run.rows) for run, label in zip(runs, labels, strict=True)]
    header, rows = answers_of(named)
    more = f"The first {_SHOWN} of {_count(len(rows))} prompts." if len(rows) > _SHOWN else ""
    cut = [[_cut(cell, _ANSWER) for cell in row] for row in rows[:_SHOWN]]
    return Section("Answers side by side", more, None, header, cut, (0,))


def _under(runs: Sequence[RunData]) -> str:
    models = dict.fromkeys(str(run.record.config["model"]["source"]) for run in runs if run.record is not None)
    gpus = dict.fromkeys(run.record.versions.get("gpu", "CPU") for run in runs if run.record is not None)
    parts = [", ".join(models), ", ".join(gpus), f"{len(runs)} runs" if len(runs) > 1 else str(runs[0].path)]
    return " · ".join(part for part in parts if part)


def _run_view(run: RunData, pictures: Mapping[str, Picture]) -> RunView:
    varied = ", ".join(f"{key}={value}" for key, value in run.outcome.varied.items())
    name = f"#{run.outcome.number} {varied}: {run.outcome.status}"
    sections = [*_over_time(run, pictures), *_of_requests(run, pictures), *_tables(run)]
    return RunView(name, list(_notes(run)), list(_hints(run)), list(_tiles(run)) if run.rows else [], sections)


def _notes(run: RunData) -> Iterator[str]:
    if run.outcome.status != "ok" and not (run.outcome.status == "exit 1" and run.failed):
        yield f"This run: {run.outcome.status}{f'. {run.error}' if run.error else ''}."
    if run.torn:
        yield f"Incomplete lines of {run.path.name}, which are left out: {run.torn}."
    if run.steps is not None and not run.steps.whole:
        yield "The trace is incomplete: its process was killed, or the disk was full. All of its steps are shown."


def _hints(run: RunData) -> Iterator[str]:
    if run.rows and run.steps is None:
        yield "No trace: nanoengine run … --trace FILE adds batch, KV blocks and step times over the run."


# -- the figures at the top ------------------------------------------------------------------------------------------


def _tiles(run: RunData) -> Iterator[Tile]:
    summary = run.outcome.summary
    failed = len(run.failed)
    yield Tile("prompts", _count(len(run.rows)), f"{_count(failed)} failed" if failed else "none failed", failed > 0)
    generated = sum(len(sample["token_ids"]) for row in run.rows for sample in row["outputs"])
    answered = [row for row in run.rows if row["error"] is None]
    prompt = sum(len(row["prompt_token_ids"]) for row in answered)
    yield Tile("generated tokens", _count(generated), f"from {_count(prompt)} prompt tokens")
    if run.outcome.tokens_per_second is not None:
        again = f" ({summary['kept']} rows kept from an earlier run)" if summary["kept"] else ""
        yield Tile("tokens/s", f"{run.outcome.tokens_per_second:,.0f}", f"in {summary['seconds']:.1f} s{again}")
    for name, title in (("ttft", "TTFT, median"), ("itl", "ITL, median")):
        values = run.metric(name)
        if len(values):
            yield Tile(title, milliseconds(np.median(values)), f"p99 {milliseconds(np.percentile(values, 99))}")
    cached = sum(row["num_cached_tokens"] for row in answered)
    if prompt:
        yield Tile("prefix-cache hits", f"{cached / prompt:.1%}", f"{_count(cached)} prompt tokens")
    if summary.get("drafted_per_position"):
        drafted, accepted = sum(summary["drafted_per_position"]), sum(summary["accepted_per_position"])
        yield Tile("accepted drafts", f"{accepted / drafted:.1%}", f"{_count(accepted)} of {_count(drafted)}")
    if run.steps is not None and len(run.steps):
        steps, total = run.steps, run.steps["total"][0]
        yield Tile("steps", _count(len(steps)), f"{len(steps.preempted)} preemptions")
        peak, shared = steps["used"].max(), steps["shared"].max()
        yield Tile(
            "KV blocks, peak", f"{peak / total:.0%}", f"{_count(peak)} of {_count(total)}, {_count(shared)} shared"
        )


# -- the sections ----------------------------------------------------------------------------------------------------


def _over_time(run: RunData, pictures: Mapping[str, Picture]) -> Iterator[Section]:
    if run.steps is None or "timeline" not in pictures:
        return
    yield Section(
        "Over time",
        "From the trace; a step counts at the time of its end. Several requests use shared blocks; no request uses "
        "cached blocks, but new requests can still find them.",
        pictures["timeline"],
    )
    yield Section(
        "Steps",
        "A step is on the device from its launch, or the end of the step before, until its result is on the host. "
        "While the engine waits, it has nothing to do: the next step is launched already.",
        pictures["steps"],
    )
    if run.steps.preempted:
        rows = [[f"{moment:.3f}", request, why] for moment, request, why in run.steps.preempted]
        yield _folded("Preemptions", ["at, s", "request", "why"], rows, (0,))


def _of_requests(run: RunData, pictures: Mapping[str, Picture]) -> Iterator[Section]:
    if "latencies" in pictures:
        yield Section("Latencies", "Those of answered requests.", pictures["latencies"])
    if "prefixes" in pictures:
        yield Section("Prefix sharing", "Tokens of each answered prompt from the prefix cache.", pictures["prefixes"])


def _tables(run: RunData) -> Iterator[Section]:
    drafts = zip(
        *(run.outcome.summary.get(f"{what}_per_position", ()) for what in ("drafted", "accepted")), strict=True
    )
    if shares := [[str(i), _count(n), _count(hits), f"{hits / n:.1%}"] for i, (n, hits) in enumerate(drafts, 1)]:
        text = "A draft counts if it, and all before it, are the tokens that the model drew."
        yield Section("Speculation", text, None, ["position", "drafts", "accepted", "share"], shares, (0, 1, 2, 3))
    if run.failed:
        rows = [
            [str(row["index"]), row["error"]["code"], row["error"]["message"], _excerpt(row["prompt"])]
            for row in run.failed[:_SHOWN]
        ]
        more = f"The first {_SHOWN} of {_count(len(run.failed))}." if len(run.failed) > _SHOWN else ""
        yield Section("Failed", more, None, ["prompt", "code", "message", "text"], rows, (0,))
    if run.rows:
        header = ["prompt", "text", "answer", "ended", "tokens", "cached", "TTFT ms", "total ms"]
        yield _folded("Answers", header, [_answer(row) for row in run.rows], (0, 4, 5, 6, 7))
    if run.record is not None:
        yield _folded("Configuration", ["key", "value"], list(_flat(run.record.config)))
        yield _folded("Sampling parameters", ["key", "value"], list(_flat(run.record.params)))
        yield _folded("Versions", ["package", "version"], [list(pair) for pair in run.record.versions.items()])


def _folded(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> Section:
    shown = f"the first {_SHOWN} of {_count(len(rows))}" if len(rows) > _SHOWN else f"all {_count(len(rows))}"
    return Section(title, "", None, header, rows[:_SHOWN], numbers, shown)


def _answer(row: Mapping[str, Any]) -> list[str]:
    samples, metrics = row["outputs"], row["metrics"]
    return [
        str(row["index"]),
        _excerpt(row["prompt"]),
        "\n".join(_cut(sample["text"].strip()) for sample in samples),
        ", ".join(str(sample["finish_reason"]) for sample in samples) or row["error"]["code"],
        _count(sum(len(sample["token_ids"]) for sample in samples)),
        _count(row["num_cached_tokens"]),
        *("-" if metrics[name] is None else f"{1000 * metrics[name]:,.1f}" for name in ("ttft", "latency")),
    ]


def _excerpt(prompt: Any) -> str:
    """The beginning of a prompt; for a conversation, the beginning of its last message."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return _cut(" ".join(str(text).split()))


def _cut(text: str, most: int = _EXCERPT) -> str:
    shown = text if len(text) <= most else f"{text[:most]}…"
    return shown.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be written


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", _cut(item if isinstance(item, str) else json.dumps(item, ensure_ascii=False))]


def _count(value: float) -> str:
    return f"{value:,.0f}"
