"""`nanoengine bench`: how fast the engine is, on made-up weights of a known shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from nanoengine.api.errors import ConfigError, nearest
from nanoengine.cli.common import DebugOption, user_errors
from nanoengine.lab.cli.bench_options import (
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
    engine_options,
    finish,
    plotting,
    setup_of,
    shape_named,
)

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
    """Tokens a second of whole workloads: ragged256, d1, d8, d64, d256, prefill64, churn."""
    with user_errors(debug):
        from nanoengine.lab.bench.workloads import WORKLOADS

        names = workload or list(WORKLOADS)
        for name in names:
            if name not in WORKLOADS:
                raise ConfigError(f"no workload {name!r}; {nearest(name, WORKLOADS)}")
        with plotting(plot, f"{shape}: throughput and ITL") as points:
            from nanoengine.lab.bench import throughput as bench
            from nanoengine.lab.bench.plot import Point

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
        from nanoengine.lab.bench import throughput as bench
        from nanoengine.lab.bench.workloads import WORKLOADS

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
        from nanoengine.lab.bench import throughput as bench
        from nanoengine.lab.bench import workloads

        setup = setup_of(shape, passes, max_model_len, attention, given, bandwidth, tflops)
        each = [workloads.prefill(max(1, tokens // n), n) for n in length or (128, 512, 1024, 4000)]
        finish(replace(bench.run(setup, each), benchmark="prefill"), output)


@app.command()
def latency(
    given: Options = None,
    shape: ShapeName = "qwen3-0.6b",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 2, 4 and so on to 256.")] = None,
    rate: Annotated[
        list[float] | None, typer.Option(min=0.001, help="Also under an open load of so many requests a second.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of a pass under an open load.")] = 256,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens in, each request.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens out, each request.")] = 128,
    passes: Passes = 5,
    attention: Attention = "auto",
    max_model_len: MaxModelLen = 4096,
    bandwidth: Bandwidth = None,
    tflops: Tflops = None,
    output: Json = None,
    plot: Plot = None,
    debug: DebugOption = False,
) -> None:
    """TTFT, ITL and whole requests in percentiles, as a streaming client sees them."""
    with user_errors(debug), plotting(plot, f"{shape}: throughput and ITL") as points:
        from nanoengine.lab.bench import latency as bench
        from nanoengine.lab.bench.plot import Point

        setup = setup_of(shape, passes, max_model_len, attention, given, bandwidth, tflops)
        report = bench.run(setup, batch or [2**i for i in range(9)], rate or (), prompt_len, output_len, requests)
        points += [
            Point(r.batch, r.tokens_per_s, r.itl.p50, r.itl_limit_ms and 1e3 * r.batch / r.itl_limit_ms, r.itl.p99)
            for r in report.rows
            if r.batch is not None and r.itl is not None
        ]
        finish(report, output)


@app.command()
def prefix(
    given: Options = None,
    shape: ShapeName = "qwen3-0.6b",
    block_size: Annotated[list[int] | None, typer.Option(min=1, help="KV block sizes. Default: 16 and 256.")] = None,
    requests: Annotated[int, typer.Option(min=2)] = 64,
    shared: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that all share.")] = 4096,
    own: Annotated[int, typer.Option(min=1, help="Tokens of each prompt behind them.")] = 128,
    output_len: Annotated[int, typer.Option(min=1)] = 16,
    passes: Passes = 5,
    attention: Attention = "auto",
    max_model_len: MaxModelLen = 8192,
    bandwidth: Bandwidth = None,
    tflops: Tflops = None,
    output: Json = None,
    debug: DebugOption = False,
) -> None:
    """A shared system prompt: what the prefix cache saves at several KV block sizes, against no cache."""
    with user_errors(debug):
        from nanoengine.lab.bench import prefix as bench

        setup = setup_of(shape, passes, max_model_len, attention, given, bandwidth, tflops)
        sizes = block_size or (16, 256)
        finish(bench.run(setup, sizes, requests=requests, shared=shared, own=own, output_len=output_len), output)


@app.command()
def sampler(
    given: Options = None,
    shape: ShapeName = "qwen3-0.6b",
    case: Annotated[list[str] | None, typer.Option(help="greedy, top_k=50,top_p=0.95 ... Default: all.")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 8, 64, 256.")] = None,
    engine_rows: Annotated[int, typer.Option(min=0, help="Run a whole engine at that batch size too; 0: none.")] = 256,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens out of each of its requests.")] = 512,
    passes: Passes = 5,
    attention: Attention = "auto",
    max_model_len: MaxModelLen = 4096,
    bandwidth: Bandwidth = None,
    tflops: Tflops = None,
    output: Json = None,
    debug: DebugOption = False,
) -> None:
    """Microseconds of sampling by case and rows, its share of a decode step, and what it costs a whole engine."""
    with user_errors(debug):
        from nanoengine.lab.bench import sampler as bench

        names = case or list(bench.CASES)
        for name in names:
            if name not in bench.CASES:
                raise ConfigError(f"no case {name!r}; {nearest(name, bench.CASES)}")
        setup = setup_of(shape, passes, max_model_len, attention, given, bandwidth, tflops)
        counts = sorted({*(rows or (1, 8, 64, 256)), *([engine_rows] if engine_rows else ())})
        cases = {name: bench.CASES[name] for name in names}
        finish(bench.run(setup, cases, counts, engine_rows=engine_rows or None, output_len=output_len), output)


@app.command()
def attention(
    shape: ShapeName = "qwen3-0.6b",
    block_size: Annotated[list[int] | None, typer.Option(min=16, help="KV block sizes. Default: 16 and 256.")] = None,
    only: Annotated[str, typer.Option(help="Batches whose name holds this, such as 'decode' or '8 x 2048'.")] = "",
    scale: Scale = 1.0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats.")] = False,
    bandwidth: Bandwidth = None,
    tflops: Tflops = None,
    output: Json = None,
    debug: DebugOption = False,
) -> None:
    """Our attention kernels beside flash-attn's, where it is installed: GB/s and TFLOP/s, L2 cache flushed."""
    with user_errors(debug):
        from nanoengine.lab.bench import attention as bench

        setup = setup_of(shape, 1, 4096, "triton", None, bandwidth, tflops)
        finish(bench.run(setup, block_size or (16, 256), only=only, scale=scale, quick=quick), output)


@app.command()
def startup(
    given: Options = None,
    shape: ShapeName = "qwen3-0.6b",
    passes: Annotated[int, typer.Option(min=1, help="Processes with Triton's cache warm.")] = 5,
    cold_passes: Annotated[int, typer.Option(min=0, help="Processes with its cache empty.")] = 1,
    attention: Attention = "auto",
    max_model_len: MaxModelLen = 4096,
    output: Json = None,
    debug: DebugOption = False,
) -> None:
    """Seconds from the start of a process to its first token, by phase; weights on local disk."""
    with user_errors(debug):
        from nanoengine.lab.bench import startup as bench
        from nanoengine.lab.bench.session import Setup

        setup = Setup(
            shape=shape_named(shape),
            passes=passes,
            max_model_len=max_model_len,
            attention=attention,
            options=engine_options(given),
        )
        finish(bench.run(setup, cold_passes=cold_passes), output)
