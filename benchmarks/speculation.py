"""What speculation brings: output tokens/s with and without it, in one process.

    python benchmarks/speculation.py                                  # both cases, one request, 128 tokens in, 512 out
    python benchmarks/speculation.py --case replay --accuracy 0.9 --tokens 3
    python benchmarks/speculation.py --shape tiny --output-len 40 device=cpu       # any case, small

replay: a drafter on the device that costs nothing and is right with a given probability. It drafts what the same sample
said in the pass before. Passes are repeated until one says what the one before said, because rows of several tokens
round otherwise than rows of one, so that the plain run's tokens are right only up to the first near-tie.

ngram: output that is forced along a given text (the words of a file; each is a token), by the built-in drafter. "edit":
the prompt's own words with each twelfth one replaced; "go on": what follows the prompt in the file. A forced row ends
in an eager tail, with speculation and without it.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor

from nanoengine import LLM, SamplingParams
from nanoengine.api import API_VERSION, DeviceDrafter, DrafterContext, DrafterParams, DrafterSpec, DraftStep, hookimpl
from nanoengine.lab.bench.report import environment
from nanoengine.lab.bench.session import Setup
from nanoengine.lab.bench.shapes import SHAPES
from nanoengine.lab.bench.workloads import uniform
from nanoengine.testing import forced

MOST_ROUNDS = 200  # until a pass says what the one before said


@dataclass(frozen=True)
class ReplayParams(DrafterParams):
    accuracy: float = 0.8


class Replay(DeviceDrafter):
    """Three kernels a step: row i's table is at the first id of its prompt, which is i."""

    def __init__(self, ctx: DrafterContext, params: ReplayParams) -> None:
        super().__init__(ctx, params)
        width = ctx.max_model_len + ctx.tokens + 1
        self.table = torch.zeros(ctx.max_slots, width, dtype=torch.int32, device=ctx.device)
        right = torch.rand(self.table.shape, generator=torch.Generator().manual_seed(0)) < params.accuracy
        self._off = (~right).int()
        self._ahead = torch.arange(ctx.tokens, device=ctx.device)

    def learn(self, said: Sequence[Sequence[int]]) -> None:
        """The samples' tokens, prompts included, each in the order of the requests."""
        for row, ids in enumerate(said):
            drafts = (torch.tensor(ids) + self._off[row, : len(ids)]) % self.ctx.vocab_size
            self.table[row, : len(ids)] = drafts.to(self.table)

    def draft(self, step: DraftStep) -> Tensor:
        return self.table[step.token_ids[step.slots, 0].long()[:, None], step.num_tokens[:, None] + self._ahead]


