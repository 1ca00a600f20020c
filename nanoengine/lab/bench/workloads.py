"""Workloads: random token ids, fixed seeds, and a fixed length of every output. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from random import Random

HIGHEST_ID = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A workload.

    Attributes:
        prompts: token ids. output_lens: one for each prompt.
        max_num_seqs: most requests at the same time; None: the engine's default.
        counts: "output" or "prompt": which tokens per second are reported.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    output_lens: tuple[int, ...]
    max_num_seqs: int | None = None
    counts: str = "output"

    @property
    def counted(self) -> int:
        return sum(self.output_lens) if self.counts == "output" else sum(map(len, self.prompts))

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of each request."""
        return [(len(prompt), output) for prompt, output in zip(self.prompts, self.output_lens, strict=True)]

    def scaled(self, factor: float) -> Workload:
        """A smaller workload for a quick look: this share of the requests, each with this share of its tokens."""
        if factor == 1:
            return self
        count = max(1, round(len(self.prompts) * factor))
        return replace(
            self,
            name=f"{self.name}*{factor:g}",
            prompts=tuple(prompt[: max(1, round(len(prompt) * factor))] for prompt in self.prompts[:count]),
            output_lens=tuple(max(1, round(n * factor)) for n in self.output_lens[:count]),
        )


def random_ids(rng: Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randint(0, HIGHEST_ID) for _ in range(count))


def _ragged256() -> Workload:
    rng = Random(0)
    prompts = tuple(random_ids(rng, rng.randint(100, 1024)) for _ in range(256))
    return Workload(name="ragged256", prompts=prompts, output_lens=tuple(rng.randint(100, 1024) for _ in range(256)))


def uniform(count: int, prompt_len: int = 128, output_len: int = 512) -> Workload:
    """`count` requests of the same size."""
    rng = Random(0)
    prompts = tuple(random_ids(rng, prompt_len) for _ in range(count))
    return Workload(name=f"d{count}", prompts=prompts, output_lens=(output_len,) * count)


def _churn() -> Workload:
    rng = Random(0)
    prompts = tuple(random_ids(rng, rng.randint(100, 512)) for _ in range(2048))
    lens = tuple(rng.randint(16, 128) for _ in range(2048))
    return Workload(name="churn", prompts=prompts, output_lens=lens, max_num_seqs=128)


def prefill(count: int, length: int) -> Workload:
    """`count` prompts of `length` tokens, with one output token each."""
    return replace(uniform(count, length, 1), name=f"prefill{count}x{length}", counts="prompt")


def _prefill64() -> Workload:
    return replace(prefill(64, 1024), name="prefill64")


WORKLOADS: Mapping[str, Callable[[], Workload]] = {
    "ragged256": _ragged256,
    **{f"d{n}": partial(uniform, n) for n in (1, 8, 64, 256)},
    "prefill64": _prefill64,
    "churn": _churn,  # last, because it needs an engine of its own
}
