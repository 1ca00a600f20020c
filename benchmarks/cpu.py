"""SmolLM2 on a CPU: compares the engine with transformers, in one process, with the same token ids and threads.

    python benchmarks/cpu.py                    # everything; several minutes
    python benchmarks/cpu.py --only batch1      # or: workload
    python benchmarks/cpu.py --json result.json

Greedy, float32, EOS ignored, so that both sides make the same number of tokens. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from nanoengine import LLM, SamplingParams
from nanoengine.build import find_model
from nanoengine.kernels.gguf import dequantise
from nanoengine.setup.plugins.discover import discover

SHORTEST, LONGEST = 16, 128


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt, and the number of tokens to generate."""

    prompt: list[int]
    count: int


@dataclass(slots=True)
class Result:
    """The number of tokens of all jobs, seconds of each run, and the tokens of the last run."""

    name: str
    tokens: int
    seconds: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list, repr=False)

    @property
    def rate(self) -> float:
        """Median tokens/s. Tokens that padding makes beyond a job's own count do not count."""
        return self.tokens / statistics.median(self.seconds)


Run = Callable[[Sequence[Job]], list[list[int]]]


def make_jobs(count: int, seed: int, vocab_size: int) -> list[Job]:
    """Jobs with random ids; lengths of prompts and outputs are uniform from 16 to 128."""
    rng = np.random.default_rng(seed)
    prompts, outputs = (rng.integers(SHORTEST, LONGEST + 1, count) for _ in range(2))
    return [Job(rng.integers(0, vocab_size, p).tolist(), int(n)) for p, n in zip(prompts, outputs, strict=True)]


def with_engine(llm: LLM) -> Run:
    def run(jobs: Sequence[Job]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=job.count, ignore_eos=True) for job in jobs]
        outputs = llm.generate([job.prompt for job in jobs], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


def with_transformers(model: Any, batch: int) -> Run:
    """Batches of `batch` in the given order, padded on the left; each runs to its longest output."""

    def run(jobs: Sequence[Job]) -> list[list[int]]:
        return [answer for i in range(0, len(jobs), batch) for answer in _generate(model, jobs[i : i + batch])]

    return run


@torch.inference_mode()
def _generate(model: Any, jobs: Sequence[Job]) -> list[list[int]]:
    width, steps = max(len(job.prompt) for job in jobs), max(job.count for job in jobs)
    ids = torch.zeros(len(jobs), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, job in enumerate(jobs):
        ids[i, width - len(job.prompt) :] = torch.tensor(job.prompt)
        mask[i, width - len(job.prompt) :] = 1
    out = model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False)
    assert out.shape[1] == width + steps, "an output ended early"
    return [out[i, width : width + job.count].tolist() for i, job in enumerate(jobs)]


def measure(sides: Sequence[tuple[str, Run, Sequence[Job]]], repeats: int) -> list[Result]:
    """Runs every engine once per round, in turn, so that other load on the machine affects all of them."""
    results = [Result(name, sum(job.count for job in jobs)) for name, _, jobs in sides]
    for _ in range(repeats):
        for result, (_, run, jobs) in zip(results, sides, strict=True):
            began = time.perf_counter()
            result.answers = run(jobs)
            result.seconds.append(time.perf_counter() - began)
            print(f"  {result.name}: {result.tokens / result.seconds[-1]:.1f} tokens/s", flush=True)
    return results


def agreement(ours: Result, theirs: Result) -> float:
    """The share of tokens before the first difference in each answer."""
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(ours.answers, theirs.answers, strict=True)
    ]
    return sum(same) / ours.tokens


def show(title: str, results: Sequence[Result], targets: Sequence[float | None]) -> list[dict[str, Any]]:
    """Prints a table, the engine's row first; ratios are the engine's rate over the row's."""
    ours, rows = results[0], []
    print(f"\n{title}\n{'':44}{'tokens/s':>10}{'engine is':>12}{'aim':>8}   runs, s")
    for result, target in zip(results, targets, strict=True):
        ratio = ours.rate / result.rate
        times = f"{ratio:.2f} times" if result is not ours else ""
        aim = f"{target:g}" if target else ""
        seconds = " ".join(f"{s:.1f}" for s in result.seconds)
        print(f"{result.name:44}{result.rate:>10.1f}{times:>12}{aim:>8}   {seconds}")
        row = {k: v for k, v in asdict(result).items() if k != "answers"}
        rows.append({**row, "tokens_per_s": result.rate, "ratio": ratio, "target": target})
    return rows


