"""`nanoengine bench`: the real commands, on the tiny shape and a CPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter
import typer
from typer.testing import Result

from nanoengine.lab.bench.roofline import Limits, least_seconds
from nanoengine.lab.bench.session import Setup
from nanoengine.lab.bench.shapes import SHAPES
from nanoengine.lab.bench.workloads import WORKLOADS
from nanoengine.lab.cli.bench import app
from nanoengine.lab.cli.bench_options import Common
from nanoengine.llm import LLM

triton_interpreter.import_kernels()  # before an engine imports them compiled
LIMITS = ("--bandwidth", "10", "--tflops", "0.05")
CPU = ("device=cpu", "--shape", "tiny", "--max-model-len", "1024")
Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(nanoengine: Callable[..., Result], tmp_path: Path) -> Bench:
    """Runs a command and reads what it wrote; its table is under "table"."""

    def run(*arguments: str) -> dict[str, Any]:
        result = nanoengine("bench", *arguments, "--json", "out.json")
        assert result.exit_code == 0, result.output
        return {**json.loads((tmp_path / "out.json").read_text()), "table": result.stdout}

    return run


def test_every_command_takes_the_common_options_but_those_that_mean_nothing_to_it() -> None:
    group: Any = typer.main.get_command(app)
    common = {each.name for each in fields(Common)}
    taken = {name: {each.name: each.default for each in command.params} for name, command in group.commands.items()}
    assert {name: common - defaults.keys() for name, defaults in taken.items() if common - defaults.keys()} == {
        "attention": {"given", "passes", "attention", "max_model_len"},
        "startup": {"bandwidth", "tflops"},
    }
    assert {name: defaults["max_model_len"] for name, defaults in taken.items() if name in ("prefix", "churn")} == {
        "prefix": 8192, "churn": 4096,
    }  # fmt: skip


def test_throughput_and_its_plot(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chosen = ("--workload", "d8", "--workload", "d64", "--workload", "ragged256")
    found = bench("throughput", *CPU, *chosen, "--scale", "0.04", "--passes", "2", *LIMITS, "--plot", "p.png")
    assert [row["workload"] for row in found["rows"]] == ["d8*0.04", "d64*0.04", "ragged256*0.04"]
    small = WORKLOADS["d64"]().scaled(0.04)
    row = found["rows"][1]
    assert row["limit"] == pytest.approx(
        small.counted / least_seconds(SHAPES["tiny"], Limits(10e9, 0.05e12, 4), small.lengths, 256)
    )
    assert row["best"] == max(row["each"]) >= row["median"] > 0
    assert row["best"] * row["best_seconds"] == pytest.approx(small.counted)
    assert row["requests"] == 3
    assert row["attention"] == "torch"
    assert [row["itl_ms"] is None for row in found["rows"]] == [False, False, True]
    assert f"{row['best'] / row['limit']:.0%}" in found["table"]
    assert found["settings"]["options"] == {"device": "cpu"}
    assert found["environment"]["torch"] == torch.__version__
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_it_does_is_said_meanwhile(nanoengine: Callable[..., Result]) -> None:
    """Beside the table: a pass of a large shape takes minutes."""
    result = nanoengine("bench", "throughput", *CPU, "--workload", "d1", "--scale", "0.02", "--passes", "2")
    assert result.stderr.splitlines() == ["d1*0.02: warming up", "d1*0.02: pass 1 of 2", "d1*0.02: pass 2 of 2"]
    assert "pass 1" not in result.stdout


def test_churn_mixes_prefill_with_decode(bench: Bench) -> None:
    found = bench("churn", *CPU, "--scale", "0.02", "--max-num-seqs", "4", "--passes", "1")
    (row,) = found["rows"]
    assert found["benchmark"] == "churn"
    assert (row["requests"], row["limit"]) == (41, None)
    assert row["mixed_steps"] > row["steps"] / 4


def test_prefill_counts_prompt_tokens(bench: Bench) -> None:
    found = bench("prefill", *CPU, "--length", "16", "--length", "100", "--tokens", "200", "--passes", "1", *LIMITS)
    assert [(row["workload"], row["counts"], row["requests"]) for row in found["rows"]] == [
        ("prefill12x16", "prompt", 12),
        ("prefill2x100", "prompt", 2),
    ]


def test_latency_of_batches_and_under_a_load(bench: Bench) -> None:
    sizes = ("--prompt-len", "8", "--output-len", "6", "--requests", "5", "--passes", "2")
    found = bench("latency", *CPU, "--batch", "1", "--batch", "3", "--rate", "100", *sizes, *LIMITS)
    batches, load = found["rows"][:2], found["rows"][2]
    assert [(row["batch"], row["requests"]) for row in batches] == [(1, 1), (3, 3)]
    assert (load["batch"], load["rate"], load["requests"], load["itl_limit_ms"]) == (None, 100, 5, None)
    for row in found["rows"]:
        assert 0 < row["itl"]["p50"] <= row["itl"]["p99"]
        assert row["ttft"]["p50"] + 5 * row["itl"]["p50"] <= 3 * row["e2e"]["p99"]
        assert row["ttft"]["p50"] < row["e2e"]["p50"]
    assert batches[1]["itl_limit_ms"] > batches[0]["itl_limit_ms"] > 0


def test_latency_of_one_token(bench: Bench) -> None:
    """It has no ITL: none in the table, and null in the JSON, which has no word for NaN."""
    found = bench("latency", *CPU, "--batch", "2", "--prompt-len", "8", "--output-len", "1", "--passes", "1")
    (row,) = found["rows"]
    assert row["itl"] is None
    assert 0 < row["ttft"]["p50"] == row["e2e"]["p50"]
    assert "nan" not in found["table"]


def test_prefix_hits_what_whole_blocks_allow(bench: Bench) -> None:
    blocks = ("--block-size", "16", "--block-size", "64")
    sizes = ("--requests", "5", "--shared", "100", "--own", "4", "--output-len", "2", "--passes", "1")
    found = bench("prefix", *CPU, *blocks, *sizes, *LIMITS)
    small, large, off = found["rows"]
    assert [(r["block_size"], r["cache"]) for r in found["rows"]] == [(16, True), (64, True), (16, False)]
    assert small["best_possible"] == pytest.approx(4 * 100 / (5 * 104))
    assert small["hit_rate"] == pytest.approx(4 * 96 / (5 * 104))
    assert large["hit_rate"] == pytest.approx(4 * 64 / (5 * 104))
    assert off["hit_rate"] == off["best_possible"] == 0
    assert small["limit"] < off["limit"]


def test_the_limits_are_those_of_all_ranks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of commands that run an engine; what its ranks do is none of the limit's business."""
    run = Setup.engine

    def of_one_rank(setup: Setup, **options: Any) -> AbstractContextManager[LLM]:
        rest = {name: value for name, value in setup.options.items() if name != "tensor_parallel_size"}
        return run(replace(setup, options=rest), **options)

    monkeypatch.setattr(Setup, "engine", of_one_rank)
    for command, limit, speeds_up in (
        (("throughput", "--workload", "d8", "--scale", "0.1"), "limit", 2),
        (("latency", "--batch", "2", "--prompt-len", "8", "--output-len", "3"), "itl_limit_ms", 0.5),
        (("prefix", "--requests", "2", "--shared", "32", "--own", "4", "--output-len", "2"), "limit", 0.5),
    ):
        one, two = (
            bench(*command, *CPU, *more, "--passes", "1", *LIMITS)["rows"][0][limit]
            for more in ((), ("tensor_parallel_size=2",))
        )
        assert two == pytest.approx(speeds_up * one), command


