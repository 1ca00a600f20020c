"""Throughput and inter-token latency against the batch size, as a PNG. Needs matplotlib: the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nanoengine.api.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Point:
    """Output tokens/s and milliseconds per token at one batch size. `limit`: tokens/s of the roofline, or None."""

    batch: int
    tokens_per_s: float
    itl_ms: float
    limit: float | None = None
    itl_p99_ms: float | None = None


def need_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'nanoengine[plot]'")


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Draws the points and saves the PNG. Raises `ConfigError` if there are no points, or no matplotlib."""
    need_matplotlib()
    if not points:
        raise ConfigError("--plot: no result has a batch size; run workloads such as d1 and d256")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda p: p.batch)
    batches = [p.batch for p in points]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    speed, latency = figure.subplots(1, 2)
    speed.plot(batches, [p.tokens_per_s for p in points], marker="o", label="measured")
    if all(p.limit is not None for p in points):
        speed.plot(batches, [p.limit for p in points], linestyle="--", color="gray", label="limit")
    latency.plot(batches, [p.itl_ms for p in points], marker="o", label="ITL")
    if all(p.itl_p99_ms is not None for p in points):
        latency.plot(batches, [p.itl_p99_ms for p in points], marker=".", linestyle=":", label="ITL, 99th percentile")
    for axes, label, scale in ((speed, "output tokens/s", "log"), (latency, "ms per token", "linear")):
        axes.set(xlabel="batch size", ylabel=label, xscale="log", yscale=scale)
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
        axes.legend()
    latency.set_ylim(bottom=0)
    figure.suptitle(title)
    figure.savefig(path, dpi=120, format="png")
