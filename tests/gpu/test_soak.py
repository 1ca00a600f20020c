"""Ten thousand short requests on a GPU: all accounted for, all blocks back, memory flat."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.support import mock_llm
from engine.test_soak import drive, measure

pytestmark = pytest.mark.gpu
REQUESTS = 10_000
MIB = 1 << 20


def gpu_memory() -> tuple[int, int]:
    """Bytes of living tensors, and bytes that the device has given away."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated(), total - free


def test_ten_thousand_requests(tmp_path: Path) -> None:
    rng = random.Random(7)
    options: dict[str, Any] = {
        "device": "cuda", "num_gpu_blocks_override": 80, "max_num_batched_tokens": 160, "max_num_seqs": 16,
    }  # fmt: skip
    with mock_llm(tmp_path, scheduling_policy="priority", **options) as llm:
        first = drive(llm, REQUESTS // 5, rng, "first")  # bounded caches fill here
        before, gpu_before = measure(), gpu_memory()
        second = drive(llm, REQUESTS - REQUESTS // 5, rng, "second")
        after, gpu_after = measure(), gpu_memory()
        stats = llm.stats()
        llm.engine.scheduler.check()
    seen = {name: first[name] + second[name] for name in first}
    print(f"\n{seen}\n{stats}\nGPU: {gpu_before} -> {gpu_after}; host: {before} -> {after}")
    assert sum(seen[k] for k in ("finished", "aborted", "refused")) == REQUESTS
    assert all(seen[k] > 100 for k in seen), seen
    assert stats.free_blocks == stats.num_blocks
    assert stats.running == stats.waiting == 0
    assert stats.preemptions > 100
    assert stats.prefix_hit_tokens > 0
    assert stats.mixed_steps > 1000
    assert stats.graph_steps + stats.mixed_graph_steps > 1000
    assert gpu_after[0] - gpu_before[0] < MIB, "tensors are kept"
    assert gpu_after[1] - gpu_before[1] < 32 * MIB, "the device's memory is kept"
    assert after[0] - before[0] < 1000, "objects are kept"
    assert after[1] - before[1] < 32 * MIB, "memory is kept"
