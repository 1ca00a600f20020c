"""The Triton kernels of paged attention, and how a decode launch is laid out. `paged_attention` is the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoengine.kernels.paged_attention_decode_triton import (
    DecodeConfig,
    DecodeScratch,
    attend_split,
    decode_config,
    store_kv,
)
from nanoengine.kernels.paged_attention_prefill_triton import PrefillConfig, attend_prefill, prefill_config
from nanoengine.kernels.paged_attention_shares_triton import SharesConfig, attend_shares, shares_config

__all__ = [
    "DecodeConfig",
    "DecodePlanner",
    "DecodeScratch",
    "PrefillConfig",
    "SharesConfig",
    "attend_decode",
    "attend_prefill",
    "decode_config",
    "prefill_config",
    "shares_config",
    "store_kv",
]

_INTERPRETED_MULTIPROCESSORS = 4  # so that tests on a CPU see split rows and whole ones


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlanner:
    """Lays decode launches of one KV group out, and owns the scratch memory that they share.

    Attributes:
        max_rows: the most rows of a launch. longest: the most keys a query may see.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    itemsize: int
    longest: int
    multiprocessors: int
    shares: SharesConfig
    scratch: DecodeScratch

    @classmethod
    def make(
        cls,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        max_rows: int,
        longest: int,
        device: torch.device,
    ) -> DecodePlanner:
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        else:
            multiprocessors = _INTERPRETED_MULTIPROCESSORS
        itemsize, shares = dtype.itemsize, shares_config(head_size, dtype.itemsize, multiprocessors)
        shape = (num_kv_heads, head_size, longest, itemsize, multiprocessors)
        split = range(1, min(max_rows, multiprocessors // num_kv_heads) + 1)
        parts = max((rows * num_kv_heads * decode_config(rows, *shape).splits for rows in split), default=0)
        scratch = DecodeScratch.make(
            max(parts, shares.places), max_rows * num_kv_heads, num_heads // num_kv_heads, head_size, device
        )
        return cls(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, itemsize=itemsize,
            longest=longest, multiprocessors=multiprocessors, shares=shares, scratch=scratch,
        )  # fmt: skip

    def config(self, rows: int) -> DecodeConfig | SharesConfig:
        """Few rows are split, for latency; more of them than multiprocessors take equal shares."""
        if rows * self.num_kv_heads > self.multiprocessors:
            return self.shares
        return decode_config(rows, self.num_kv_heads, self.head_size, self.longest, self.itemsize, self.multiprocessors)


def attend_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: DecodeConfig | SharesConfig,
    scratch: DecodeScratch,
) -> None:
    """One query a row: q [B, heads, head_size] into `out`, the same shape and contiguous.

    `block_tables` int32 [B, blocks], `seq_lens` int32 [B], of at least 1; both are read on the device alone.
    """
    where = (q, k_cache, v_cache, out, block_tables, seq_lens)
    if isinstance(config, SharesConfig):
        attend_shares(*where, scale=scale, window=window, soft_cap=soft_cap, config=config, scratch=scratch)
    else:
        attend_split(*where, scale=scale, window=window, soft_cap=soft_cap, config=config, scratch=scratch)
