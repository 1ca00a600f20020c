"""Plain-torch reference of the paged attention kernels: slow, row by row, in float32, by the same arguments.

The cache of a layer is `[num_blocks, kv_heads, block_size, head_size]` each for K and V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.kernels import rope


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store [T, kv_heads, head_size] at `slot_mapping`, int64 [T]: block * block_size + offset."""
    size = k_cache.shape[2]
    block, offset = slot_mapping // size, slot_mapping % size
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v


def attend_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query a row: q [B, heads, head_size] at the end of seq_lens [B] tokens in block_tables [B, blocks]."""
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    return attend_prefill(
        q, k_cache, v_cache, block_tables, seq_lens, starts, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks
    )


def attend_decode_qkv(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """`attend_decode` of qkv [B, (heads + 2 kv_heads) * head_size], each row the last token of its own: normalised and
    rotated, k and v *written to the caches*, as `rope.qk_norm_rope_store` does. Returns [B, heads, head_size]."""
    caches = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    q = rope.qk_norm_rope_store(
        qkv, seq_lens.long() - 1, inv_freq, *caches, slots, q_weight=q_weight, k_weight=k_weight, eps=eps
    )
    return attend_decode(q, k_cache, v_cache, block_tables, seq_lens, scale=scale, window=window, soft_cap=soft_cap)


def attend_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Row r's queries are q[query_start_loc[r] : query_start_loc[r + 1]], the last of its seq_lens[r] tokens.

    `sinks`: float [heads], a score of each head that takes part in the softmax and has no value. `causal` False:
    queries see all keys of their row; with a window, those that are less than `window` positions before or behind.

    Returns [T, heads, head_size] of q's dtype; tokens of no row are zeros.
    """
    out, starts = torch.zeros_like(q), query_start_loc.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        first, stop = starts[row], starts[row + 1]
        blocks = block_tables[row, : -(-length // k_cache.shape[2])].long()
        keys, values = (
            cache[blocks].transpose(1, 2).flatten(0, 1)[:length].float() for cache in (k_cache, v_cache)
        )  # [length, kv_heads, head_size]
        group = q.shape[1] // keys.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q[first:stop].float(), keys.repeat_interleave(group, 1)) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        key = torch.arange(length, device=q.device)
        position = torch.arange(length - (stop - first), length, device=q.device).unsqueeze(-1)
        hidden = (key > position) & causal
        if window is not None:
            hidden |= (key <= position - window) | (key >= position + window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float().view(-1, 1, 1).expand(*scores.shape[:2], 1)), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :length]
        out[first:stop] = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1)).to(q.dtype)
    return out