def bench_batch1(llm: LLM, model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    prompt = llm.get_tokenizer()(
        "Once upon a time, in a village by the sea, there lived an old clockmaker who"
    ).input_ids
    jobs = [Job(prompt, args.tokens)]
    sides = [("nanoengine", with_engine(llm), jobs), ("transformers", with_transformers(model, 1), jobs)]
    for _, run, _ in sides:
        run([Job(prompt, 8)])
    results = measure(sides, args.repeats)
    print(f"  equal tokens up to the first difference: {agreement(*results):.0%}")
    return show(f"One request, {args.tokens} tokens", results, [None, 1.0])


def bench_workload(llm: LLM, model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    jobs = make_jobs(args.requests, args.seed, llm.get_tokenizer().vocab_size)
    few = jobs[:: max(1, args.requests // args.one_by_one)][: args.one_by_one]
    rivals = {
        "one": (f"transformers, one by one ({len(few)} of {len(jobs)})", with_transformers(model, 1), few, 5.0),
        "8": ("transformers, padded batches of 8", with_transformers(model, 8), jobs, 2.5),
        "all": (f"transformers, one padded batch of {len(jobs)}", with_transformers(model, len(jobs)), jobs, 1.2),
    }
    chosen = [rivals[name] for name in args.against]
    sides = [("nanoengine, all at once", with_engine(llm), jobs), *(rival[:3] for rival in chosen)]
    for _, run, _ in sides:
        run([Job(job.prompt, 4) for job in jobs[:2]])
    results = measure(sides, args.workload_repeats)
    for result in results[1:]:
        if result.tokens == results[0].tokens:
            print(f"  {result.name}: {agreement(results[0], result):.0%} equal up to the first difference")
    tokens = sum(len(job.prompt) for job in jobs), sum(job.count for job in jobs)
    title = f"{len(jobs)} requests, {tokens[0]:,} tokens in and {tokens[1]:,} out"
    return show(title, results, [None, *(rival[3] for rival in chosen)])


def in_float32(folder: Path) -> Any:
    """transformers' model of a folder whose matrices may be in a GGUF file's blocks."""
    config = AutoConfig.from_pretrained(folder)
    blocks = getattr(config, "quantization_config", None)
    if blocks is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    del config.quantization_config
    tensors = load_file(folder / "model.safetensors")
    for module, kind in blocks["types"].items():
        tensors[f"{module}.weight"] = dequantise(tensors[f"{module}.weight"], kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="as LLM(model=...)")
    parser.add_argument(
        "--quantization",
        default="none",
        help="of the engine; auto: the blocks as they are, so tokens may differ",
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads, for both sides")
    parser.add_argument("--only", choices=["batch1", "workload"])
    parser.add_argument("--tokens", type=int, default=128, help="output of the single request")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the single request")
    parser.add_argument("--requests", type=int, default=64, help="requests of the workload")
    parser.add_argument("--one-by-one", type=int, default=8, help="how many of them transformers runs one by one")
    parser.add_argument("--against", nargs="+", choices=["one", "8", "all"], default=["one", "8", "all"])
    parser.add_argument("--workload-repeats", type=int, default=1, help="rounds of the workload")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    folder = find_model(args.model, discover())
    options: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 64, "quantization": args.quantization}
    with LLM(folder, dtype="float32", enable_prefix_caching=False, **options) as llm:
        model = in_float32(folder).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        figures: dict[str, Any] = {
            "cpu": platform.processor() or platform.machine(),
            "threads": args.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        if args.only != "workload":
            figures["batch1"] = bench_batch1(llm, model, args)
        if args.only != "batch1":
            figures["workload"] = bench_workload(llm, model, args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
