"""The Triton kernels of paged attention, and how a decode launch is laid out. `paged_attention` is the reference."""

from __future__ import annotations

from nanoengine.kernels.paged_attention_decode_triton import attend_decode
from nanoengine.kernels.paged_attention_plan import (
    MAX_QUERIES,
    DecodeConfig,
    DecodePlanner,
    DecodeScratch,
    NewTokens,
    SeveralConfig,
    decode_config,
    fused_config,
    several_config,
)
from nanoengine.kernels.paged_attention_prefill_triton import PrefillConfig, attend_prefill, prefill_config
from nanoengine.kernels.paged_attention_several_triton import attend_several
from nanoengine.kernels.paged_attention_store_triton import store_kv

__all__ = [
    "MAX_QUERIES",
    "DecodeConfig",
    "DecodePlanner",
    "DecodeScratch",
    "NewTokens",
    "PrefillConfig",
    "SeveralConfig",
    "attend_decode",
    "attend_prefill",
    "attend_several",
    "decode_config",
    "fused_config",
    "prefill_config",
    "several_config",
    "store_kv",
]
