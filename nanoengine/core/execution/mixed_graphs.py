"""CUDA graphs of mixed steps: so many decode rows, and so many prefill tokens of up to `PREFILL_ROWS` rows behind them.

Launching a model's kernels one by one takes the CPU longer than a mixed step of moderate size takes the GPU. What is
padded: decode rows of the dummy slot, prefill rows without a token, and tokens behind the last row, whose K and V go
to the dummy block. Larger steps run eagerly: there the GPU is the slower one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoengine.core.execution.graphs import captured
from nanoengine.core.step import StepPlan

PREFILL_ROWS = 8
_DECODE_ROWS = (64, 128, 256)
_PREFILL_TOKENS = (128, 256, 384, 480, 576, 672, 768, 864, 960, 1088, 1280, 1536, 2048)
_MORE_PREFILL_TOKENS = (*range(128, 1089, 64), 1216, 1408, 1664, 2048)


@dataclass(frozen=True, slots=True)
class MixedSize:
    """decode: rows of one token each. prefill: tokens behind them."""

    decode: int
    prefill: int

    @property
    def rows(self) -> int:
        return self.decode + PREFILL_ROWS

    @property
    def tokens(self) -> int:
        return self.decode + self.prefill


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """A plan with its padding: one entry of `logits_index` a row, `sampled` where the original plan draws.

    Attributes:
        logits_rows: int64 [L]; which of the graph's logits (one a row) belong to the original `logits_index`.
    """

    plan: StepPlan
    logits_rows: npt.NDArray[np.int64]


def mixed_sizes(max_rows: int, max_tokens: int) -> tuple[MixedSize, ...]:
    decode = sorted({min(n, max_rows) for n in _DECODE_ROWS})
    prefill = _PREFILL_TOKENS if len(decode) > 2 else _MORE_PREFILL_TOKENS  # about as many graphs
    sizes = (MixedSize(d, p) for d in decode for p in prefill)
    return tuple(size for size in sizes if size.tokens <= max_tokens)


def pad_mixed(plan: StepPlan, size: MixedSize, dummy_slot: int) -> PaddedStep:
    """`plan`, whose logits positions are all sampled, in the form that the graph of `size` was captured for."""
    decode, rows = plan.num_decode_rows, plan.num_rows
    ahead, behind = size.decode - decode, PREFILL_ROWS - (rows - decode)

    def spread(values: npt.NDArray[np.int32], between: int, last: int) -> npt.NDArray[np.int32]:
        middle, end = np.full(ahead, between, np.int32), np.full(behind, last, np.int32)
        return np.concatenate((values[:decode], middle, values[decode:], end))

    lens = spread(plan.query_lens, 1, 0)
    logits_rows = plan.logits_rows.astype(np.int64)
    logits_rows[logits_rows >= decode] += ahead
    sampled = np.zeros(size.rows, np.bool_)
    sampled[logits_rows] = True
    padded = replace(
        plan,
        slots=spread(plan.slots, dummy_slot, dummy_slot),
        query_lens=lens,
        starts=spread(plan.starts, 0, 0),
        num_decode_rows=size.decode,
        logits_index=np.maximum(np.cumsum(lens, dtype=np.int32) - 1, 0),  # one a row: its last token
        logits_rows=np.arange(size.rows, dtype=np.int32),
        sampled=sampled,
    )
    return PaddedStep(padded, logits_rows)


class MixedGraphs:
    """Captured at start, the largest first, in one memory pool."""

    def __init__(
        self, sizes: tuple[MixedSize, ...], run: Callable[[MixedSize], Tensor], agree: Callable[[bool], bool] = bool
    ) -> None:
        """`run(size)`: forward pass and output layer over the static buffers -> logits [size.rows, V]."""
        self._decode = sorted({size.decode for size in sizes})
        self._prefill = sorted({size.prefill for size in sizes})
        self._graphs: dict[MixedSize, torch.cuda.CUDAGraph] = {}
        self.logits: dict[MixedSize, Tensor] = {}  # of each size, valid until the next replay
        pool = torch.cuda.graph_pool_handle()
        for size in sorted(sizes, key=lambda each: -each.tokens):
            self._graphs[size], self.logits[size] = captured(partial(run, size), pool, agree)

    def size_for(self, plan: StepPlan) -> MixedSize | None:
        """The smallest captured size that holds `plan`; None where there is none, or it wants prompt log-probs."""
        decode, prefill = plan.num_decode_rows, plan.num_tokens - plan.num_decode_rows
        if plan.num_rows - decode > PREFILL_ROWS or not plan.sampled.all():
            return None
        d, p = bisect_left(self._decode, decode), bisect_left(self._prefill, prefill)
        if d == len(self._decode) or p == len(self._prefill):
            return None
        size = MixedSize(self._decode[d], self._prefill[p])
        return size if size in self._graphs else None

    def replay(self, size: MixedSize) -> Tensor:
        """Its logits [size.rows, V], valid until the next replay."""
        self._graphs[size].replay()
        return self.logits[size]
