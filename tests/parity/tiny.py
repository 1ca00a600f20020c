"""Tiny checkpoints of all models in odd shapes, transformers' model of the same folder, and prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanoengine import LLM
from nanoengine.testing.checkpoints import (
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
)

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

KINDS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "llama": (
        tiny_llama,
        {
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 2e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
        },
    ),
    "llama3 tied": (tiny_llama, {"tie_word_embeddings": True, "rope_parameters": _LLAMA3, "vocab_size": 203}),
    "qwen3": (tiny_qwen3, {"num_key_value_heads": 3, "head_dim": 14, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "qwen3 tied": (tiny_qwen3, {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "qwen2": (tiny_qwen2, {"num_key_value_heads": 3}),
    "qwen2 tied, a window in the last layer": (
        tiny_qwen2,
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "mistral": (tiny_mistral, {}),
    # embeddings that lead the residual stream would make a tied model repeat itself
    "gemma2": (tiny_gemma2, {"seed": 4, "std": 0.05, "final_logit_softcapping": 2.0}),
    "gemma3": (tiny_gemma3, {"std": 0.1}),
}

VOCAB = 131  # the smallest of them
SMALL: Mapping[str, Any] = {"max_num_seqs": 32, "block_size": 4, "num_gpu_blocks_override": 512, "max_model_len": 128}


def write(kind: str, folder: Path) -> Path:
    make, options = KINDS[kind]
    return make(folder, **{"seed": len(kind), "std": 0.2, **options})


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def llm(folder: Path, **options: Any) -> LLM:
    """A float32 engine with small blocks, so that tables, chunks and hits happen."""
    return LLM(folder, **{"attention": "torch", **SMALL, **options})


def prompts(count: int, *, seed: int = 0, shortest: int = 1, longest: int = 40, shared: int = 0) -> list[list[int]]:
    """Random prompts; the first `shared` tokens are the same in all."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=generator).tolist()

    head = ids(shared)
    lens = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [head + ids(n) for n in lens]
