"""The draw by Triton kernels, which eager and captured tails share. The reference is `draw`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nanoengine.kernels import sampling_shard_triton, sampling_triton
from nanoengine.kernels.bitmask_triton import mask_bits_
from nanoengine.kernels.choice import BY_DEFAULT, KernelChoice
from nanoengine.kernels.draw import DrawColumns
from nanoengine.kernels.sampling_shard_triton import answer
from nanoengine.kernels.sampling_triton import Tail

__all__ = ["TAILS", "answer", "best_keys", "mask_bits_", "sample", "tail_for"]

TAILS = tuple(int(tail) for tail in Tail)


def tail_for(*, random: bool, cut: bool) -> int:
    """The least `Tail` that draws for such rows. random: some row is not greedy. cut: some row truncates."""
    return int(Tail.GREEDY if not random else Tail.TRUNCATION if cut else Tail.TEMPERATURE)


def sample(
    tail: int,
    logits: Tensor,
    c: DrawColumns,
    tokens: Tensor,
    failed: Tensor,
    *,
    raw_tops: Tensor | None = None,
    mask: Tensor | None = None,
    choice: KernelChoice = BY_DEFAULT,
) -> None:
    """`sampling_triton.sample` by these columns; a mask by a kernel in front of it, where `mask_in_scan` is off."""
    if mask is not None and not choice.has("mask_in_scan"):
        raw_tops = logits.amax(-1).float()
        mask_bits_(logits, mask)
        mask = None
    sampling_triton.sample(
        logits, Tail(tail), tokens, failed, **_key(c), top_k=c.top_k, top_p=c.top_p, min_p=c.min_p,
        raw_tops=raw_tops, mask=mask,
    )  # fmt: skip


def best_keys(tail: int, logits: Tensor, start: int, c: DrawColumns) -> Tensor:
    """`sampling_shard_triton.best_keys` by these columns."""
    keys: Tensor = sampling_shard_triton.best_keys(logits, Tail(tail), start, **_key(c))
    return keys


def _key(c: DrawColumns) -> dict[str, Any]:
    return {
        "greedy": c.greedy, "temperature": c.temperature,
        "seeds": c.seeds, "positions": c.positions, "sample_index": c.sample_index, "at": c.at, "early": c.early,
    }  # fmt: skip
