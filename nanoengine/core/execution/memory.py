"""How many KV blocks fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from nanoengine.core.errors import ConfigError
from nanoengine.core.setup.options import EngineOptions
from nanoengine.core.startup import Phase

CPU_KV_CACHE_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """What stands on the device after the start.

    Attributes:
        num_blocks: usable KV blocks of each group (the dummy block not counted). block_bytes: one block over all
            layers of all groups. kv_cache_bytes: all of them. weight_bytes: parameters.
        failed_stages: sampler stages that could not be made: name -> cause.
        phases: how long the runner took for each phase of its start.
    """

    num_blocks: int
    num_groups: int
    block_size: int
    block_bytes: int
    kv_cache_bytes: int
    weight_bytes: int
    failed_stages: Mapping[str, str] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()


def count_blocks(options: EngineOptions, block_bytes: int, default_budget: Callable[[], int]) -> int:
    """Usable blocks, by `num_gpu_blocks_override`, else `kv_cache_memory`, else what the device has room for; never
    more than all slots at full length can use."""
    if options.num_gpu_blocks_override is not None:
        return options.num_gpu_blocks_override
    assert options.max_model_len is not None
    assert options.block_size is not None
    wanted = options.max_num_seqs * -(-options.max_model_len // options.block_size)
    budget = options.kv_cache_memory or default_budget()
    blocks = min(wanted, budget // block_bytes - 1)  # one is the dummy
    if blocks < 1:
        raise ConfigError(
            f"no KV block fits: kv_cache_memory is {budget:,} bytes, and the dummy block and one block of "
            f"{options.block_size} tokens take {2 * block_bytes:,}; raise engine.kv_cache_memory or lower block_size"
        )
    return blocks


def cannot_allocate(blocks: int, num_bytes: int, block_size: int, error: BaseException) -> ConfigError:
    """What to tell a user whose KV cache of `blocks` blocks and the dummy the device refused."""
    return ConfigError(
        f"the KV cache of {blocks:,} blocks of {block_size} tokens takes {num_bytes:,} bytes, which cannot be "
        f"allocated; lower engine.num_gpu_blocks_override, engine.kv_cache_memory, engine.gpu_memory_utilization or "
        f"engine.max_num_seqs ({type(error).__name__}: {error})"
    )


def gpu_budget(utilization: float, device: torch.device, run: Callable[[], None], reserve: int) -> int:
    """Bytes left for the KV cache within `utilization` of the GPU's memory.

    Args:
        run: the largest step; the peak of its allocations above what stands before it is set aside.
        reserve: bytes that will be taken later (graphs).
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    transient = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total * utilization) - (total - free) - transient - reserve
