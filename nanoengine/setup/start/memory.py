"""How much memory an engine may use, how many KV blocks fit, and the report of both."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from nanoengine.api.attention import BatchLimits
from nanoengine.api.errors import ConfigError, DeviceMemoryError
from nanoengine.kernels.device import empty_cache
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.start.clock import Dequantised, Phase, Quantised
from nanoengine.setup.start.graph_sizes import MIXED_DECODE_ROWS
from nanoengine.setup.start.shortage import StepTooLarge

_log = logging.getLogger(__name__)
CPU_KV_CACHE_BYTES = 4 << 30
SPARE_BYTES = 512 << 20  # left free on a GPU, if less is free than the engine may use


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Device memory of an engine after start-up.

    Attributes:
        num_blocks: usable KV blocks of each group, without the dummy block.
        block_bytes: bytes of one block in all layers of all groups. kv_cache_bytes: of all blocks.
        weight_bytes: bytes of the parameters.
        max_num_seqs, max_num_batched_tokens: those of the options, or lower ones if memory is too small for their
            steps.
        step_bytes: bytes of the largest step in addition to weights, tables and cache, with log-probs of every row.
        graph_bytes: bytes that are reserved for graphs. step_bytes and graph_bytes are 0 if nothing is measured: on a
            CPU, or if the size of the cache is given.
        eager_reason: why steps run eagerly although graphs are enabled; "" if they do not, or if graphs are disabled.
        failed_processors: logits processors that could not be made: name -> cause.
        phases: the phases of the runner's start.
        dequantised: the checkpoint's quantised tensors that became plain; None: there are none.
        quantised: what layers store in fewer bits; (): all are plain.
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
    eager_reason: str = ""
    failed_processors: Mapping[str, str] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    dequantised: Dequantised | None = None
    quantised: tuple[Quantised, ...] = ()


def batch_limits(options: EngineOptions) -> BatchLimits:
    """The sizes of static buffers, from options that are all set. Where graphs pad them, steps have more tokens."""
    assert options.max_model_len and options.max_num_batched_tokens and options.block_size
    rows = min(options.max_num_seqs, options.max_num_batched_tokens)
    padded = options.device.startswith("cuda") and options.graph_mixed_steps and not options.enforce_eager
    return BatchLimits(
        max_rows=rows,
        max_tokens=options.max_num_batched_tokens + (min(rows, MIXED_DECODE_ROWS[-1]) if padded else 0),
        max_model_len=options.max_model_len,
        block_size=options.block_size,
    )


@dataclass(frozen=True, slots=True)
class GpuShare:
    """The memory of a GPU that one engine may use.

    Attributes:
        total, free: bytes of the GPU before the engine used any.
        limit: bytes that the engine may use: `gpu_memory_utilization` of the total, no matter what other engines and
            processes use, so two engines of 0.45 fit on one GPU. If less is free, it is what is free; this is logged.
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
                "%s has %s free of %s, and gpu_memory_utilization=%g is %s: this engine uses at most %s",
                device, gib(free), gib(total), utilization, gib(wanted), gib(max(0, limit)),
            )  # fmt: skip
        return cls(device, total, free, limit)

    def left(self) -> int:
        """Bytes of the limit that are not used yet; negative if the engine or other programs have used more."""
        torch.cuda.synchronize(self.device)
        empty_cache(self.device)
        return self.limit - (self.free - torch.cuda.mem_get_info(self.device)[0])

    def kv_budget(self, block_bytes: int, step: int, graphs: int) -> int:
        """Bytes left for the KV cache, if the largest step takes `step` bytes and graphs will take `graphs` bytes.

        Raises `DeviceMemoryError` if not one block fits in addition to the dummy block, and its subclass `StepTooLarge`
        if a smaller step would help.
        """
        left = self.left()
        if left - step - graphs >= 2 * block_bytes:
            return left - step - graphs
        text = (
            f"no KV block fits on {self.device}: of {gib(self.total)}, {gib(self.free)} were free and "
            f"this engine may use {gib(max(0, self.limit))}; weights and tables take {gib(self.limit - left)}, the "
            f"largest step {gib(step)}, graphs {gib(graphs)}, and two blocks {gib(2 * block_bytes)}; free some of the "
            f"GPU's memory, raise engine.gpu_memory_utilization, or lower engine.max_num_seqs or max_num_batched_tokens"
        )
        raise (StepTooLarge if left >= 2 * block_bytes else DeviceMemoryError)(text)


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """The peak of bytes that `run` allocates on a GPU, in addition to those that are allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"


def memory_of(device: torch.device) -> str:
    """How much of the device's memory is free, as text."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        free, total = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    return f"{gib(free)} of {gib(total)} are free on {device}"


def check_host_holds(num_bytes: int) -> None:
    """Raises `DeviceMemoryError` if weights are larger than the memory of the machine.

    They would be allocated page by page without an error, until the system kills a process.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > total:
        raise DeviceMemoryError(
            f"the model's weights take {gib(num_bytes)}, and this machine has {gib(total)}; take a smaller model, or "
            "check the sizes in its config.json"
        )


def weights_misfit(num_bytes: int, device: torch.device, error: BaseException) -> DeviceMemoryError:
    """The error for parameters of `num_bytes` bytes that do not fit in the device's memory."""
    return DeviceMemoryError(
        f"the model's weights take {gib(num_bytes)} and do not fit: {memory_of(device)}; take a smaller model or "
        f"dtype, a larger device, or free memory there ({type(error).__name__}: {error})"
    )


def count_blocks(options: EngineOptions, block_bytes: int, default_budget: Callable[[], int]) -> int:
    """The number of usable blocks: `num_gpu_blocks_override`, else from `kv_cache_memory`, else as many as fit.

    It is never more than all slots at full length can use.
    """
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
    """The error for a KV cache of `blocks` blocks and the dummy block that could not be allocated."""
    return DeviceMemoryError(
        f"the KV cache of {blocks:,} blocks of {block_size} tokens takes {num_bytes:,} bytes, which cannot be "
        f"allocated; lower engine.num_gpu_blocks_override, engine.kv_cache_memory, engine.gpu_memory_utilization or "
        f"engine.max_num_seqs ({type(error).__name__}: {error})"
    )
