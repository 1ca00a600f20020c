"""Runs the same workloads on other engines: transformers, nano-vllm and vLLM, if they are installed.

    python benchmarks/peers.py --peer vllm --workload d1 --workload d256 --bandwidth 4190 --tflops 714 --json peers.json

Every engine runs in a process of its own (one more where a workload bounds the requests running at once), with its
defaults, random weights of the shape, an empty prefix cache in each pass, and one pass to warm up. transformers pads:
batches of `--transformers-batch` requests in the given order run to their longest output, and only the tokens that were
asked for count.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nanoengine.lab.bench.report import Report, number
from nanoengine.lab.bench.roofline import Limits
from nanoengine.lab.bench.session import Setup, one_pass
from nanoengine.lab.bench.shapes import SHAPES
from nanoengine.lab.bench.throughput import COLUMNS, Row, row_of
from nanoengine.lab.bench.workloads import WORKLOADS, Workload
from nanoengine.testing.checkpoints import write_checkpoint

TEMPERATURE = 0.6


class Peer(ABC):
    """An engine, started with one limit of running requests.

    Attributes:
        package, distribution: what is imported, and what is installed. install: what pip takes.
        places: requests running at once where a workload does not bound them.
    """

    package: str
    distribution: str
    install: str
    places: int

    @abstractmethod
    def __init__(self, folder: Path, options: argparse.Namespace, max_num_seqs: int | None) -> None:
        """`folder`: empty, for the model."""

    @abstractmethod
    def run(self, workload: Workload) -> list[int]:
        """Runs the workload with an empty prefix cache. Returns the number of output tokens of each request."""


class Transformers(Peer):
    package = distribution = install = "transformers"

    def __init__(self, folder: Path, options: argparse.Namespace, max_num_seqs: int | None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch = self.places = min(options.transformers_batch, max_num_seqs or options.transformers_batch)
        config = AutoConfig.from_pretrained(SHAPES[options.shape].write(folder, options.max_model_len))
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        with torch.device(self.device):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def run(self, workload: Workload) -> list[int]:
        jobs = list(zip(workload.prompts, workload.output_lens, strict=True))
        counts = [n for i in range(0, len(jobs), self.batch) for n in self._batch(jobs[i : i + self.batch])]
        if self.device == "cuda":
            torch.cuda.synchronize()
        return counts

    @torch.inference_mode()
    def _batch(self, jobs: Sequence[tuple[Sequence[int], int]]) -> Iterator[int]:
        width, steps = max(len(prompt) for prompt, _ in jobs), max(count for _, count in jobs)
        ids = torch.zeros(len(jobs), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, (prompt, _) in enumerate(jobs):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        out = self.model.generate(
            ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=steps, do_sample=True,
            temperature=TEMPERATURE, top_k=0, top_p=1.0,
        )  # fmt: skip
        return (min(count, out.shape[1] - width) for _, count in jobs)


class NanoVllm(Peer):
    package, distribution = "nanovllm", "nano-vllm"
    install = "git+https://github.com/GeeeekExplorer/nano-vllm"
    places = 512

    def __init__(self, folder: Path, options: argparse.Namespace, max_num_seqs: int | None) -> None:
        package = importlib.import_module(self.package)
        config = SHAPES[options.shape].hf_config(options.max_model_len)
        write_checkpoint(folder, config, std=0.02, dtype=torch.bfloat16, with_tokenizer=True)
        bound = {} if max_num_seqs is None else {"max_num_seqs": max_num_seqs}
        self.params = package.SamplingParams
        self.llm = package.LLM(str(folder), enforce_eager=False, max_model_len=options.max_model_len, **bound)

    def run(self, workload: Workload) -> list[int]:
        self.llm.scheduler.block_manager.hash_to_block_id.clear()  # its prefix index, for which it has no method
        params = [self.params(temperature=TEMPERATURE, ignore_eos=True, max_tokens=n) for n in workload.output_lens]
        outputs = self.llm.generate([list(prompt) for prompt in workload.prompts], params, use_tqdm=False)
        return [len(output["token_ids"]) for output in outputs]


class Vllm(Peer):
    package = distribution = install = "vllm"
    places = 256  # or more; its default depends on the device

    def __init__(self, folder: Path, options: argparse.Namespace, max_num_seqs: int | None) -> None:
        package = importlib.import_module(self.package)
        SHAPES[options.shape].write(folder, options.max_model_len)
        bound = {} if max_num_seqs is None else {"max_num_seqs": max_num_seqs}
        self.params = package.SamplingParams
        self.llm = package.LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=options.max_model_len,
            **bound,
        )

    def run(self, workload: Workload) -> list[int]:
        self.llm.reset_prefix_cache()
        params = [
            self.params(temperature=TEMPERATURE, ignore_eos=True, max_tokens=n, detokenize=False)
            for n in workload.output_lens
        ]
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in workload.prompts]
        return [len(o.outputs[0].token_ids) for o in self.llm.generate(prompts, params, use_tqdm=False)]


class Ours(Peer):
    package = distribution = install = "nanoengine"
    places = 256

    def __init__(self, folder: Path, options: argparse.Namespace, max_num_seqs: int | None) -> None:
        bound = {} if max_num_seqs is None else {"max_num_seqs": max_num_seqs}
        setup = Setup(shape=SHAPES[options.shape], max_model_len=options.max_model_len)
        self.engine = setup.engine(**bound)  # until the process ends
        self.llm = self.engine.__enter__()

    def run(self, workload: Workload) -> list[int]:
        one_pass(self.llm, workload)  # counts the tokens itself
        return list(workload.output_lens)


PEERS: dict[str, type[Peer]] = {"transformers": Transformers, "nano-vllm": NanoVllm, "vllm": Vllm, "nanoengine": Ours}


def measure(name: str, options: argparse.Namespace) -> list[Row]:
    """Runs in its own process: the given workloads, which have the same limit of running requests."""
    workloads = [WORKLOADS[w]().scaled(options.scale) for w in options.workload]
    bounds = {w.max_num_seqs for w in workloads}
    assert len(bounds) == 1, bounds
    itemsize = 2 if torch.cuda.is_available() else 4
    limits = None if options.bandwidth is None else Limits(options.bandwidth * 1e9, options.tflops * 1e12, itemsize)
    setup = Setup(shape=SHAPES[options.shape], limits=limits)
    bound = bounds.pop()
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module(PEERS[name].package)
        begun = time.perf_counter()
        peer = PEERS[name](Path(folder), options, bound)
        started = time.perf_counter() - begun
        engine = f"{name} {version(peer.distribution)}"
        rows = []
        for workload in workloads:
            _timed(peer, workload)
            seconds = [_timed(peer, workload) for _ in range(options.passes)]
            places = bound or peer.places
            rows.append(row_of(workload, seconds, setup, places, engine=engine, start_seconds=started))
    return rows


def _timed(peer: Peer, workload: Workload) -> float:
    begun = time.perf_counter()
    counts = peer.run(workload)
    seconds = time.perf_counter() - begun
    if counts != list(workload.output_lens):
        raise SystemExit(f"{workload.name}: {sum(counts)} tokens came, {sum(workload.output_lens)} were asked for")
    return seconds


def in_processes(name: str, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """The rows of one engine, in the order of the workloads, and a text about what failed."""
    bound = {w: WORKLOADS[w]().max_num_seqs for w in options.workload}
    ordered = sorted(options.workload, key=lambda w: bound[w] is not None)
    rows: list[Row] = []
    failed = []
    for _, group in itertools.groupby(ordered, key=lambda w: bound[w]):
        workloads = list(group)
        with tempfile.NamedTemporaryFile(suffix=".json") as answer:
            given = {**vars(options), "workload": workloads, "json": None}
            command = [sys.executable, __file__, "--child", json.dumps([name, given, answer.name])]
            print(f"{name}: {', '.join(workloads)}", file=sys.stderr, flush=True)
            status = subprocess.run(command, check=False, stdout=sys.stderr).returncode
            if status:
                failed.append(f"{name} failed on {', '.join(workloads)} with status {status}; its messages are above")
            else:
                rows += [
                    Row(**{**row, "each": tuple(row["each"])}) for row in json.loads(Path(answer.name).read_text())
                ]
    return rows, failed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="default: all that are installed")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="default: d1, d64")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--scale", type=float, default=1.0, help="share of requests and of their tokens")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--transformers-batch", type=int, default=64)
    parser.add_argument("--bandwidth", type=float, help="the device's GB/s, for the limit; with --tflops")
    parser.add_argument("--tflops", type=float)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.bandwidth is None) != (options.tflops is None):
        parser.error("give --bandwidth and --tflops together")
    options.workload = options.workload or ["d1", "d64"]
    return options


def main() -> None:
    options = parse()
    if options.child:
        name, given, answer = json.loads(options.child)
        Path(answer).write_text(json.dumps([asdict(row) for row in measure(name, argparse.Namespace(**given))]))
        return
    rows: list[Row] = []
    notes = []
    for name in options.peer or PEERS:
        if importlib.util.find_spec(PEERS[name].package) is None:
            notes.append(f"{name} is not installed, so it is left out: pip install {PEERS[name].install}")
            continue
        found, failed = in_processes(name, options)
        rows += found
        notes += failed
    columns = {"engine": lambda row: row.engine, **COLUMNS, "start s": lambda row: number(row.start_seconds, 1)}
    settings: dict[str, Any] = {k: v for k, v in vars(options).items() if k not in ("json", "child")}
    report = Report(benchmark="peers", settings=settings, rows=rows, columns=columns, notes=notes)
    print(report.table())
    if options.json:
        report.write(options.json)
    if not rows:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
