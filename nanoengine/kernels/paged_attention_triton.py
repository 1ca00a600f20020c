"""The Triton kernels of paged attention, and how a decode launch is laid out. `paged_attention` is the reference."""

from __future__ import annotations

from nanoengine.kernels.paged_attention_decode_triton import attend_decode, store_kv
from nanoengine.kernels.paged_attention_plan import (
    DecodeConfig,
    DecodePlanner,
    DecodeScratch,
    NewTokens,
    decode_config,
    fused_config,
)
from nanoengine.kernels.paged_attention_prefill_triton import PrefillConfig, attend_prefill, prefill_config

__all__ = [
    "DecodeConfig",
    "DecodePlanner",
    "DecodeScratch",
    "NewTokens",
    "PrefillConfig",
    "attend_decode",
    "attend_prefill",
    "decode_config",
    "fused_config",
    "prefill_config",
    "store_kv",
]
