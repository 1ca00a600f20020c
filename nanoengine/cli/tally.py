"""Counts of a run, for its last line and for the summary in its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from nanoengine.api.outputs import RequestOutput


@dataclass
class Tally:
    """The counts of a run. `max_tokens`: that of the parameters.

    `kept`: prompts that an earlier run has finished; all other counts are those of this run.
    drafted, accepted: by position in the draft, as in `EngineStats`."""

    total: int
    max_tokens: int | None = None
    kept: int = 0
    finished: int = 0
    cut: int = 0  # outputs with a sample that max_tokens ended
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    ttfts: list[float] = field(default_factory=list)
    itls: list[float] = field(default_factory=list)
    first_token: float | None = None  # time of the very first token, on the monotonic clock
    first_step: float = 0.0  # seconds from scheduling its request to this token
    drafted: Sequence[int] = ()
    accepted: Sequence[int] = ()

    def add(self, output: RequestOutput) -> None:
        self.finished += 1
        self.cut += any(
            sample.finish_reason == "length" and len(sample.token_ids) == self.max_tokens for sample in output.outputs
        )
        self.failed += output.error is not None
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        self.generated += sum(len(sample.token_ids) for sample in output.outputs)
        metrics = output.metrics
        if metrics.itl is not None:
            self.itls.append(metrics.itl)
        if metrics.ttft is None or metrics.first_token is None or metrics.first_scheduled is None:
            return
        self.ttfts.append(metrics.ttft)
        if self.first_token is None or metrics.first_token < self.first_token:
            self.first_token, self.first_step = metrics.first_token, metrics.first_token - metrics.first_scheduled

    def cut_line(self) -> str:
        """A hint for a user who gave no `max_tokens`: "1 answer was cut at the default of 16 tokens: ..."."""
        what = "1 answer was" if self.cut == 1 else f"{self.cut} answers were"
        return f"{what} cut at the default of {self.max_tokens} tokens: sampler.max_tokens=N allows more"

    def line(self, seconds: float) -> str:
        noun = "prompt" if self.total == 1 else "prompts"
        done = self.finished + self.kept
        parts: Sequence[str] = [
            f"{done} {noun}" if done == self.total else f"{done} of {self.total} {noun}",
            *([f"{self.kept} kept from an earlier run"] if self.kept else []),
            *([f"{self.failed} failed"] if self.failed else []),
            f"{self.prompt_tokens} prompt + {self.generated} generated tokens in {seconds:.1f} s",
            f"{self.generated / seconds if seconds else 0:.1f} tokens/s",
            f"TTFT median {median(self.ttfts) * 1000:.0f} ms" if self.ttfts else "TTFT median -",
            f"prefix-cache hit rate {100 * self.cached_tokens / (self.prompt_tokens or 1):.1f}%",
            *([f"{sum(self.accepted)} of {sum(self.drafted)} drafts accepted"] if self.drafted else []),
        ]
        return ", ".join(parts)

    def summary(self, seconds: float, status: int) -> dict[str, Any]:
        """The counts as JSON values. All times are in seconds. `status`: the exit status."""
        return {
            "status": status,
            "prompts": self.total,
            "kept": self.kept,
            "finished": self.finished,
            "failed": self.failed,
            "seconds": seconds,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated,
            "tokens_per_second": self.generated / seconds if seconds and self.generated else None,
            "ttft": _spread(self.ttfts),
            "itl": _spread(self.itls),
            "drafted_per_position": list(self.drafted),
            "accepted_per_position": list(self.accepted),
        }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return {"median": values[0], "p99": values[0]} if values else None
    return {"median": median(values), "p99": quantiles(values, n=100, method="inclusive")[98]}
