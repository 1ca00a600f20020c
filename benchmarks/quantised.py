"""Whole engines with weights or K and V in fewer bits, beside the model's dtype: decode of 1 and of 256 requests.

    python benchmarks/quantised.py [--only bf16 fp8 int4 q4_k] [--shape qwen3-8b] [--passes 2] [--out FILE]
    python benchmarks/quantised.py --shape qwen3-0.6b --only bf16 kv-fp8 kv-int8 --workload d256
    python benchmarks/quantised.py --only bf16 fp8 fp8~eight_bit_streamed kv-fp8~attention_codes
    python benchmarks/quantised.py --check                        # on a CPU, small

All in one process, one engine after the other, random weights of a shape; the output layer and the embedding stay in
bfloat16. `fp8` is quantised while loading; `int4` is what a config of AWQ describes (groups of 128, zeros), `q4_k`
what one of a GGUF file does. Behind a case are kernels that `engine.kernels` turns on (+) or off (~). The workloads
are those of `nanoengine bench throughput`. "step" is the time of a pass over its output tokens of one request, the
prompts' time included; "bytes" what a decode step must read at least: all weights but the embedding, and K and V of
the mean context. "limit" is the time of a pass in which the weights of each step are read once, or multiplied (eight-
bit products at twice the speed of bfloat16 ones, others at that), and K and V are read once.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanoengine import LLM
from nanoengine.lab.bench.report import environment
from nanoengine.lab.bench.roofline import Limits
from nanoengine.lab.bench.session import one_pass
from nanoengine.lab.bench.shapes import SHAPES, Shape
from nanoengine.lab.bench.timing import measured_limits
from nanoengine.lab.bench.workloads import WORKLOADS, Workload, uniform

MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bf16": {}, "fp8": {"quantization": "fp8"}, "int8": {"quantization": "int8"}, "int4": {}, "q4_k": {},
    "kv-fp8": {"kv_dtype": "fp8"}, "kv-int8": {"kv_dtype": "int8"},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A case and a workload: tokens/s of each pass, ms a step, and bytes and ms of what bounds it."""

    case: str
    workload: str
    rates: tuple[float, ...]
    step_ms: float
    step_bytes: int
    limit_ms: float | None


def options_of(case: str) -> dict[str, Any]:
    """Of "fp8~eight_bit_streamed": `quantization` and `kernels`. Raises `argparse.ArgumentTypeError`."""
    name, *changes = re.split(r"(?=[+~])", case)
    if name not in OPTIONS:
        raise argparse.ArgumentTypeError(f"no case is called {name!r}; there are {', '.join(OPTIONS)}")
    return {**OPTIONS[name], "kernels": {each[1:]: each[0] == "+" for each in changes}}


def named(case: str) -> str:
    options_of(case)
    return case


def config_of(case: str, shape: Shape) -> dict[str, Any]:
    """Of small shapes groups and blocks are those of 32 inputs."""
    config, small = shape.hf_config(4096), shape.hidden % 256 != 0
    if case.startswith("int4"):
        config["quantization_config"] = {**AWQ, "group_size": 32} if small else AWQ
    if case.startswith("q4_k"):
        kind = "Q4_0" if small else "Q4_K"
        types = {f"model.layers.{i}.{name}": kind for i in range(shape.layers) for name in MODULES}
        config["quantization_config"] = {"quant_method": "gguf", "types": types, "expanded": {}}
    return config


def fill_blocks(model: nn.Module) -> None:
    """Dummy blocks are zeros: any codes instead, with scales that give weights of about 0.02."""
    for each in model.parameters():
        if each.dtype == torch.uint8:
            each.data.random_(0, 256)
            heads = each.data[..., 2048:].view(*each.shape[:2], 16, 16)  # of `kernels/gguf_fragments`
            heads[..., :4] = torch.tensor([1e-4, 5e-4], dtype=torch.float16, device=each.device).view(torch.uint8)


