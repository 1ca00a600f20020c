"""`nanoengine bench`: how fast the engine is, on made-up weights of a known shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nanoengine.cli.common import DebugOption, say, user_errors
from nanoengine.core.errors import ConfigError, nearest

app = typer.Typer(help="Measure the engine.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Measure the engine."""


@app.command()
def throughput(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPTION=VALUE]...", help="Engine options, e.g. max_num_seqs=64 enforce_eager=true."),
    ] = None,
    shape: Annotated[str, typer.Option(help="qwen3-0.6b or qwen3-8b.")] = "qwen3-0.6b",
    workload: Annotated[list[str] | None, typer.Option(help="May be given several times. Default: all.")] = None,
    passes: Annotated[int, typer.Option(min=1, help="Counted passes, after one to warm up.")] = 5,
    attention: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    max_model_len: Annotated[int, typer.Option(min=2)] = 4096,
    bandwidth: Annotated[float | None, typer.Option(help="The device's read bandwidth in GB/s, for the limit.")] = None,
    tflops: Annotated[float | None, typer.Option(help="The device's TFLOP/s of products, for the limit.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    debug: DebugOption = False,
) -> None:
    """Tokens a second of whole workloads: ragged256, d1, d8, d64, d256, churn, prefill64."""
    with user_errors(debug):
        import yaml

        from nanoengine.bench import throughput as bench
        from nanoengine.bench.shapes import SHAPES
        from nanoengine.bench.workloads import WORKLOADS, Limits

        if shape not in SHAPES:
            raise ConfigError(f"no shape {shape!r}; {nearest(shape, SHAPES)}")
        names = workload or list(WORKLOADS)
        for name in names:
            if name not in WORKLOADS:
                raise ConfigError(f"no workload {name!r}; {nearest(name, WORKLOADS)}")
        if (bandwidth is None) != (tflops is None):
            raise ConfigError("give --bandwidth and --tflops together")
        pairs = [each.partition("=") for each in overrides or ()]
        rows = bench.run(
            bench.Run(
                shape=SHAPES[shape],
                workloads=names,
                passes=passes,
                max_model_len=max_model_len,
                attention=attention,
                options={key: yaml.safe_load(value) for key, _, value in pairs},
                limits=None if bandwidth is None or tflops is None else Limits(bandwidth * 1e9, tflops * 1e12),
            )
        )
        if output is not None:
            output.write_text(json.dumps(bench.as_dict(rows), indent=2) + "\n")
            say(f"wrote {output}")
        typer.echo(bench.table(rows))
