"""What a start reports, and what gives device memory back."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a start. `name`: of `PHASES`. `seconds`: of wall clock."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """What stands on the device after the start.

    Attributes:
        num_blocks: usable KV blocks of each group (the dummy block not counted). block_bytes: one block over all
            layers of all groups. kv_cache_bytes: all of them. weight_bytes: parameters.
        max_num_seqs, max_num_batched_tokens: those of the options, or lower ones where memory did not hold their steps.
        step_bytes: what the largest step takes beside weights, tables and cache, log-probs of every row included.
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


class CaptureOutOfMemory(MemoryError):
    """Memory ran out while graphs were captured."""


def empty_cache(device: torch.device) -> None:
    """Gives back what torch's allocator keeps for later."""
    if device.type == "cuda":
        import torch

        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def free_unused(device: torch.device) -> None:
    """Gives what nobody refers to any more back to the device."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)  # graphs in flight live until they end
        gc.collect()
        empty_cache(device)
