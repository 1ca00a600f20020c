"""The two functions of the flash-attn package that its backend calls, in plain torch, with the package's own rules."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nanoengine.api import AttentionLayerSpec
from nanoengine.testing.conformance.attention import attend


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, **options: Any
) -> Tensor:
    """q [B, queries, H, D], the last of `cache_seqlens` [B] tokens."""
    rows = zip(q, block_table, cache_seqlens.tolist(), strict=True)
    return torch.stack([_row(each, k_cache, v_cache, table, length, **options) for each, table, length in rows])


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, block_table: Tensor, **options: Any,
) -> Tensor:  # fmt: skip
    """q [T, H, D], ragged by `cu_seqlens_q`. The host's lengths are upper bounds: a row beyond them is cut off."""
    out, starts = torch.full_like(q, float("nan")), cu_seqlens_q.tolist()
    for row, length in enumerate(cu_seqlens_k.diff().tolist()):
        first, stop = starts[row], starts[row + 1]
        assert stop - first <= max_seqlen_q, "rows of more queries than max_seqlen_q"
        assert length <= max_seqlen_k, "rows of more keys than max_seqlen_k"
        out[first:stop] = _row(q[first:stop], k, v, block_table[row], length, **options)
    return out


def _row(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int, *, softmax_scale: float, causal: bool,
    window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    k, v = (cache[table.long()].flatten(0, 1)[:length].double() for cache in (k_cache, v_cache))
    left, right = window_size
    assert causal or right == left  # with `causal` the package itself looks at nothing to the right
    spec = AttentionLayerSpec(
        num_heads=q.shape[1], num_kv_heads=k.shape[1], head_size=q.shape[2], scale=softmax_scale, causal=causal,
        window=None if left < 0 else left + 1, soft_cap=softcap or None,
    )  # fmt: skip
    return attend(q.double(), k, v, spec).to(q.dtype)


def module() -> ModuleType:
    made: Any = ModuleType("flash_attn")
    made.flash_attn_with_kvcache, made.flash_attn_varlen_func = flash_attn_with_kvcache, flash_attn_varlen_func
    return made  # type: ignore[no-any-return]
