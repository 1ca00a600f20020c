"""Throughput workloads: random token ids, fixed seeds, every output run to its length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random

from nanoengine.bench.shapes import Shape

HIGHEST_ID = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """prompts: token ids. output_lens: one each. max_num_seqs: most at once; None: the engine's default.

    counts: "output" or "prompt": which tokens a second are quoted.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    output_lens: tuple[int, ...]
    max_num_seqs: int | None = None
    counts: str = "output"

    @property
    def counted(self) -> int:
        return sum(self.output_lens) if self.counts == "output" else sum(map(len, self.prompts))

    def shortest_seconds(self, shape: Shape, limits: Limits, batch: int) -> float:
        """The roofline: each decode step reads every weight once and the KV of its rows; prefill computes.

        Steps advance all running rows together; with fewer places than requests, rows are spread evenly over them.
        """
        flops_per_token = 2 * shape.layers * shape.layer_weights
        seconds = 0.0
        for prompt in map(len, self.prompts):
            attention = 2 * shape.layers * shape.heads * shape.head_size * prompt * prompt
            seconds += (prompt * flops_per_token + attention) / limits.flops
        decodes = sum(n - 1 for n in self.output_lens)
        steps = max(max(self.output_lens) - 1, -(-decodes // batch))
        kv = sum(
            sum(range(len(p), len(p) + n - 1)) for p, n in zip(self.prompts, self.output_lens, strict=True)
        ) * shape.kv_per_token  # fmt: skip
        compute = decodes * 2 * shape.step_weights / limits.flops
        weights = steps * shape.step_weights * limits.itemsize / limits.bandwidth
        return seconds + max(weights, compute) + kv * limits.itemsize / limits.bandwidth


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured ceilings of a device: bytes/s of reading, FLOP/s of matrix products; bytes of an element."""

    bandwidth: float
    flops: float
    itemsize: int = 2


def _ids(rng: Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randint(0, HIGHEST_ID) for _ in range(count))


def _ragged256() -> Workload:
    rng = Random(0)
    prompts = tuple(_ids(rng, rng.randint(100, 1024)) for _ in range(256))
    return Workload(name="ragged256", prompts=prompts, output_lens=tuple(rng.randint(100, 1024) for _ in range(256)))


def _uniform(count: int) -> Workload:
    rng = Random(0)
    return Workload(name=f"d{count}", prompts=tuple(_ids(rng, 128) for _ in range(count)), output_lens=(512,) * count)


def _churn() -> Workload:
    rng = Random(0)
    prompts = tuple(_ids(rng, rng.randint(100, 512)) for _ in range(2048))
    lens = tuple(rng.randint(16, 128) for _ in range(2048))
    return Workload(name="churn", prompts=prompts, output_lens=lens, max_num_seqs=128)


def _prefill64() -> Workload:
    rng = Random(0)
    prompts = tuple(_ids(rng, 1024) for _ in range(64))
    return Workload(name="prefill64", prompts=prompts, output_lens=(1,) * 64, counts="prompt")


WORKLOADS: Mapping[str, Callable[[], Workload]] = {
    "ragged256": _ragged256,
    **{f"d{n}": partial(_uniform, n) for n in (1, 8, 64, 256)},
    "churn": _churn,
    "prefill64": _prefill64,
}
