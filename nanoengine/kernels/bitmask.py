"""Bit masks over the vocabulary, in plain torch: bit i of word w of a row says whether id 32 w + i is possible."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from nanoengine.kernels.sampling import NEG_INF, on_host


def mask_bits_(logits: Tensor, words: Tensor, start: int = 0) -> Tensor:
    """-inf where the id's bit is 0, in place. NaN may stay.

    Args:
        logits: [R, N], of ids `start`, `start` + 1, ...
        words: int32 [R, W], with 32 W >= `start` + N. Rows of -1 keep all.
    """
    own = slice(start, start + logits.shape[1])
    if not on_host(logits):
        bits = torch.arange(32, dtype=torch.int32, device=words.device)
        return logits.masked_fill_((words[:, :, None] >> bits & 1).flatten(1)[:, own] == 0, NEG_INF)
    limits, data = _limits(logits.dtype), words.numpy().astype("<i4", copy=False).view(np.uint8)
    for row in np.flatnonzero((data != 255).any(1)).tolist():  # one at a time, which fits in a cache
        limit = limits.index_select(0, torch.from_numpy(data[row].astype(np.int32))).flatten()[own]
        torch.minimum(logits[row], limit, out=logits[row])
    return logits


@cache
def _limits(dtype: torch.dtype) -> Tensor:
    """[256, 8]: what a byte of a mask makes the most of its eight logits. Some 20 times as fast as shifts of words and
    a masked fill, which guesses each bit."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.where(torch.from_numpy(bits) > 0, float("inf"), NEG_INF).to(dtype)
