"""Vectors where steps are graphs and kernels are fused: those of a CPU; only steps with such rows are no graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanoengine import LLM, SamplingParams
from nanoengine.testing.checkpoints import tiny_llama

pytestmark = pytest.mark.gpu
PROMPTS = [[(7 * i + j) % 100 for i in range(5 + 9 * j)] for j in range(8)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_beside_graphs(pooling: Any, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, hidden_size=384)  # head size 64
    options = {"dtype": "float32", "skip_tokenizer_init": True, "max_num_seqs": 8, "kv_cache_memory": 64 << 20}
    with LLM(folder, device="cpu", **options) as cpu:
        expected = cpu.embed(PROMPTS, pooling, normalize=False, use_tqdm=False)
    with LLM(folder, device="cuda", max_num_batched_tokens=64, **options) as llm:
        alone = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[:4], GREEDY, use_tqdm=False)]
        found: dict[str, Any] = {}
        for i, prompt in enumerate(PROMPTS[:4]):
            llm.text_engine.add_request(
                str(i), prompt, GREEDY, final_only=True, sink=lambda output: found.update({output.request_id: output})
            )
        while not llm.stats().mixed_steps and not llm.engine.scheduler.running:
            llm.engine.step()
        outputs = llm.embed(PROMPTS, pooling, normalize=False, use_tqdm=False)
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
        stats = llm.stats()
        assert stats.graph_steps > 0
        assert stats.chunks > 0
        assert [found[str(i)].outputs[0].token_ids for i in range(4)] == alone
    for output, want in zip(outputs, expected, strict=True):
        assert output.embedding is not None
        assert want.embedding is not None
        torch.testing.assert_close(
            torch.tensor(output.embedding), torch.tensor(want.embedding), rtol=1e-3, atol=1e-3
        )  # fmt: skip
