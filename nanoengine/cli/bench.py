"""`nanoengine bench`: how fast the engine is, on made-up weights of a known shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from nanoengine.cli.bench_options import (
    Attention,
    Bandwidth,
    Json,
    MaxModelLen,
    Options,
    Passes,
    Plot,
    Scale,
    ShapeName,
    Tflops,
    finish,
    plotting,
    setup_of,
)
from nanoengine.cli.common import DebugOption, user_errors
from nanoengine.core.errors import ConfigError, nearest

app = typer.Typer(help="Measure the engine.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Measure the engine."""


@app.command()
def throughput(
    given: Options = None,
    shape: ShapeName = "qwen3-0.6b",
    workload: Annotated[list[str] | None, typer.Option(help="May be given several times. Default: all.")] = None,
    scale: Scale = 1.0,
    passes: Passes = 5,
    attention: Attention = "auto",
    max_model_len: MaxModelLen = 4096,
    bandwidth: Bandwidth = None,
    tflops: Tflops = None,
    output: Json = None,
    plot: Plot = None,
    debug: DebugOption = False,
) -> None:
    """Tokens a second of whole workloads: ragged256, d1, d8, d64, d256, churn, prefill64."""
    with user_errors(debug):
        from nanoengine.bench.workloads import WORKLOADS

        names = workload or list(WORKLOADS)
        for name in names:
            if name not in WORKLOADS:
                raise ConfigError(f"no workload {name!r}; {nearest(name, WORKLOADS)}")
        with plotting(plot, f"{shape}: throughput and ITL") as points:
            from nanoengine.bench import throughput as bench
            from nanoengine.bench.plot import Point

            setup = setup_of(shape, passes, max_model_len, attention, given, bandwidth, tflops)
            report = bench.run(setup, [WORKLOADS[name]().scaled(scale) for name in names])
            points += [Point(r.requests, r.best, r.itl_ms, r.limit) for r in report.rows if r.itl_ms is not None]
            finish(report, output)


@app.command()
def churn(
    given: Options = None,
    shape: ShapeName = "qwen3-0.6b",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests running at once.")] = 128,
    scale: Scale = 1.0,
    passes: Passes = 5,
    attention: Attention = "auto",
    max_model_len: MaxModelLen = 4096,
    bandwidth: Bandwidth = None,
    tflops: Tflops = None,
    output: Json = None,
    debug: DebugOption = False,
) -> None:
    """Short requests that come and go, so that nearly every step has prefill and decode rows."""
    with user_errors(debug):
        from nanoengine.bench import throughput as bench
        from nanoengine.bench.workloads import WORKLOADS

        setup = setup_of(shape, passes, max_model_len, attention, given, bandwidth, tflops)
        workload = replace(WORKLOADS["churn"]().scaled(scale), max_num_seqs=max_num_seqs)
        finish(replace(bench.run(setup, [workload]), benchmark="churn"), output)


@app.command()
def prefill(
    given: Options = None,
    shape: ShapeName = "qwen3-0.6b",
    length: Annotated[list[int] | None, typer.Option(min=1, help="Of a prompt. Default: 128, 512, 1024, 4000.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens of a pass, in all.")] = 65536,
    passes: Passes = 5,
    attention: Attention = "auto",
    max_model_len: MaxModelLen = 4096,
    bandwidth: Bandwidth = None,
    tflops: Tflops = None,
    output: Json = None,
    debug: DebugOption = False,
) -> None:
    """Prompt tokens a second, at several lengths of prompts; one token out of each."""
    with user_errors(debug):
        from nanoengine.bench import throughput as bench
        from nanoengine.bench import workloads

        setup = setup_of(shape, passes, max_model_len, attention, given, bandwidth, tflops)
        each = [workloads.prefill(max(1, tokens // n), n) for n in length or (128, 512, 1024, 4000)]
        finish(replace(bench.run(setup, each), benchmark="prefill"), output)
