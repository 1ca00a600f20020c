"""Five thousand short requests on a GPU: all accounted for, all blocks back, memory flat."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.support import mock_llm
from engine.test_soak import drive, measure

from nanoengine.testing.invariants import check_scheduler

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
PARTS = (1000, 2000, 2000)  # in the first one bounded caches fill, and kernels are compiled
REQUESTS = sum(PARTS)
MIB = 1 << 20


def gpu_memory() -> tuple[int, int]:
    """Bytes of living tensors, and bytes that the device has given away."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated(), total - free


def test_five_thousand_requests(tmp_path: Path) -> None:
    rng = random.Random(7)
    options: dict[str, Any] = {
        "device": "cuda", "num_gpu_blocks_override": 40, "max_num_batched_tokens": 160, "max_num_seqs": 16,
    }  # fmt: skip
    with mock_llm(tmp_path, scheduling_policy="priority", **options) as llm:
        parts, host, gpu = [], [], []
        for i, count in enumerate(PARTS):
            parts.append(drive(llm, count, rng, f"{i}/"))
            host.append(measure())
            gpu.append(gpu_memory())
        stats = llm.stats()
        check_scheduler(llm.engine.scheduler)
    seen = {name: sum(part[name] for part in parts) for name in parts[0]}
    print(f"\n{seen}\n{stats}\nGPU: {gpu}; host: {host}")
    assert sum(seen[k] for k in ("finished", "aborted", "refused")) == REQUESTS
    assert all(seen[k] > 100 for k in seen), seen
    assert stats.free_blocks == stats.num_blocks
    assert stats.running == stats.waiting == 0
    assert stats.preemptions > 100
    assert stats.prefix_hit_tokens > 0
    assert stats.mixed_steps > 1000
    assert stats.graph_steps + stats.mixed_graph_steps > 1000
    assert gpu[-1][0] - gpu[0][0] < MIB, "tensors are kept"
    assert gpu[-1][1] - gpu[0][1] < 8 * MIB, "the device's memory is kept"
    assert host[-1][0] - host[0][0] < 1000, "objects are kept"
    assert host[-1][1] - host[-2][1] < 16 * MIB, "memory is kept"
