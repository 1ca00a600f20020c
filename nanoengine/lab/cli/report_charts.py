"""The pictures of a report, as SVG for an HTML page. Needs matplotlib: the extra `plot`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanoengine.lab.cli.report_data import Floats, RunData, Steps
from nanoengine.lab.cli.sweep_report import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREEN, ORANGE, RED, GREY = "#4472b0", "#55a06a", "#dd8a3c", "#c44e52", "#8a8f98"
_BINS = 400  # most columns of a picture over time: a screen does not show more
_LEAST = 2  # values of a distribution that is drawn; the tiles say fewer
_WIDTH = 10.5  # inches
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",  # texts are kept as texts
    "savefig.transparent": True,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture. `svg`: an element for a page with other pictures. `text`: a description, for screen readers."""

    text: str
    svg: str


@contextmanager
def styled() -> Iterator[None]:
    """A context with the style of our pictures. Raises `ImportError` without matplotlib."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def run_pictures(run: RunData) -> dict[str, Picture]:
    """Name -> picture, for all pictures for which the run has figures."""
    found: dict[str, Picture] = {}
    if len(run.metric("ttft")) >= _LEAST:
        found["latencies"] = _picture(_latencies(run), "distributions of time to first token and time between tokens")
    if sum(row["error"] is None for row in run.rows) > 1:
        found["prefixes"] = _picture(_prefixes(run), "prompt tokens by prompt, computed and from the prefix cache")
    if run.steps is not None and len(run.steps):
        found["timeline"] = _picture(_timeline(run.steps), "throughput, batch, requests and KV blocks over time")
        found["steps"] = _picture(_step_times(run.steps), "durations of steps, and what the engine did in them")
    return found


def comparison_pictures(runs: Sequence[RunData]) -> dict[str, Picture]:
    """Pictures that compare several runs: medians, and whole distributions."""
    drawn = [run for run in runs if run.outcome.tokens_per_second is not None]
    found: dict[str, Picture] = {}
    if drawn:
        found["bars"] = _picture(draw([run.outcome for run in drawn]), "throughput, TTFT and ITL of each combination")
    if any(len(run.metric("ttft")) > 1 for run in runs):
        found["shares"] = _picture(_shares(runs), "share of the requests below each latency, one line per combination")
    return found


# -- one run ---------------------------------------------------------------------------------------------------------


def _latencies(run: RunData) -> Figure:
    figure, panels = _figure(2.9, 1, 3)
    for axes, name, title in (
        (panels[0], "ttft", "time to first token"),
        (panels[1], "itl", "time between tokens"),
        (panels[2], "latency", "whole request"),
    ):
        _histogram(axes, run.metric(name), title, "requests")
    return figure


def _histogram(axes: Axes, values: Floats, title: str, counted: str) -> None:
    in_seconds = len(values) > 0 and np.median(values) >= 1000
    axes.set_title(f"{title}, {'s' if in_seconds else 'ms'}")
    axes.set_ylabel(counted)
    if not len(values):
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=GREY)
        return
    unit = 1000 if in_seconds else 1
    axes.hist(values / unit, bins=min(40, max(5, len(values) // 4)), color=BLUE, alpha=0.75)
    for share, style in ((50, "-"), (99, ":")):
        at = float(np.percentile(values, share))
        axes.axvline(at / unit, color=RED, linestyle=style, linewidth=1.3, label=f"p{share}: {milliseconds(at)}")
    axes.yaxis.set_major_locator(_integers())
    _legend_below(axes)


def _prefixes(run: RunData) -> Figure:
    """One bar per prompt. If there are too many prompts, each bar is the mean of several."""
    rows = [row for row in run.rows if row["error"] is None]
    cached = np.array([row["num_cached_tokens"] for row in rows], dtype=float)
    whole = np.array([len(row["prompt_token_ids"]) for row in rows], dtype=float)
    each = -(-len(rows) // 150)
    cuts = np.arange(0, len(rows), each)
    sizes = np.diff([*cuts, len(rows)])
    cached, whole = (np.add.reduceat(values, cuts) / sizes for values in (cached, whole))
    figure, [axes] = _figure(2.2, 1, 1)
    axes.bar(cuts, cached, width=each * 0.9, align="edge", color=GREEN, label="from the prefix cache")
    axes.bar(cuts, whole - cached, width=each * 0.9, align="edge", bottom=cached, color=BLUE, label="computed")
    axes.set_title("prompt tokens" + (f" (means of {each} prompts)" if each > 1 else ""))
    axes.set_xlabel("prompt")
    axes.xaxis.set_major_locator(_integers())
    _legend(axes)
    return figure


def _timeline(steps: Steps) -> Figure:
    figure, (generated, prompt, rows, requests, blocks) = _figure(9, 5, 1, sharex=True)
    edges = np.linspace(steps["start"][0], max(steps["end"][-1], steps["start"][0] + 1e-6), _bins(steps) + 1)
    width = edges[1] - edges[0]
    for axes, name, color, title in (
        (generated, "new_tokens", BLUE, "generated tokens/s"),
        (prompt, "prefill_tokens", ORANGE, "prompt tokens computed/s"),
    ):
        counted = np.histogram(steps["end"], edges, weights=steps[name])[0] / width
        axes.stairs(counted, edges, fill=True, color=color, alpha=0.8)
        axes.set_title(title)
    layers = [(steps["decode_rows"], BLUE, "decode"), (steps["prefill_rows"], ORANGE, "prefill")]
    _areas(rows, edges, steps, layers)
    rows.set_title("rows of a step")
    for name, color in (("running", BLUE), ("waiting", GREY)):
        values = steps[name][_largest(edges, steps, steps[name])]
        requests.stairs(values, edges, baseline=None, color=color, label=name, linewidth=1.4)
    requests.set_title("requests")
    layers = [
        (steps["shared"], GREEN, "shared"),
        (steps["used"] - steps["shared"], BLUE, "owned by one request"),
        (steps["cached"], "#c9d3df", "cached"),
    ]
    _areas(blocks, edges, steps, layers)
    total = steps["total"][0]
    if np.max(steps["used"] + steps["cached"]) > total / 10:  # else only the line would be visible
        blocks.axhline(total, color=RED, linestyle="--", linewidth=1, label=f"all {total:,.0f}")
    if steps.preempted:
        at = [moment for moment, *_ in steps.preempted]
        blocks.plot(at, [total] * len(at), "v", color=RED, markersize=5, label=f"{len(at)} preemptions")
    blocks.set_title(f"KV blocks, of {total:,.0f}")
    blocks.set_xlabel("seconds since the trace began")
    for axes in (generated, prompt, rows, requests, blocks):
        axes.set_ylim(bottom=0)
    for axes in (rows, requests, blocks):
        _legend(axes)
    blocks.set_xlim(edges[0], edges[-1])
    return figure


def _bins(steps: Steps) -> int:
    return min(_BINS, max(10, len(steps) // 3))


def _areas(axes: Axes, edges: Floats, steps: Steps, layers: Sequence[tuple[Floats, str, str]]) -> None:
    """Draws stacked areas, from the bottom up. `layers`: (values [steps], colour, label) of each."""
    which = _largest(edges, steps, np.sum([values for values, *_ in layers], axis=0))
    below = np.zeros(len(which))
    for values, color, label in layers:
        above = below + values[which]
        axes.stairs(above, edges, baseline=below, fill=True, color=color, alpha=0.8, label=label)
        below = above


def _largest(edges: Floats, steps: Steps, values: Floats) -> npt.NDArray[np.int64]:
    """[bins] the index of a step for each bin: of the steps that ended in it, the one with the largest value.

    A bin without steps has the step of the bin before.
    """
    bins = np.clip(np.searchsorted(edges, steps["end"], side="left") - 1, 0, len(edges) - 2)
    order = np.lexsort((values, bins))  # the largest value of each bin is last
    last = np.flatnonzero(np.diff(bins[order], append=len(edges)))
    found = np.zeros(len(edges) - 1, dtype=np.int64)
    found[bins[order[last]]] = last
    return order[np.maximum.accumulate(found)]


def _step_times(steps: Steps) -> Figure:
    figure, (durations, phases) = _figure(2.9, 1, 2)
    length = 1000 * (steps["end"] - steps["start"])
    pure = steps["prefill_rows"] == 0
    kinds = [(length[pure], BLUE, "decode only"), (length[~pure], ORANGE, "with prefill")]
    kinds = [each for each in kinds if len(each[0])]
    low, high = max(length.min(), 1e-3), max(length.max(), 2e-3)
    durations.hist(
        [values for values, _, _ in kinds],
        bins=np.geomspace(low, high * 1.001, 41),
        stacked=True,
        color=[color for _, color, _ in kinds],
        label=[f"{label}: {len(values):,}, median {milliseconds(np.median(values))}" for values, _, label in kinds],
    )
    durations.set(xscale="log", ylabel="steps", title="duration of a step on the device, ms")
    durations.set_xlim(low * 0.9, high * 1.1)
    _plain_numbers(durations)
    _legend_below(durations)
    names = ("schedule", "launch", "wait", "commit")
    for place, (name, color) in enumerate(zip(names, (BLUE, BLUE, GREY, BLUE), strict=True)):
        mean, high = (max(1000 * value, 1e-3) for value in (steps[name].mean(), np.percentile(steps[name], 99)))
        phases.hlines(place, mean, max(mean, high), color=color, linewidth=2)
        phases.plot([mean], [place], "o", color=color, markersize=7)
        text = f"{milliseconds(mean)} (p99 {milliseconds(high)})"
        phases.annotate(text, (max(mean, high), place), (8, 0), textcoords="offset points", va="center", fontsize=8)
    phases.set_yticks(range(len(names)), names)
    phases.set(xscale="log", ylim=(len(names) - 0.5, -0.5), title="the engine in a step, ms (mean; line to p99)")
    low, high = phases.get_xlim()
    phases.set_xlim(low / 2, high * (high / low) ** 0.6)  # room for the texts
    _plain_numbers(phases)
    return figure


# -- several runs ----------------------------------------------------------------------------------------------------


def _shares(runs: Sequence[RunData]) -> Figure:
    figure, panels = _figure(3.4, 1, 2)
    for axes, name, title in (
        (panels[0], "ttft", "time to first token, ms"),
        (panels[1], "itl", "time between tokens, ms"),
    ):
        for run in runs:
            values = np.sort(run.metric(name))
            if len(values):
                label = f"#{run.outcome.number}"
                axes.plot(values, np.arange(1, len(values) + 1) / len(values), drawstyle="steps-post", label=label)
        axes.set(title=title, ylabel="share of the requests", ylim=(0, 1.02), xscale="log")
        _plain_numbers(axes)
        if axes.lines:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# -- both ------------------------------------------------------------------------------------------------------------


def milliseconds(value: float) -> str:
    """The time as text, with three digits; from a second on in seconds."""
    if value >= 1000:
        return f"{value / 1000:,.3g} s" if value < 1e6 else f"{value / 1000:,.0f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _figure(height: float, rows: int, columns: int, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, **options))
    for axes in panels.flat:
        axes.grid(True, alpha=0.25)
        axes.margins(x=0.01)
    return figure, panels


def _integers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _plain_numbers(axes: Axes) -> None:
    """Labels of a logarithmic axis as 1, 2, 5, 10, 20 and so on, not as powers of ten; never fewer than two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axes.xaxis.set_major_locator(MaxNLocator(6) if high < 10 * low else LogLocator(subs=subs, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _legend(axes: Axes) -> None:
    """Adds a legend next to the title, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=5, fontsize=8)


def _legend_below(axes: Axes) -> None:
    """Adds a legend under the axis, for narrow panels, where it would hide bars or meet the title."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)


def _picture(figure: Figure, text: str) -> Picture:
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return Picture(text, svg[svg.index("<svg") :])


def page_ids(pictures: Sequence[Picture]) -> list[str]:
    """The SVG of pictures, with ids that are unique in a page: all pictures use the same names of ids."""
    return [_with_prefix(picture.svg, f"p{number}-") for number, picture in enumerate(pictures)]


def _with_prefix(svg: str, prefix: str) -> str:
    """The SVG with a prefix for all ids and references to them."""
    change: Callable[[re.Match[str]], str] = lambda found: f"{found[1]}{prefix}"  # noqa: E731
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(\bid="|href="#|url\(#)', change, svg)
