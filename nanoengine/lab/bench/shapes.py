"""Shapes of models for dummy weights, and what a step of them must at least read and compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder, in elements. `architecture`: its name in config.json.

    experts: of each layer, of width `intermediate`; 0: it has one MLP. top_k: of a token.
    """

    name: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    tied: bool
    experts: int = 0
    top_k: int = 0

    @property
    def attention_weights(self) -> int:
        """Number of elements in the matrices of one layer's attention, and in its router."""
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_size
        return qkv + self.heads * self.head_size * self.hidden + self.experts * self.hidden

    @property
    def mlp_weights(self) -> int:
        """Number of elements in an MLP, or in one expert."""
        return 3 * self.hidden * self.intermediate

    @property
    def layer_weights(self) -> int:
        """Number of elements in the matrices of one layer that are multiplied with a token."""
        return self.attention_weights + self.mlp_weights * (self.top_k if self.experts else 1)

    def experts_hit(self, rows: int) -> float:
        """How many experts of a layer a step reads, if each row chooses its own at random."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** rows) if self.experts else 1.0

    def step_weights(self, rows: int) -> float:
        """Number of elements that a decode step reads: all layers, the experts that are used, and the output layer."""
        layer = self.attention_weights + self.mlp_weights * self.experts_hit(rows)
        return self.layers * layer + self.vocab * self.hidden

    @property
    def kv_per_token(self) -> int:
        """Number of elements of K and V of one token, in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_size

    def write(self, folder: Path, max_model_len: int) -> Path:
        """Writes a config.json of this shape for `load_format="dummy"`. Returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.hf_config(max_model_len)))
        return folder

    def hf_config(self, max_model_len: int) -> dict[str, Any]:
        moe = {
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
        }
        return {
            **(moe if self.experts else {}),
            "architectures": [self.architecture],
            "model_type": _MODEL_TYPES[self.architecture],
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": max_model_len,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        }


_MODEL_TYPES = {"Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama", "Qwen3MoeForCausalLM": "qwen3_moe"}
_A3B: dict[str, Any] = {
    "architecture": "Qwen3MoeForCausalLM", "hidden": 2048, "heads": 32, "kv_heads": 4, "head_size": 128,
    "intermediate": 768, "vocab": 151936, "tied": False, "experts": 128, "top_k": 8,
}  # fmt: skip
_SHAPES = (
    Shape(name="qwen3-0.6b", architecture="Qwen3ForCausalLM", hidden=1024, layers=28, heads=16, kv_heads=8,
          head_size=128, intermediate=3072, vocab=151936, tied=True),
    Shape(name="qwen3-8b", architecture="Qwen3ForCausalLM", hidden=4096, layers=36, heads=32, kv_heads=8,
          head_size=128, intermediate=12288, vocab=151936, tied=False),
    Shape(name="llama-3.2-1b", architecture="LlamaForCausalLM", hidden=2048, layers=16, heads=32, kv_heads=8,
          head_size=64, intermediate=8192, vocab=128256, tied=True),
    Shape(name="qwen3-30b-a3b", layers=48, **_A3B),
    Shape(name="qwen3-30b-a3b-24-layers", layers=24, **_A3B),  # half of it, for a GPU of 80 GB
    Shape(name="tiny-moe", architecture="Qwen3MoeForCausalLM", hidden=64, layers=2, heads=4, kv_heads=2, head_size=32,
          intermediate=48, vocab=16384, tied=True, experts=8, top_k=2),
    Shape(name="tiny", architecture="Qwen3ForCausalLM", hidden=64, layers=2, heads=4, kv_heads=2,
          head_size=32, intermediate=96, vocab=16384, tied=True),  # to try the commands on a CPU
)  # fmt: skip
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in _SHAPES}
