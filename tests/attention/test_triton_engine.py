"""The whole engine on the triton backend: the torch backend's tokens, with chunks, mixed steps and cache hits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton_interpreter

from nanoengine import LLM, SamplingParams
from nanoengine.testing.checkpoints import tiny_qwen3

triton_interpreter.import_kernels()
pytestmark = pytest.mark.skipif(not triton_interpreter.INSTALLED, reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def generate(folder: Path, attention: str) -> list[tuple[int, ...]]:
    prompts = [[7, *range(20, 45)], [3, 1, 4, 1, 5], [7, *range(20, 45), 9]]
    with LLM(
        folder, attention=attention, device=DEVICE, dtype="float32", block_size=16, max_num_batched_tokens=16,
        max_num_seqs=3, max_model_len=64, num_gpu_blocks_override=32,
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
        stats = llm.stats()
    assert stats.chunks > 0
    assert stats.mixed_steps > 0
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def test_same_tokens_as_torch(tmp_path: Path) -> None:
    folder = tiny_qwen3(tmp_path, seed=1, std=0.2, num_key_value_heads=2, num_attention_heads=4, head_dim=16)
    want = generate(folder, "torch")
    with triton_interpreter.interpreted():
        assert generate(folder, "triton") == want
