"""How much memory an engine may take, how many KV blocks fit, and what a start reports of both."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from nanoengine.api.attention import BatchLimits
from nanoengine.api.errors import ConfigError, DeviceMemoryError
from nanoengine.core.execution.runner import empty_cache
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.start.clock import Phase
from nanoengine.setup.start.shortage import StepTooLarge

_log = logging.getLogger(__name__)
CPU_KV_CACHE_BYTES = 4 << 30
SPARE_BYTES = 512 << 20  # what stays free on a GPU where less is free than the engine may take


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """What an engine takes of its device after the start.

    Attributes:
        num_blocks: usable KV blocks of each group (the dummy block not counted). block_bytes: one block over all
            layers of all groups. kv_cache_bytes: all of them. weight_bytes: parameters.
        max_num_seqs, max_num_batched_tokens: those of the options, or lower ones where memory did not hold their steps.
        step_bytes: what the largest step takes besides weights, tables and cache, log-probs of every row included.
            graph_bytes: what is set aside for graphs. Both 0 where nothing is measured: on a CPU, or where the size of
            the cache is given.
        eager_because: why steps run eagerly although graphs were wanted; "": they do not, or none were wanted.
        failed_processors: logits processors that could not be made: name -> cause.
        phases: how long the runner took for each phase of its start.
    """

    num_blocks: int
    num_groups: int
    block_size: int
    block_bytes: int
    kv_cache_bytes: int
    weight_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    step_bytes: int = 0
    graph_bytes: int = 0
    eager_because: str = ""
    failed_processors: Mapping[str, str] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()


def batch_limits(options: EngineOptions) -> BatchLimits:
    """The sizes of static buffers, from filled-in options."""
    assert options.max_model_len and options.max_num_batched_tokens and options.block_size
    return BatchLimits(
        max_rows=min(options.max_num_seqs, options.max_num_batched_tokens),
        max_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        block_size=options.block_size,
    )


@dataclass(frozen=True, slots=True)
class GpuShare:
    """What one engine may take of a GPU. total, free: bytes, before it took any. limit: bytes that are its own.

    That is `gpu_memory_utilization` of all there is, whatever other engines and processes hold: two engines of 0.45
    fit one GPU. Where less is free it is what is free, and that is said.
    """

    device: torch.device
    total: int
    free: int
    limit: int

    @classmethod
    def at_start(cls, device: torch.device, utilization: float) -> GpuShare:
        empty_cache(device)
        free, total = torch.cuda.mem_get_info(device)
        wanted = int(total * utilization)
        limit = min(wanted, free - SPARE_BYTES)
        if limit < wanted:
            _log.warning(
                "%s has %s free of %s, and gpu_memory_utilization=%g asks for %s: this engine takes at most %s",
                device, gib(free), gib(total), utilization, gib(wanted), gib(max(0, limit)),
            )  # fmt: skip
        return cls(device, total, free, limit)

    def left(self) -> int:
        """Bytes of it that are not taken yet; below 0 where they are, by the engine or by others since its start."""
        torch.cuda.synchronize(self.device)
        empty_cache(self.device)
        return self.limit - (self.free - torch.cuda.mem_get_info(self.device)[0])

    def kv_budget(self, block_bytes: int, step: int, graphs: int) -> int:
        """Bytes left for the KV cache where the largest step takes `step` and graphs will take `graphs`.

        Raises `DeviceMemoryError` if that holds no block beside the dummy; `StepTooLarge` if a smaller step would help.
        """
        left = self.left()
        if left - step - graphs >= 2 * block_bytes:
            return left - step - graphs
        text = (
            f"no KV block fits on {self.device}: of {gib(self.total)}, {gib(self.free)} were free and "
            f"{gib(max(0, self.limit))} are this engine's; weights and tables take {gib(self.limit - left)}, the "
            f"largest step {gib(step)}, graphs {gib(graphs)}, and two blocks {gib(2 * block_bytes)}; free some of the "
            f"GPU's memory, raise engine.gpu_memory_utilization, or lower engine.max_num_seqs or max_num_batched_tokens"
        )
        raise (StepTooLarge if left >= 2 * block_bytes else DeviceMemoryError)(text)


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """What `run` allocates on a GPU at its height, above what stands before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"


def memory_of(device: torch.device) -> str:
    """In words: how much of the device's memory is free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        free, total = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    return f"{gib(free)} of {gib(total)} are free on {device}"


def check_host_holds(num_bytes: int) -> None:
    """Raises `DeviceMemoryError` for weights beyond the machine's memory: taken page by page they would raise nothing,
    but end a process."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > total:
        raise DeviceMemoryError(
            f"the model's weights take {gib(num_bytes)}, and this machine has {gib(total)}; take a smaller model, or "
            "check the sizes in its config.json"
        )


def weights_misfit(num_bytes: int, device: torch.device, error: BaseException) -> DeviceMemoryError:
    """What to tell a user whose model's parameters, `num_bytes` in all, the device did not hold."""
    return DeviceMemoryError(
        f"the model's weights take {gib(num_bytes)} and do not fit: {memory_of(device)}; take a smaller model or "
        f"dtype, a larger device, or free memory there ({type(error).__name__}: {error})"
    )


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


def cannot_allocate(blocks: int, num_bytes: int, block_size: int, error: BaseException) -> DeviceMemoryError:
    """What to tell a user whose KV cache of `blocks` blocks and the dummy the device refused."""
    return DeviceMemoryError(
        f"the KV cache of {blocks:,} blocks of {block_size} tokens takes {num_bytes:,} bytes, which cannot be "
        f"allocated; lower engine.num_gpu_blocks_override, engine.kv_cache_memory, engine.gpu_memory_utilization or "
        f"engine.max_num_seqs ({type(error).__name__}: {error})"
    )
