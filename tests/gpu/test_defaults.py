"""The engine as it comes: no option but the dtype of the float32 class. The backend, every graph size, all of the
memory, 256 slots."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import test_tiny_models as on_cpu
from parity import tiny
from parity.compare import compare

from nanoengine import LLM, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.alone]


def recipes(count: int) -> list[SamplingParams]:
    """What the captured tail serves, and different lengths: the batch shrinks through all sizes."""
    plain = [p for p in on_cpu.seeded(8) if p.processor_fields.keys() <= {"temperature", "top_k", "top_p", "min_p"}]
    return [plain[i % len(plain)].replace(seed=i, max_tokens=4 + i * 7 % 37) for i in range(count)]


def test_three_hundred_requests(tmp_path: Path) -> None:
    folder = tiny.write("qwen3", tmp_path)
    asked, params = tiny.prompts(300, shortest=5, longest=40), recipes(300)
    with LLM(folder, dtype="float32") as llm:
        outputs = llm.generate(asked, params, use_tqdm=False)
        stats = llm.stats()
    report = compare(tiny.reference(folder), outputs, params)
    print(f"\n{stats}\n{report}")
    assert report.positions == sum(p.core.max_tokens or 0 for p in params)
    assert report.decided >= 0.95 * report.positions
    assert stats.free_blocks == stats.num_blocks > 1000
    assert stats.graph_steps > 5
    assert stats.mixed_graph_steps > 2
    assert stats.graph_tails > 0.9 * (stats.graph_steps + stats.mixed_graph_steps)
