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
from nanoengine.lab.cli.sweep_report import Outcome, answers_of, table_of

_SHOWN = 200  # most rows of a table, so that the page is readable
_ANSWER = 600  # most characters of an answer next to others
_FEW = 8  # answers that are shown at once
_EXCERPT = 160  # most characters of a prompt or an answer


@dataclass(frozen=True, slots=True)
class Tile:
    name: str
    value: str
    more: str = ""
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with a picture, a table, or both. `numbers`: columns of numbers.

    `folded`: the text that opens the table, in the place of the title. `open`: whether it is open at first.
    """

    title: str
    text: str = ""
    picture: Picture | None = None
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers: Sequence[int] = ()
    folded: str = ""
    open: bool = False


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
    spread: Section
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
        spread = _spread([run.outcome for run in runs])
        compared = Compared(header, rows, numbers, compared_pictures, spread, _side_by_side(runs))
    what = "sweep" if len(runs) > 1 else "run"
    return Page(f"nanoengine {what}: {path.name or path}", _under(runs), list(_facts(runs)), views, compared)


def _facts(runs: Sequence[RunData]) -> Iterator[tuple[str, str]]:
    """When, how and where the runs were made; what differs between them has all of its values."""
    records = [run.record for run in runs if run.record is not None]
    names = ("nanoengine", "python", "torch", "triton", "transformers")
    versions = [", ".join(f"{name} {r.versions[name]}" for name in names if name in r.versions) for r in records]
    single = len(records) == 1
    threads = [r.machine.get("threads", "") for r in records]
    loads = [r.machine["load"].split(maxsplit=1) for r in records if "load" in r.machine]
    low, high = (pick((load for load, _ in loads), key=float, default="") for pick in (min, max))
    load = f"{low}{'' if low == high else f' to {high}'} {loads[0][1]}" if loads else ""
    machine = [r.machine.get("cpu", "") for r in records]
    for name, values in (
        ("date", [r.started for r in records[:1]]),
        ("command", [runs[0].sweep_command or (records[0].command if single else "")]),
        ("machine", machine),
        ("threads", threads if single else sorted({each.partition(" (")[0] for each in threads})),
        ("load at the start", [load]),
        ("versions", versions),
    ):
        if text := "; ".join(dict.fromkeys(value for value in values if value)):
            yield name, text


def _spread(outcomes: Sequence[Outcome]) -> Section:
    """Median, least and most of the combinations that differ in seeds only: how much of a difference is noise."""
    groups: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for each in outcomes:
        if each.tokens_per_second is not None:
            key = tuple((name, value) for name, value in each.varied.items() if name.rpartition(".")[2] != "seed")
            groups.setdefault(key, []).append(each)
    repeated = {key: found for key, found in groups.items() if len(found) > 1}
    if not repeated:
        return Section(
            "", "Each combination ran once. 'engine.seed=range(3)' runs each three times and shows the spread."
        )
    rows = [
        [
            ", ".join(f"{name}={value}" for name, value in key) or "all",
            str(len(found)),
            _extent([each.tokens_per_second for each in found]),
            *(_extent([each.milliseconds(name) for each in found]) for name in ("ttft", "itl")),
        ]
        for key, found in repeated.items()
    ]
    header = ["combination", "runs", "tokens/s", "TTFT ms", "ITL ms"]
    text = "Runs that differ in their seeds only: median, and least to most."
    return Section("Spread", text, None, header, rows, (1, 2, 3, 4))


def _extent(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{np.median(found):.1f} ({min(found):.1f} to {max(found):.1f})" if found else "-"


def _lengths(run: RunData) -> list[str]:
    """The mean number of tokens of an answer, and how answers ended, with counts."""
    samples = [sample for row in run.rows for sample in row["outputs"]]
    if not samples:
        return ["-", "-"]
    ends = Counter(str(sample["finish_reason"]) for sample in samples)
    mean = sum(len(sample["token_ids"]) for sample in samples) / len(samples)
    return [f"{mean:.1f}", ", ".join(f"{count} {reason}" for reason, count in ends.most_common())]


def _side_by_side(runs: Sequence[RunData]) -> Section:
    named = [
        ("\n".join([f"#{run.outcome.number}", *(f"{k}={v}" for k, v in run.outcome.varied.items())]), run.rows)
        for run in runs
    ]
    header, rows = answers_of(named)
    more = f"The first {_SHOWN} of {_count(len(rows))} prompts." if len(rows) > _SHOWN else ""
    cut = [[row[0], _excerpt(row[1]), *(_cut(cell, _ANSWER) for cell in row[2:])] for row in rows[:_SHOWN]]
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
    text = "From the trace; a step counts at the time of its end. Several requests use shared blocks; no request uses "
    text += "cached blocks, but new requests can still find them."
    most = run.record.config["engine"].get("max_num_seqs") if run.record is not None else None
    if most is not None and run.steps["running"].max() > most:
        text += f" More than max_num_seqs={most} run for a moment where the last token of a request is still on the "
        text += "device, and the next request has begun already (spare_slots)."
    yield Section("Over time", text, pictures["timeline"])
    yield Section(
        "Steps",
        "A step is on the device from its launch, or the end of the step before, until its result is on the host. "
        "While the engine waits, it has nothing to do: the next step is launched already.",
        pictures["steps"],
    )
    if run.steps.preempted:
        rows = [[f"{moment:.3f}", request, why] for moment, request, why in run.steps.preempted]
        yield _folded("preemption", ["at, s", "request", "why"], rows, (0,))


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
        few = len(run.rows) <= _FEW
        most = _ANSWER if few else _EXCERPT
        header = ["prompt", "text", "answer", "ended", "tokens", "cached", "TTFT ms", "total ms"]
        yield _folded("answer", header, [_answer(row, most) for row in run.rows], (0, 4, 5, 6, 7), few)
    if run.record is not None:
        yield _folded("configuration key", ["key", "value"], list(_flat(run.record.config)))
        yield _folded("sampling parameter", ["key", "value"], list(_flat(run.record.params)))
        yield _folded("version", ["package", "version"], [list(pair) for pair in run.record.versions.items()])


def _folded(
    what: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int] = (),
    is_open: bool = False,
) -> Section:
    """A folded table; `what`: the name of a row, in the singular."""
    count = f"{_count(len(rows))} {what}{'' if len(rows) == 1 else 's'}"
    shown = f"{count}, the first {_SHOWN}" if len(rows) > _SHOWN else count
    return Section(what, "", None, header, rows[:_SHOWN], numbers, shown, is_open)


def _answer(row: Mapping[str, Any], most: int) -> list[str]:
    samples, metrics = row["outputs"], row["metrics"]
    return [
        str(row["index"]),
        _excerpt(row["prompt"]),
        "\n".join(_cut(sample["text"].strip(), most) for sample in samples),
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
