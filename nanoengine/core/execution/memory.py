"""How many KV blocks fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanoengine.core.errors import ConfigError
from nanoengine.core.setup.options import EngineOptions

CPU_KV_CACHE_BYTES = 4 << 30
GPU_KV_CACHE_SHARE = 0.8  # of what is free once the weights are loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """num_blocks: usable KV blocks of each group (the dummy block not counted). block_bytes: one block over all
    layers of all groups. kv_cache_bytes: all of them. weight_bytes: parameters."""

    num_blocks: int
    num_groups: int
    block_size: int
    block_bytes: int
    kv_cache_bytes: int
    weight_bytes: int


def count_blocks(options: EngineOptions, block_bytes: int, device: torch.device) -> int:
    """Usable blocks, by `num_gpu_blocks_override`, else `kv_cache_memory`, else the device's default budget."""
    if options.num_gpu_blocks_override is not None:
        return options.num_gpu_blocks_override
    assert options.max_model_len is not None and options.block_size is not None
    wanted = options.max_num_seqs * -(-options.max_model_len // options.block_size)
    budget = options.kv_cache_memory or _default_budget(device)
    blocks = min(wanted, budget // block_bytes - 1)  # one is the dummy
    if blocks < 1:
        raise ConfigError(
            f"no KV block fits: kv_cache_memory is {budget:,} bytes, and the dummy block and one block of "
            f"{options.block_size} tokens take {2 * block_bytes:,}; raise engine.kv_cache_memory or lower block_size"
        )
    return blocks


def _default_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_KV_CACHE_BYTES
    free, _total = torch.cuda.mem_get_info(device)
    return int(free * GPU_KV_CACHE_SHARE)