def weight_bytes(model: nn.Module) -> int:
    """Of all weights that a step reads."""
    embedding = {id(each) for each in model.model.embed_tokens.parameters()}
    head = {id(each) for each in model.lm_head.parameters()}
    return sum(each.nbytes for each in model.parameters() if id(each) not in embedding or id(each) in head)


def measure(case: str, shape: Shape, workloads: list[Workload], passes: int, limits: Limits | None) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config_of(case, shape)))
        rows = max(len(each.prompts) for each in workloads)
        options = {"max_model_len": 4096, "max_num_seqs": rows, **options_of(case)}
        with LLM(folder, load_format="dummy", **options) as llm:
            runner = llm.engine._executor.runner  # type: ignore[attr-defined]
            if case.startswith("q4_k") and runner.device.type == "cuda":
                fill_blocks(runner.model)
            weights, kv_byte = weight_bytes(runner.model), 132 / 128 if case.startswith("kv") else 2.0
            for work in workloads:
                one_pass(llm, work)  # compiles and captures what its steps need
                seconds = [one_pass(llm, work) for _ in range(passes)]
                yield row_of(case, shape, work, seconds, weights, kv_byte, limits)


def row_of(
    case: str, shape: Shape, work: Workload, seconds: list[float], weights: int, kv_byte: float, limits: Limits | None
) -> Row:
    count, (prompt, output) = len(work.prompts), work.lengths[0]
    kv = count * (prompt + output / 2) * shape.kv_per_token * kv_byte
    limit = None
    if limits is not None:
        speed = limits.flops * (2 if case.startswith("fp8") else 1)
        layers, head = shape.layers * shape.layer_weights, shape.vocab * shape.hidden
        products = 2 * count * (layers / speed + head / limits.flops)
        prefill = 2 * layers * count * prompt / speed
        limit = max(weights / limits.bandwidth, products) + kv / limits.bandwidth + prefill / output
    return Row(
        case=case,
        workload=work.name,
        rates=tuple(work.counted / each for each in seconds),
        step_ms=1e3 * min(seconds) / output,
        step_bytes=int(weights + kv),
        limit_ms=None if limit is None else 1e3 * limit,
    )


def say(row: Row, first: Row) -> None:
    limit = "" if row.limit_ms is None else f"  limit {row.limit_ms:7.3f} ms {row.limit_ms / row.step_ms:4.0%}"
    print(
        f"{row.case:24s} {row.workload:6s} {max(row.rates):9.0f} tokens/s  {first.step_ms / row.step_ms:5.2f}x  "
        f"step {row.step_ms:7.3f} ms  {row.step_bytes / 1e9:6.2f} GB{limit}", flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=named, default=["bf16", "fp8", "int4", "q4_k"], help="cases")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b", help="of the model")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["d1", "d256"])
    parser.add_argument("--passes", type=int, default=2, help="passes after one to warm up")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    parser.add_argument("--check", action="store_true", help="small sizes, on a CPU")
    args = parser.parse_args()
    shape, workloads = SHAPES[args.shape], [WORKLOADS[name]() for name in args.workload]
    if args.check:
        shape, workloads = SHAPES["tiny"], [uniform(1, 8, 4), uniform(2, 8, 4)]
    limits = measured_limits(2) if torch.cuda.is_available() else None
    header, rows = environment(), list[Row]()
    print(header["gpu"], "torch", header["torch"], "triton", header["triton"], shape.name, flush=True)
    if limits is not None:
        print(f"read {limits.bandwidth / 1e9:.0f} GB/s, products {limits.flops / 1e12:.0f} TFLOP/s", flush=True)
    for case in args.only:
        began = time.perf_counter()
        for row in measure(case, shape, workloads, args.passes, limits):
            rows.append(row)
            say(row, next(each for each in rows if each.workload == row.workload))
        print(f"{case}: {time.perf_counter() - began:.0f} s", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if args.out:
        found = {"environment": header, "shape": shape.name, "rows": [asdict(each) for each in rows]}
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