@hookimpl
def register_drafters() -> list[DrafterSpec]:
    target = f"{__name__}:Replay"
    return [DrafterSpec(name="replay", params=ReplayParams, target=target, api=API_VERSION, device=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Requests of one case."""

    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]

    def run(self, llm: LLM) -> tuple[float, list[list[int]]]:
        """Output tokens/s with an empty prefix cache, and the tokens of each request, prompt included."""
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(self.prompts, self.params, use_tqdm=False)
        seconds = time.perf_counter() - start
        said = [list(o.outputs[0].token_ids) for o in outputs]
        assert [len(ids) for ids in said] == [p.max_tokens for p in self.params], [o.error for o in outputs]
        return sum(map(len, said)) / seconds, [[*p, *ids] for p, ids in zip(self.prompts, said, strict=True)]


def sampled(requests: int, prompt_len: int, output_len: int) -> Asked:
    """Random prompts, of which each begins with its number; seeded draws."""
    prompts = [(i, *prompt[1:]) for i, prompt in enumerate(uniform(requests, prompt_len, output_len).prompts)]
    one = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=output_len)
    return Asked(prompts=prompts, params=[one.replace(seed=i) for i in range(requests)])


def texts(path: Path, requests: int, prompt_len: int, output_len: int) -> dict[str, Asked]:
    """The forced cases. The requests take different parts of the file."""
    words = re.findall(r"\w+|[^\w\s]", path.read_text())
    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    ids = [number[word] for word in words]
    rng, found = random.Random(0), dict[str, Asked]()
    step = max(1, (len(ids) - prompt_len - output_len) // max(1, requests))
    prompts = [ids[i * step :][:prompt_len] for i in range(requests)]
    edits = [
        [rng.randrange(len(number)) if i % 12 == 11 else prompt[i % len(prompt)] for i in range(output_len)]
        for prompt in prompts
    ]
    ahead = [ids[i * step + prompt_len :][:output_len] for i in range(requests)]
    for name, answers in (("edit", edits), ("go on", ahead)):
        one = SamplingParams(temperature=0, ignore_eos=True)
        params = [one.replace(forced=tuple(a), max_tokens=len(a)) for a in answers]
        found[name] = Asked(prompts=prompts, params=params)
    return found


def measured(llm: LLM, asked: Asked, passes: int) -> tuple[float, str]:
    """Median of the passes, and how they went."""
    asked.run(llm)
    before = llm.stats()
    speeds = [asked.run(llm)[0] for _ in range(passes)]
    after = llm.stats()
    how = f"lowest {min(speeds):,.0f}, highest {max(speeds):,.0f}; {(after.steps - before.steps) / passes:,.0f} steps"
    drafted = more(after.drafted_per_position, before.drafted_per_position)
    accepted = more(after.accepted_per_position, before.accepted_per_position)
    if sum(drafted):
        shares = " ".join(f"{a / d:.2f}" if d else "-" for a, d in zip(accepted, drafted, strict=True))
        how += f", {sum(accepted) / sum(drafted):.0%} of drafts accepted, by position {shares}"
    return median(speeds), how


def more(after: Sequence[int], before: Sequence[int]) -> list[int]:
    """What was counted between two times, by position; before, there may be fewer positions."""
    return [a - b for a, b in zip_longest(after, before, fillvalue=0)]


def show(name: str, rate: float, plain: float, how: str) -> None:
    print(f"{name:<28} {rate:>9,.0f} tok/s  {rate / plain:5.2f}  {how}", flush=True)


def settled(llm: LLM, asked: Asked, said: list[list[int]]) -> str:
    """Teaches the drafter until it drafts what this engine says."""
    drafter: Any = llm.engine._executor.runner.finish.drafter  # type: ignore[attr-defined]
    plain, rounds, before = said, 0, list[list[int]]()
    while said != before:
        if rounds == MOST_ROUNDS:
            raise SystemExit(f"the tokens of {MOST_ROUNDS} passes differ")
        drafter.learn(said)
        before, (_, said), rounds = said, asked.run(llm), rounds + 1
    pairs = [zip(*pair, strict=True) for pair in zip(plain, said, strict=True)]
    same = [next((i for i, (a, b) in enumerate(pair) if a != b), len(said[0])) for pair in pairs]
    return f"passes to learn {rounds}; as the plain run up to output token {min(same) - len(asked.prompts[0])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=["replay", "ngram", "all"], default="all")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--requests", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4, help="most drafts of a row")
    parser.add_argument("--accuracy", type=float, default=0.8)
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("README.md"))
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="engine options")
    args = parser.parse_args()
    options = {k: yaml.safe_load(v) for k, v in (each.split("=", 1) for each in args.options)}
    given = {"plugins": [sys.modules[__name__], forced], "max_num_batched_tokens": 2048, **options}
    setup = Setup(shape=SHAPES[args.shape], options=given, max_model_len=4096)
    cases: dict[str, Asked] = {}
    for n in args.requests:
        if args.case != "ngram":
            cases[f"replay, {n} requests"] = sampled(n, args.prompt_len, args.output_len)
        if args.case != "replay":
            for name, asked in texts(args.text, n, 4 * args.prompt_len, args.output_len).items():
                cases[f"{name}, {n} requests"] = asked
    print(environment())
    plain, said = dict[str, float](), dict[str, list[list[int]]]()
    with setup.engine() as llm:
        for name, asked in cases.items():
            said[name] = asked.run(llm)[1]
            plain[name], how = measured(llm, asked, args.passes)
            show(f"{name}: plain", plain[name], plain[name], how)
    methods: dict[str, dict[str, Any]] = {"replay": {"accuracy": args.accuracy, "min_acceptance": 0.0}, "ngram": {}}
    for method, keys in methods.items():
        own = {name: asked for name, asked in cases.items() if name.startswith("replay") is (method == "replay")}
        if not own:
            continue
        with setup.engine(speculation={"method": method, "tokens": args.tokens, **keys}) as llm:
            for name, asked in own.items():
                learned = settled(llm, asked, said[name]) + "; " if method == "replay" else ""
                rate, how = measured(llm, asked, args.passes)
                show(f"{name}: {method}", rate, plain[name], learned + how)


if __name__ == "__main__":
    main()
