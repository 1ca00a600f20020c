"""The options that all commands of `nanoengine bench` have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from nanoengine.api.errors import ConfigError, nearest, shown
from nanoengine.cli.common import DebugOption, answer, say, user_errors
from nanoengine.cli.threads import CHOSEN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nanoengine.lab.bench.plot import Point
    from nanoengine.lab.bench.report import Report
    from nanoengine.lab.bench.roofline import Limits
    from nanoengine.lab.bench.session import Setup
    from nanoengine.lab.bench.shapes import Shape

Scale = Annotated[
    float,
    typer.Option(min=0.0001, max=1, help="Share of requests and of their tokens, for a quick look. Shown in names."),
]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="PNG", help="Draw throughput and ITL against the batch size.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The options of every command. Each field is an option."""

    given: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPTION=VALUE]...", help="Engine options, e.g. max_num_seqs=64 enforce_eager=true."),
    ] = None
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            help="qwen3-0.6b, qwen3-8b, llama-3.2-1b, qwen3-30b-a3b, or tiny and tiny-moe to try a command on a CPU.",
        ),
    ] = "qwen3-0.6b"
    passes: Annotated[int, typer.Option(min=1, help="Number of measured passes, after one to warm up.")] = 5
    attention: Annotated[str, typer.Option(help="Attention backend.")] = "auto"
    max_model_len: Annotated[int, typer.Option(min=2, help="Most tokens of prompt and output together.")] = 4096
    bandwidth: Annotated[
        float | None,
        typer.Option(min=1, help="The device's read bandwidth in GB/s, for the limit. Default: measured on a GPU."),
    ] = None
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="The device's TFLOP/s of matrix products; with --bandwidth.")
    ] = None
    output: Annotated[Path | None, typer.Option("--json", help="Write rows, settings and environment here.")] = None
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Begin on a CPU, too, where it may take hours.")] = False
    debug: DebugOption = False

    def setup(self, *, quiet: bool = False) -> Setup:
        """What to measure. `quiet`: without limits of the device and without messages."""
        from nanoengine.lab.bench.session import Setup

        chosen, options = shape_named(self.shape), engine_options(self.given)
        engine: dict[str, Any] = {"max_model_len": self.max_model_len, "attention": self.attention, "options": options}
        limits = None if quiet else limits_of(self.bandwidth, self.tflops, options)
        if not (self.yes or self.shape.startswith("tiny") or _on_gpu(options)):
            raise ConfigError(
                f"{self.shape} on a CPU takes minutes or hours: try the command with --shape tiny, or begin with --yes"
            )
        if quiet:
            return Setup(shape=chosen, passes=self.passes, **engine)
        if (taken := CHOSEN.get()) is not None and not _on_gpu(options):
            say(taken.line())
        return Setup(shape=chosen, passes=self.passes, limits=limits, say=say, **engine)

    def finish(self, report: Report) -> None:
        """Writes the file, then prints the table: standard output may have no reader any more."""
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            report.write(self.output)
            say(f"wrote {self.output}")
        answer(report.table())


def command(
    app: typer.Typer, fixed: Mapping[str, Any] | None = None, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes `function(common, own options)` a command of `app` with its own options and those of `Common`.

    `fixed`: values of common options that the command does not have. `defaults`: defaults that differ from `Common`.
    """
    left = {} if fixed is None else fixed

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(Common, include_extras=True)
        _, *parameters = inspect.signature(function, eval_str=True).parameters.values()
        own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        common = [
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(each.name, each.default),
                annotation=hints[each.name],
            )
            for each in fields(Common) if each.name not in left
        ]  # fmt: skip

        @wraps(function)
        def run(**values: Any) -> None:
            given = Common(**left, **{each.name: values.pop(each.name) for each in common})
            with user_errors(given.debug):
                function(given, **values)

        run.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
        app.command()(run)
        return function

    return register


def shape_named(name: str) -> Shape:
    from nanoengine.lab.bench.shapes import SHAPES

    if name not in SHAPES:
        raise ConfigError(f"no shape {name!r}; {nearest(name, SHAPES)}")
    return SHAPES[name]


def engine_options(given: Sequence[str] | None) -> dict[str, Any]:
    """Engine options from OPTION=VALUE arguments. Values are YAML."""
    from nanoengine.setup.config.composer.yaml_file import load_yaml

    for each in given or ():
        if "=" not in each:
            raise ConfigError(f"{each!r} is not an engine option: write OPTION=VALUE, as in max_num_seqs=64")
    pairs = [each.partition("=") for each in given or ()]
    return {key: load_yaml(value, f"{key}={shown(value)}", lambda _: "the value") for key, _, value in pairs}


def limits_of(bandwidth: float | None, tflops: float | None, options: dict[str, Any]) -> Limits | None:
    """The given limits; without them, measured ones if there is a GPU."""
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


@contextmanager
def plotting(path: Path | None, title: str) -> Iterator[list[Point]]:
    """A context that collects points and draws them at its end. Checks first that they can be drawn and saved."""
    from nanoengine.lab.bench import plot

    if path is not None:
        plot.need_matplotlib()
    points: list[Point] = []
    yield points
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot.draw(points, title, path)
        say(f"wrote {path}")