def test_sampler_beside_an_engine(bench: Bench) -> None:
    chosen = ("--case", "greedy", "--case", "top_k=50,top_p=0.95", "--rows", "1", "--engine-rows", "2")
    found = bench("sampler", *CPU, *chosen, "--output-len", "3", "--passes", "1", *LIMITS)
    assert [(r["case"], r["rows"]) for r in found["rows"]] == [
        ("greedy", 1), ("top_k=50,top_p=0.95", 1), ("greedy", 2), ("top_k=50,top_p=0.95", 2),
    ]  # fmt: skip
    assert [r["step_us"] is not None for r in found["rows"]] == [False, False, True, True]
    assert all(r["agrees"] and 0 < r["best_us"] <= r["us"] for r in found["rows"])
    assert all(r["cost"] < 1 for r in found["rows"][2:])
    assert {r["kernel"] for r in found["rows"]} == {"torch"}, "an engine on a CPU, kernels on a GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_attention_says_what_is_missing(nanoengine: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = nanoengine("bench", "attention", "--shape", "tiny")
    assert result.exit_code == 2
    assert "need a CUDA GPU" in result.output
    assert "TRITON_INTERPRET=1" in result.output


@pytest.mark.skipif(not triton_interpreter.INSTALLED, reason="triton is not installed")
def test_attention_in_small(bench: Bench) -> None:
    with triton_interpreter.interpreted():
        found = bench("attention", "--shape", "tiny", "--scale", "0.02", "--only", "8 x 512", "--block-size", "16")
    decode, prefill = found["rows"][0], found["rows"][-1]
    assert (decode["batch"], prefill["batch"]) == ("decode 8 x 512*0.02", "prefill 8 x 512 after 4096*0.02")
    assert decode["gb_s"] > 0
    assert prefill["tflops"] > 0
    assert all(row["error"] < 1e-5 or torch.cuda.is_available() for row in found["rows"])
    assert found["notes"] or torch.cuda.is_available(), "neither flash-attn nor a word about it"


