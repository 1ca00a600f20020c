"""`nanoengine bench`: how fast the engine is, on made-up weights of a known shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from nanoengine.api.errors import ConfigError, nearest
from nanoengine.lab.cli.bench_options import Common, Plot, Scale, command, plotting

app = typer.Typer(help="Measure the engine.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Measure the engine."""


@command(app)
def throughput(
    common: Common,
    workload: Annotated[list[str] | None, typer.Option(help="May be given several times. Default: all.")] = None,
    scale: Scale = 1.0,
    plot: Plot = None,
) -> None:
    """Tokens a second of whole workloads: ragged256, d1, d8, d64, d256, prefill64, churn."""
    from nanoengine.lab.bench.workloads import WORKLOADS

    names = workload or list(WORKLOADS)
    for name in names:
        if name not in WORKLOADS:
            raise ConfigError(f"no workload {name!r}; {nearest(name, WORKLOADS)}")
    with plotting(plot, f"{common.shape}: throughput and ITL") as points:
        from nanoengine.lab.bench import throughput as bench
        from nanoengine.lab.bench.plot import Point

        report = bench.run(common.setup(), [WORKLOADS[name]().scaled(scale) for name in names])
        points += [Point(r.requests, r.best, r.itl_ms, r.limit) for r in report.rows if r.itl_ms is not None]
        common.finish(report)


@command(app)
def churn(
    common: Common,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests running at once.")] = 128,
    scale: Scale = 1.0,
) -> None:
    """Short requests that come and go, so that nearly every step has prefill and decode rows."""
    from nanoengine.lab.bench import throughput as bench
    from nanoengine.lab.bench.workloads import WORKLOADS

    workload = replace(WORKLOADS["churn"]().scaled(scale), max_num_seqs=max_num_seqs)
    common.finish(replace(bench.run(common.setup(), [workload]), benchmark="churn"))


@command(app)
def prefill(
    common: Common,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Of a prompt. Default: 128, 512, 1024, 4000.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens of a pass, in all.")] = 65536,
) -> None:
    """Prompt tokens a second, at several lengths of prompts; one token out of each."""
    from nanoengine.lab.bench import throughput as bench
    from nanoengine.lab.bench import workloads

    each = [workloads.prefill(max(1, tokens // n), n) for n in length or (128, 512, 1024, 4000)]
    common.finish(replace(bench.run(common.setup(), each), benchmark="prefill"))


@command(app)
def latency(
    common: Common,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 2, 4 and so on to 256.")] = None,
    rate: Annotated[
        list[float] | None, typer.Option(min=0.001, help="Also under an open load of so many requests a second.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of a pass under an open load.")] = 256,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens in, each request.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens out, each request.")] = 128,
    plot: Plot = None,
) -> None:
    """TTFT, ITL and whole requests in percentiles, as a streaming client sees them."""
    with plotting(plot, f"{common.shape}: throughput and ITL") as points:
        from nanoengine.lab.bench import latency as bench
        from nanoengine.lab.bench.plot import Point

        batches = batch or [2**i for i in range(9)]
        report = bench.run(common.setup(), batches, rate or (), prompt_len, output_len, requests)
        points += [
            Point(r.batch, r.tokens_per_s, r.itl.p50, r.itl_limit_ms and 1e3 * r.batch / r.itl_limit_ms, r.itl.p99)
            for r in report.rows
            if r.batch is not None and r.itl is not None
        ]
        common.finish(report)


@command(app, max_model_len=8192)
def prefix(
    common: Common,
    block_size: Annotated[list[int] | None, typer.Option(min=1, help="KV block sizes. Default: 16 and 256.")] = None,
    requests: Annotated[int, typer.Option(min=2)] = 64,
    shared: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that all share.")] = 4096,
    own: Annotated[int, typer.Option(min=1, help="Tokens of each prompt after them.")] = 128,
    output_len: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """A shared system prompt: what the prefix cache saves at several KV block sizes, against no cache."""
    from nanoengine.lab.bench import prefix as bench

    sizes = block_size or (16, 256)
    sizing = {"requests": requests, "shared": shared, "own": own, "output_len": output_len}
    common.finish(bench.run(common.setup(), sizes, **sizing))


@command(app)
def sampler(
    common: Common,
    case: Annotated[list[str] | None, typer.Option(help="greedy, top_k=50,top_p=0.95 ... Default: all.")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 8, 64, 256.")] = None,
    engine_rows: Annotated[int, typer.Option(min=0, help="Run a whole engine at that batch size too; 0: none.")] = 256,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens out of each of its requests.")] = 512,
) -> None:
    """Microseconds of sampling by case and rows, its share of a decode step, and what it costs a whole engine."""
    from nanoengine.lab.bench import sampler as bench

    names = case or list(bench.CASES)
    for name in names:
        if name not in bench.CASES:
            raise ConfigError(f"no case {name!r}; {nearest(name, bench.CASES)}")
    counts = sorted({*(rows or (1, 8, 64, 256)), *([engine_rows] if engine_rows else ())})
    cases = {name: bench.CASES[name] for name in names}
    setup = common.setup()
    common.finish(bench.run(setup, cases, counts, engine_rows=engine_rows or None, output_len=output_len))


@command(app, fixed={"given": None, "passes": 1, "attention": "triton", "max_model_len": 4096})
def attention(
    common: Common,
    block_size: Annotated[list[int] | None, typer.Option(min=16, help="KV block sizes. Default: 16 and 256.")] = None,
    only: Annotated[str, typer.Option(help="Batches whose name holds this, such as 'decode' or '8 x 2048'.")] = "",
    scale: Scale = 1.0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats.")] = False,
) -> None:
    """Our attention kernels next to flash-attn's, where it is installed: GB/s and TFLOP/s, L2 cache flushed."""
    from nanoengine.lab.bench import attention as bench

    common.finish(bench.run(common.setup(), block_size or (16, 256), only=only, scale=scale, quick=quick))


@command(app, fixed={"passes": 1, "bandwidth": None, "tflops": None})
def startup(
    common: Common,
    passes: Annotated[int, typer.Option(min=1, help="Processes with Triton's cache warm.")] = 5,
    cold_passes: Annotated[int, typer.Option(min=0, help="Processes with its cache empty.")] = 1,
) -> None:
    """Seconds from the start of a process to its first token, by phase; weights on local disk."""
    from nanoengine.lab.bench import startup as bench

    setup = replace(common, passes=passes).setup(quiet=True)
    common.finish(bench.run(setup, cold_passes=cold_passes))
