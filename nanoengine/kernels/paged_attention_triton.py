"""The Triton kernels of paged attention, and how a decode launch is laid out. `paged_attention` is the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanoengine.kernels.paged_attention_decode_triton import (
    DecodeConfig,
    DecodeScratch,
    attend_decode,
    decode_config,
    store_kv,
)
from nanoengine.kernels.paged_attention_prefill_triton import PrefillConfig, attend_prefill, prefill_config

__all__ = [
    "DecodeConfig",
    "DecodePlanner",
    "DecodeScratch",
    "PrefillConfig",
    "attend_decode",
    "attend_prefill",
    "decode_config",
    "prefill_config",
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
        shape = (num_kv_heads, head_size, longest, dtype.itemsize, multiprocessors)
        parts = max(rows * num_kv_heads * decode_config(rows, *shape).splits for rows in range(1, max_rows + 1))
        scratch = DecodeScratch.make(parts, max_rows * num_kv_heads, num_heads // num_kv_heads, head_size, device)
        return cls(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, itemsize=dtype.itemsize,
            longest=longest, multiprocessors=multiprocessors, scratch=scratch,
        )  # fmt: skip

    def config(self, rows: int) -> DecodeConfig:
        return decode_config(rows, self.num_kv_heads, self.head_size, self.longest, self.itemsize, self.multiprocessors)