@pytest.mark.slow
def test_startup_by_phase(bench: Bench) -> None:
    found = bench("startup", "device=cpu", "--shape", "tiny", "--passes", "1", "--max-model-len", "256")
    cold, warm = found["rows"]
    assert (cold["triton_cache"], warm["triton_cache"], warm["passes"]) == ("cold", "warm", 1)
    assert {"process", "import", "weights", "tokenizer", "first token"} <= warm["phases"].keys()
    assert sum(warm["phases"].values()) == pytest.approx(warm["best"])
    assert warm["phases"]["import"] > 0.1
    assert found["settings"]["weights"] == "on disk"


@pytest.mark.slow
def test_startup_shows_why_the_process_failed(nanoengine: Callable[..., Result]) -> None:
    result = nanoengine(
        "bench", "startup", "--shape", "tiny", "--passes", "1", "load_format=dummy", "max_num_sequences=1"
    )
    assert result.exit_code == 2
    assert "did you mean 'max_num_seqs'" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--shape", "qwen3-06b"], "did you mean 'qwen3-0.6b'"),
        (["throughput", "--workload", "d2"], "no workload 'd2'"),
        (["sampler", "--case", "top_k=40"], "no case 'top_k=40'"),
        (["latency", "--bandwidth", "4190"], "--bandwidth and --tflops together"),
        (["churn", "max_num_seqs"], "write OPTION=VALUE"),
        (["prefix", "--shape", "tiny", "bloc_size=16"], "did you mean 'block_size'"),
    ],
)
def test_mistakes_are_reported(nanoengine: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = nanoengine("bench", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_plot_without_matplotlib_stops_before_measuring(
    nanoengine: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "nanoengine.lab.bench.plot.find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    result = nanoengine("bench", "throughput", "--plot", "p.png")
    assert result.exit_code == 2
    assert "pip install 'nanoengine[plot]'" in result.output


@pytest.mark.gpu
def test_on_a_gpu_limits_are_measured_and_the_kernels_draw_what_torch_draws(bench: Bench) -> None:
    found = bench("sampler", "--shape", "qwen3-0.6b", "--rows", "3", "--engine-rows", "0")
    assert {(row["kernel"], row["agrees"], row["dtype"]) for row in found["rows"]} == {("triton", True, "bfloat16")}
    limits = found["settings"]["limits"]
    assert limits["bandwidth"] > 1e11
    assert limits["flops"] > 1e13
    assert all(row["us"] > 0.5 * row["limit_us"] for row in found["rows"])


@pytest.mark.gpu
def test_on_a_gpu_attention_is_right_and_below_the_limit(bench: Bench) -> None:
    found = bench("attention", "--shape", "llama-3.2-1b", "--only", "32 x 1024", "--quick")
    (*_, row) = [row for row in found["rows"] if row["kernel"] == "triton"]
    assert 0.05 < row["gb_s"] / row["limit"] < 1.1
    assert row["error"] < 0.05
    assert found["environment"]["gpu"] == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_on_a_gpu_startup_compiles_only_while_the_cache_is_cold(bench: Bench) -> None:
    found = bench("startup", "--shape", "tiny", "--passes", "1", "--max-model-len", "256")
    cold, warm = found["rows"]
    assert cold["best"] > warm["best"]
    assert warm["phases"]["capture"] > 0
