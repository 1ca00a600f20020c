"""Options that the commands of `nanoengine bench` share, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanoengine.api.errors import ConfigError, nearest, shown
from nanoengine.cli.common import answer, say
from nanoengine.cli.threads import CHOSEN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nanoengine.lab.bench.plot import Point
    from nanoengine.lab.bench.report import Report
    from nanoengine.lab.bench.roofline import Limits
    from nanoengine.lab.bench.session import Setup
    from nanoengine.lab.bench.shapes import Shape

Options = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OPTION=VALUE]...", help="Engine options, e.g. max_num_seqs=64 enforce_eager=true."),
]
ShapeName = Annotated[
    str, typer.Option("--shape", help="qwen3-0.6b, qwen3-8b, llama-3.2-1b, or tiny to try a command on a CPU.")
]
Passes = Annotated[int, typer.Option(min=1, help="Counted passes, after one to warm up.")]
Attention = Annotated[str, typer.Option(help="Attention backend.")]
MaxModelLen = Annotated[int, typer.Option(min=2, help="Longest prompt plus output.")]
Bandwidth = Annotated[
    float | None,
    typer.Option(min=1, help="The device's read bandwidth in GB/s, for the limit. Default: measured on a GPU."),
]
Tflops = Annotated[float | None, typer.Option(min=0.001, help="Its TFLOP/s of matrix products; with --bandwidth.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write rows, settings and environment here.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="PNG", help="Draw throughput and ITL against the batch size.")
]
Scale = Annotated[
    float,
    typer.Option(min=0.0001, max=1, help="Share of requests and of their tokens, for a quick look. Tells so in names."),
]


def shape_named(name: str) -> Shape:
    from nanoengine.lab.bench.shapes import SHAPES

    if name not in SHAPES:
        raise ConfigError(f"no shape {name!r}; {nearest(name, SHAPES)}")
    return SHAPES[name]


def engine_options(given: Sequence[str] | None) -> dict[str, Any]:
    """OPTION=VALUE arguments; values are YAML."""
    from nanoengine.setup.config.composer.yaml_file import load_yaml

    for each in given or ():
        if "=" not in each:
            raise ConfigError(f"{each!r} is no engine option: write OPTION=VALUE, as in max_num_seqs=64")
    pairs = [each.partition("=") for each in given or ()]
    return {key: load_yaml(value, f"{key}={shown(value)}", lambda _: "the value") for key, _, value in pairs}


def limits_of(bandwidth: float | None, tflops: float | None, options: dict[str, Any]) -> Limits | None:
    """As given; else measured where there is a GPU."""
    from nanoengine.lab.bench.roofline import Limits
    from nanoengine.lab.bench.timing import measured_limits

    if (bandwidth is None) != (tflops is None):
        raise ConfigError("give --bandwidth and --tflops together")
    on_gpu = _on_gpu(options)
    dtype = options.get("dtype", "auto")
    itemsize = 4 if dtype == "float32" or (dtype == "auto" and not on_gpu) else 2
    if bandwidth is not None and tflops is not None:
        return Limits(bandwidth * 1e9, tflops * 1e12, itemsize)
    return measured_limits(itemsize) if on_gpu else None


def _on_gpu(options: dict[str, Any]) -> bool:
    from nanoengine.lab.bench.timing import best_device

    return best_device(options.get("device", "auto")).type == "cuda"


def setup_of(
    shape: str,
    passes: int,
    max_model_len: int,
    attention: str,
    given: Sequence[str] | None,
    bandwidth: float | None,
    tflops: float | None,
) -> Setup:
    chosen, options = shape_named(shape), engine_options(given)
    if shape != "tiny" and not _on_gpu(options):
        say(f"{shape} on a CPU takes minutes, or hours; to try the command, --shape tiny and little of it")
    if (taken := CHOSEN.get()) is not None and not _on_gpu(options):
        say(taken.line())
    limits = limits_of(bandwidth, tflops, options)
    from nanoengine.lab.bench.session import Setup

    return Setup(
        shape=chosen,
        passes=passes,
        max_model_len=max_model_len,
        attention=attention,
        options=options,
        limits=limits,
        say=say,
    )


def finish(report: Report, output: Path | None) -> None:
    """The figures to the file, and then the table to standard output, which may have no reader any more."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        report.write(output)
        say(f"wrote {output}")
    answer(report.table())


@contextmanager
def plotting(path: Path | None, title: str) -> Iterator[list[Point]]:
    """Collects points and draws them at the end. What drawing needs is asked for before anything is measured."""
    from nanoengine.lab.bench import plot

    if path is not None:
        plot.need_matplotlib()
    points: list[Point] = []
    yield points
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot.draw(points, title, path)
        say(f"wrote {path}")
